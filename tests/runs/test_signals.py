"""Runs that are told to stop: what is kept, and what is said."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcnn import Config, fit
from fastcnn.data import cache, cache_files
from fastcnn.runs.failures import RunInterrupted
from fastcnn.runs.resume import resumed_config
from fastcnn.storage import checkpoint
from fastcnn.system import signals
from tests.runs.small_runs import assert_equal, figures, go_on


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_photos_are_decoded(
    config: Config, whole: Path, sent: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**{**config.to_dict(), "cache_dir": "cache"})
    plain, calls = cache.Workers.decode, itertools.count()

    def stopping(*arguments: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(sent)
        return plain(*arguments)

    monkeypatch.setattr(cache_files, "CHUNK", 20)
    with monkeypatch.context() as patch:
        patch.setattr(cache.Workers, "decode", stopping)
        with pytest.raises(RunInterrupted, match="run the same command again") as caught:
            fit(config, run_dir="cut")
    assert caught.value.exit_code == code
    assert not Path("cut").exists()
    run = fit(config, run_dir="cut")
    assert run.summary["num_decoded"] == 60
    assert_equal(run.run_dir, whole)


def test_a_signal_while_the_run_is_finished(config: Config, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fastcnn.runs.results._export", lambda *arguments: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(
            RunInterrupted, match=r"stopped by SIGTERM; saved in .*; to continue, run: fastcnn train --resume cut$"
        ):
            fit(config, run_dir="cut")
    assert_equal(go_on("cut"), whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("how", ["received", "raising"])
def test_a_second_sigint_leaves_at_once(how: str) -> None:
    code = (
        "import signal, time\nfrom fastcnn.system import signals\n"
        f"with signals.{how}():\n"
        "    try:\n        signal.raise_signal(signal.SIGINT)\n"
        "    except signals.StopSignal:\n        pass\n"
        "    print('first', flush=True)\n    signal.raise_signal(signal.SIGINT)\n    print('second')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "first\n")


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raising(), signals.received() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_terminal_is_closed_is_saved(photos: Path) -> None:
    """A terminal of its own, closed in the middle of training: the kernel sends SIGHUP, and printing fails."""
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "fastcnn", "train", str(photos), "--run-dir=run", "--epochs=10000"]
    options = ["--image-size=32", "--filters=8", "--batch-size=16", "--workers=1"]
    code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, *options],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    try:
        os.close(terminal)
        while not Path("run/last.pt").exists():
            assert process.poll() is None
            os.read(master, 1 << 16)
        os.close(master)
        assert process.wait(60) == 129
    finally:
        process.kill()
    state = checkpoint.load(Path("run/last.pt"))
    assert resumed_config("run", {}).epochs == 10000
    assert len(state["rows"]) == len(figures(Path("run")))


def test_no_exception_handler_takes_a_signal_for_a_failure() -> None:
    assert not issubclass(signals.StopSignal, Exception)
