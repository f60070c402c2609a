"""Runs that are killed, resumed, or run at the same time."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from fastcnn import Config, fit
from fastcnn.cli.app import main
from fastcnn.data import cache
from fastcnn.errors import FastCNNError, FastCNNWarning, UsageError
from fastcnn.runs import loop
from fastcnn.runs.fit import resolve_machine, write_config
from fastcnn.runs.loop import CheckpointTimer
from fastcnn.runs.resume import resumed_config
from fastcnn.storage import checkpoint
from fastcnn.system import stopwatch
from fastcnn.system.ranks import ALONE
from tests.runs.small_runs import SMALL, STEPS, assert_equal, figures, go_on, result


def test_a_run_killed_before_its_first_step_was_saved_begins_again(config: Config, whole: Path) -> None:
    Path("cut").mkdir()
    write_config(Path("cut"), resolve_machine(config, ALONE))
    with pytest.raises(
        FastCNNError, match="choose another with --run-dir, or continue its run: fastcnn train --resume cut"
    ):
        fit(config, run_dir="cut")
    assert_equal(go_on("cut"), whole)


def test_a_run_killed_while_its_folder_was_made_leaves_it_free(config: Config, whole: Path) -> None:
    Path("cut").mkdir()
    Path("cut/.config.yaml.partial").write_text("half")
    Path("cut/.lock").touch()
    assert_equal(fit(config, run_dir="cut").run_dir, whole)


@pytest.mark.parametrize("after", [1, 4, STEPS + 2])
def test_a_run_killed_within_an_epoch_goes_on_from_the_last_save(
    config: Config, whole: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing is put in order after it."""

    saves = 0

    def save(self: CheckpointTimer) -> None:
        nonlocal saves
        saves += 1
        if saves == after + 1:  # the first is the beginning
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointTimer, "restart", save)
        with pytest.raises(Killed):
            fit(Config(**{**config.to_dict(), "checkpoint_every": "1"}), run_dir="cut")
    assert checkpoint.load(Path("cut/last.pt"))["step"] == after
    assert_equal(go_on("cut"), whole)


def test_a_run_killed_between_its_two_checkpoints_writes_the_best_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.pt comes first, and best.pt can be made of it."""
    monkeypatch.setattr(loop, "merit", lambda row: row["epoch"])  # the last epoch is the best
    late = fit(config, run_dir="late").run_dir
    shutil.copytree(late, "cut")
    for spoilt in (lambda path: path.unlink(), lambda path: path.write_bytes(b"half")):
        spoilt(Path("cut/best.pt"))
        Path("cut/result.json").unlink(missing_ok=True)
        assert_equal(go_on("cut"), late)


def test_a_best_that_is_lost_is_said_so(whole: Path) -> None:
    shutil.copytree(whole, "cut")
    state = checkpoint.load(Path("cut/last.pt"))
    checkpoint.save(Path("cut/last.pt"), {**state, "best": state["rows"][0]})
    Path("cut/best.pt").write_bytes(b"half")
    with pytest.warns(FastCNNWarning, match=r"best.pt is cut short.*: the weights of the best epoch, 1, are lost"):
        go_on("cut", epochs=3)
    assert checkpoint.load(Path("cut/best.pt"))["best"]["epoch"] in (2, 3)


def test_a_run_killed_while_it_is_finished_is_finished(whole: Path) -> None:
    shutil.copytree(whole, "cut")
    with pytest.raises(UsageError, match="has its 2 epochs: give more with --epochs"):
        resumed_config("cut", {})
    for content in (None, "{", json.dumps({**result(whole), "finished": False})):
        Path("cut/result.json").unlink()
        if content:
            Path("cut/result.json").write_text(content)
        assert_equal(go_on("cut"), whole)


def test_a_resumed_run_does_not_need_what_it_began_with(photos: Path, whole: Path) -> None:
    shutil.copytree(whole, "first")
    fit(Config(data=str(photos), init_from="first", **SMALL), run_dir="second")
    shutil.rmtree("first")
    assert len(figures(go_on("second", epochs=3))) == 3


def test_a_checkpoint_of_another_run_is_refused(whole: Path, photos: Path) -> None:
    other = fit(Config(data=str(photos), **{**SMALL, "batch_size": 8}), run_dir="other").run_dir
    shutil.copytree(whole, "cut")
    state = checkpoint.load(other / "last.pt")
    checkpoint.save(Path("cut/last.pt"), {**state, "config": checkpoint.load(whole / "last.pt")["config"]})
    with pytest.raises(FastCNNError, match=r"last\.pt does not belong to this run"):
        go_on("cut", epochs=3)


def test_when_a_checkpoint_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, seconds, never = (CheckpointTimer(every) for every in ("4", "30s", None))
    assert [done for done in range(1, 13) if steps.due(done)] == [4, 8, 12]
    assert [steps.limit(8, done) for done in (0, 3, 4)] == [4, 1, 4]
    assert seconds.limit(8, 3) == never.limit(8, 3) == 8
    assert not seconds.due(4)
    assert not never.due(4)
    seconds.last -= 31
    assert seconds.due(5)
    seconds.restart()
    assert not seconds.due(6)


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_fifty_kills() -> None:
    """Real ones, in every stage of runs as a user starts them: `scripts/kill_test.py`."""
    import kill_test

    kills, differences = kill_test.run(50, seed=2, num_photos=240)
    print(dict(kills))
    assert sum(kills.values()) >= 50
    assert min(kills[stage] for stage in kill_test.STAGES) >= 5
    assert differences == []


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_twenty_signals_after_each_of_which_the_photos_are_moved() -> None:
    """SIGHUP, SIGTERM, SIGINT and SIGKILL in turn, resumed with the photos in another folder; no process is left."""
    import kill_test

    kills, differences = kill_test.run(20, seed=0, num_photos=96, moved=True)
    assert sum(kills.values()) >= 20
    assert differences == []


@pytest.mark.long  # test_moved.py resumes moved runs in the short form
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_signal_after_which_the_photos_are_moved(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form; the uninterrupted run, and the end of the other one, are in this process."""
    import kill_test

    monkeypatch.delitem(kill_test.OPTIONS, "export")
    shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns("*[13579].jpg"))

    def finish(name: str) -> dict[str, object]:
        assert main(kill_test.command(tmp_path, tmp_path / name, tmp_path / f"{name}-cache")) == 0
        return kill_test.outcome(tmp_path / name)

    whole, rng = finish("whole"), random.Random(0)
    hit = kill_test.kill(tmp_path, tmp_path / "cut", tmp_path / "cut-cache", "train", 0.0, rng, signal.SIGHUP)
    assert hit == "train"
    assert kill_test.left_over(tmp_path) == []
    kill_test.move_photos(tmp_path, rng)
    assert finish("cut") == whole


def test_stages_that_lie_in_one_another_are_counted_once() -> None:
    watch = stopwatch.Stopwatch()
    with watch.stage("train"):
        time.sleep(0.02)
        with watch.stage("checkpoint"):
            time.sleep(0.05)
    assert watch.seconds["train"] < watch.seconds["checkpoint"]
    assert sum(watch.seconds.values()) <= watch.total()


def test_a_run_goes_on_with_another_loader(config: Config, whole: Path, photos: Path) -> None:
    """What a run that ran out of memory is told to do; all loaders train the same."""
    fit(Config(**{**config.to_dict(), "epochs": 1, "schedule": "constant"}), run_dir="cut")
    fit(Config(**{**config.to_dict(), "epochs": 2, "schedule": "constant"}), run_dir="two")
    assert_equal(go_on("cut", epochs=2, loader="mapped"), Path("two"))
    assert result(Path("cut"))["loader"] == "mapped"


def test_two_runs_decode_the_photos_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in another process begins while this one decodes, and has to wait for it."""
    shutil.copytree(photos, "photos")
    options = {"epochs": 1, "image-size": 32, "filters": 8, "batch-size": 16, "threads": 1, "cache-dir": "cache"}
    command = [sys.executable, "-m", "fastcnn.cli", "train", "photos", "--run-dir=b", "--no-report"]
    command += [f"--{name}={value}" for name, value in options.items()]
    plain, others = cache.Workers.decode, list[subprocess.Popen[str]]()

    def decode(*arguments: Any) -> Any:
        if not others:
            others.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"))
            assert others[0].stdout
            assert any("another run is decoding these photos" in line for line in others[0].stdout)
        return plain(*arguments)

    monkeypatch.setattr(cache.Workers, "decode", decode)
    values = {name.replace("-", "_"): value for name, value in options.items()}
    fit(Config(**{**values, "data": "photos", "filters": (8,), "report": False}), run_dir="a")
    said = others[0].communicate()[0]
    assert others[0].returncode == 0
    assert [result(Path(name))["num_decoded"] for name in "ab"] == [120, 0]
    assert "decoded 120 photos" not in said
    one, other = (checkpoint.load(Path(name, "last.pt"))["model"] for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_is_trained_by_one_command(whole: Path) -> None:
    shutil.copytree(whole, "cut")
    with filelock.FileLock("cut/.lock"), pytest.raises(FastCNNError, match="another command is training in cut"):
        go_on("cut", epochs=3)
    assert len(figures(go_on("cut", epochs=3))) == 3
    assert not Path("cut/.lock").exists()
