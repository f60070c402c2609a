"""Runs that are killed, told to stop, out of disk or memory, or out of numbers: what is kept, and what is said."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from torch import Tensor

from fastcnn import Config, export_run, fit
from fastcnn.cli.app import main
from fastcnn.data import cache, cache_files
from fastcnn.data import loaders as loader
from fastcnn.errors import FastCNNError, FastCNNWarning, UsageError
from fastcnn.inference import artefact
from fastcnn.runs import loop, trackers
from fastcnn.runs.evaluate_run import evaluate_run
from fastcnn.runs.failures import RunInterrupted, largest_batch_size
from fastcnn.runs.fit import resolve_machine, write_config
from fastcnn.runs.loop import CheckpointTimer, merit
from fastcnn.runs.resume import resumed_config
from fastcnn.storage import checkpoint
from fastcnn.system import signals, stopwatch
from fastcnn.system.ranks import ALONE
from fastcnn.training import optimizers
from fastcnn.training import step as training_step
from fastcnn.training.step import TrainingStep

SMALL: dict[str, Any] = {
    "epochs": 2,
    "image_size": 32,
    "filters": (8,),
    "batch_size": 16,
    "deterministic": True,
    "report": False,
}
STEPS = 6  # an epoch


@pytest.fixture(scope="module")
def config(photos: Path) -> Config:
    return Config(data=str(photos), dropout=0.2, ema=0.9, schedule="onecycle", augment=("flip", "mixup"), **SMALL)


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    return fit(config, run_dir=tmp_path_factory.mktemp("whole") / "run").run_dir


def figures(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]


def assert_equal(run_dir: Path, whole: Path) -> None:
    """The weights, the figures and the chosen best, to the bit."""
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint.load(run_dir / name), checkpoint.load(whole / name)
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in other["model"])
        assert torch.equal(one["average"], other["average"])
        assert torch.equal(one["rng"], other["rng"])
        assert (one["best"]["epoch"], one["step"]) == (other["best"]["epoch"], other["step"])
    assert figures(run_dir) == figures(whole)
    assert result(run_dir)["finished"] is True


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())  # type: ignore[no-any-return]


def go_on(run_dir: Path | str, **changes: Any) -> Path:
    return fit(resumed_config(run_dir, changes), resume=run_dir).run_dir


# Killed


def test_a_run_killed_before_its_first_step_was_saved_begins_again(config: Config, whole: Path) -> None:
    Path("cut").mkdir()
    write_config(Path("cut"), resolve_machine(config, ALONE))
    with pytest.raises(FastCNNError, match="choose another with --run-dir, or continue its run with --resume cut"):
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


# Told to stop


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


# At the same time


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


# No finite number


def planted(monkeypatch: pytest.MonkeyPatch, steps: Callable[[int], bool]) -> list[Tensor]:
    """Let the loss of the steps that `steps` names (from 0) be NaN; return those batches' labels."""
    plain, batches, number = training_step.forward, list[Tensor](), -1

    def forward(model: Any, normalise: Any, images: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        nonlocal number
        number += 1
        if not steps(number):
            return plain(model, normalise, images, targets, *rest)
        batches.append(targets)
        for buffer in model.buffers():
            buffer.fill_(float("nan"))  # as batch norms' own statistics become
        losses, predictions = plain(model, normalise, images, targets, *rest)
        return losses * float("nan"), predictions

    monkeypatch.setattr(training_step, "forward", forward)
    return batches


def test_a_loss_that_is_no_number_stops_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(data=str(photos), lr=0.002, **SMALL)
    with monkeypatch.context() as patch:
        batches = planted(patch, lambda number: number >= STEPS + 2)
        with pytest.raises(FastCNNError) as caught:
            fit(config, run_dir="run")
    with Path("run/not_finite.csv").open(newline="") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    state = checkpoint.load(Path("run/last.pt"))
    assert [state["classes"].index(name.partition("/")[0]) for name in names] == batches[0].tolist()
    said = str(caught.value)
    assert said.startswith(
        f"the loss of step {STEPS + 3} (epoch 2) is not a finite number, at learning rate 0.002 "
        f"and with {names[0]}, {names[1]}, {names[2]} and 13 more (run/not_finite.csv)"
    )
    assert "try a lower --lr, --clip-norm 1 or --precision fp32, or --on-nan skip" in said
    assert said.endswith(
        "; run/last.pt was saved before it: --resume continues from there, --init-from run begins a new run"
    )
    assert "\n" not in said
    assert state["step"] == STEPS
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(figures(go_on("run"))) == 2


def test_a_stop_by_a_signal_saves_no_bad_state(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(data=str(photos), checkpoint_every="1", **SMALL)
    planted(monkeypatch, lambda number: number >= 2)
    with pytest.raises(FastCNNError, match=r"the loss of step 3 \(epoch 1\)"):
        fit(config, run_dir="run")
    state = checkpoint.load(Path("run/last.pt"))
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_on_nan_skip_leaves_the_step_out_and_counts_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda number: number in (2, STEPS + 1))
    with pytest.warns(FastCNNWarning, match="skipped 1 of 6 steps of epoch .: ") as caught:
        run = fit(Config(data=str(photos), on_nan="skip", **SMALL))
    assert len(caught) == 2
    assert run.summary["skipped_steps"] == 2
    assert all(np.isfinite(list(row.values())).all() for row in run.metrics)
    state = checkpoint.load(run.run_dir / "last.pt")
    assert state["skipped"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_skipped_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training.test_step import make_feed, make_model, make_step

    planted(monkeypatch, lambda number: number == 1)
    step = make_step(make_model(), make_feed(16), 4)
    step.skip_nan = True
    step()
    before = [tensor.clone() for tensor in (step.parameters.values, *step.parameters.model.buffers(), step.sums.values)]
    step()
    after = [step.parameters.values, *step.parameters.model.buffers(), step.sums.values]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert (int(step.step_count), int(step.skipped), int(step.optimizer.num_updates)) == (2, 1, 1)
    step()
    assert not torch.equal(step.parameters.values, before[0])


def test_a_run_without_one_good_step_ends(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda number: True)
    with pytest.raises(FastCNNError, match="no step of epoch 1 had a finite loss: try a lower --lr"):
        fit(Config(data=str(photos), on_nan="skip", **SMALL))


@pytest.mark.filterwarnings("default::fastcnn.errors.FastCNNWarning")
@pytest.mark.parametrize(("on_nan", "limit"), [("skip", None), ("stop", 1)])
def test_an_epoch_without_a_validation_figure_is_no_result(
    on_nan: str, limit: int | None, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if limit is None else [f"--limit-train-batches={limit}"]
    options = ["--image-size=32", "--filters=8", "--batch-size=16", "--epochs=1", "--export=torchscript"]
    status = main(["train", str(photos), "--run-dir=run", "--lr=1e20", f"--on-nan={on_nan}", *options, *more])
    assert status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastcnn: error: the validation loss of epoch 1 is not a finite number")
    assert "try a lower --lr" in last
    assert not [name for name in ("best.pt", "last.pt", "result.json") if Path("run", name).exists()]


def test_weights_that_are_no_numbers_stop_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(Config(data=str(photos), **SMALL), run_dir="run")
    before = Path("run/best.pt").read_bytes()

    plain, calls = optimizers.Adam._update, itertools.count(1)

    def update(self: optimizers.Adam, skip: Tensor | None) -> None:
        plain(self, skip)
        if next(calls) == STEPS:  # the last of the epoch: no loss tells of it
            self.parameters.values[0] = math.inf

    monkeypatch.setattr(optimizers.Adam, "_update", update)
    with pytest.raises(FastCNNError, match=r"weights became NaN or infinite in epoch 3: .*--resume continues"):
        go_on("run", epochs=3)
    assert Path("run/best.pt").read_bytes() == before


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_that_would_break_the_weights_is_left_out(optimizer: str) -> None:
    from tests.training.test_step import make_feed, make_model, make_step

    step = make_step(make_model(), make_feed(16), 4)
    step.optimizer, step.skip_nan = optimizers.OPTIMIZERS[optimizer](step.parameters, 1e-2), True
    step.lr_schedule[0] = math.inf
    before = [tensor.clone() for tensor in (step.parameters.values, *step.optimizer.moments.values(), step.sums.values)]
    step()
    after = [step.parameters.values, *step.optimizer.moments.values(), step.sums.values]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert (int(step.step_count), int(step.skipped), int(step.optimizer.num_updates)) == (1, 1, 0)
    step()
    assert (int(step.skipped), int(step.optimizer.num_updates)) == (1, 1)


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_weights_without_finite_results_are_refused(value: float, run_dir: Path) -> None:
    shutil.copytree(run_dir, "bad")
    state = checkpoint.load(Path("bad/best.pt"))
    for name, tensor in state["model"].items():
        if name.endswith("weight"):
            tensor.mul_(value)
    checkpoint.save(Path("bad/best.pt"), state)
    with pytest.raises(FastCNNError, match=r"not (a )?finite number.*lower --lr"):
        evaluate_run("bad")
    with pytest.raises(FastCNNError, match=r"not finite numbers.*lower --lr"):
        export_run("bad")
    assert not Path("bad/model.torchscript").exists()
    if math.isnan(value):
        with pytest.raises(FastCNNError, match=r"--init-from .*not finite numbers"):
            fit(Config(data=state["config"]["data"], init_from="bad", **SMALL))


def test_a_file_that_gives_no_numbers_predicts_nothing() -> None:
    model = artefact.Artefact(Path("m.onnx"), "", {"classes": ["a"]}, lambda images: np.full((1, 1), np.nan, "f4"))
    with pytest.raises(FastCNNError, match=r"m.onnx gives probabilities that are not finite numbers"):
        model.probabilities(np.zeros((1, 4, 4, 3), np.uint8))


def test_no_epoch_without_figures_is_the_best() -> None:
    rows = [{"val/accuracy": accuracy, "val/loss": loss} for accuracy, loss in [(0.9, math.nan), (0.8, math.inf)]]
    good = {"val/accuracy": 0.1, "val/loss": 9.0}
    assert max([*rows, good], key=merit) is good


# Out of memory


def exhausted(*arguments: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page more")


def test_auto_steps_down_to_mapped(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.LOADERS, "resident", exhausted)
    with pytest.warns(FastCNNWarning, match=r"loader mapped: resident ran out of memory \(CUDA out of memory.*GiB\.\)"):
        run = fit(Config(data=str(photos), **SMALL))
    assert run.summary["loader"] == "mapped"
    assert "ran out of memory" in run.summary["loader_reason"]
    with pytest.raises(FastCNNError, match="--strict"):
        fit(Config(data=str(photos), strict=True, **SMALL))


def test_resident_out_of_memory_names_what_fits(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.LOADERS, "resident", exhausted)
    with pytest.raises(
        FastCNNError, match=r"out of memory on cpu .*: use --loader mapped, which fits with --batch-size 16$"
    ):
        fit(Config(data=str(photos), loader="resident", **SMALL))


@pytest.mark.parametrize(
    ("most", "said"), [(5, "use --loader mapped --batch-size 4, which fits"), (1, "not even one batch of 2 fits")]
)
def test_a_batch_out_of_memory_names_what_fits(
    photos: Path, most: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainingStep.__call__

    def step(self: TrainingStep, functions: object = None) -> None:
        if self.batch_size > most:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        plain(self)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    with pytest.raises(FastCNNError, match=f"out of memory on cpu .*{said}"):
        fit(Config(data=str(photos), **SMALL))


def test_other_errors_are_not_taken_for_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setitem(loader.LOADERS, "resident", wrong)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        fit(Config(data=str(photos), **SMALL))


def test_the_batch_that_fits_is_tried(photos: Path) -> None:
    assert largest_batch_size(resolve_machine(Config(data=str(photos), **SMALL), ALONE)) == 16


# A full disk


def test_a_disk_that_is_full_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, row: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trackers.CsvTracker, "epoch", full)
        with pytest.raises(FastCNNError) as caught:
            fit(Config(data=str(photos), **SMALL), run_dir="run")
    assert str(caught.value) == (
        "cannot write run: No space left on device; saved in run/last.pt; to continue, run: fastcnn train --resume run"
    )
    assert len(figures(go_on("run"))) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no room; the last few bytes too."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("stage", ["scan", "decode", "upload", "train", "checkpoint", "eval", "report", "export"])
def test_a_disk_that_fills_up_in_a_stage(
    config: Config, whole: Path, small_disk: Path, stage: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clear error (or the run finished, with a warning), the last checkpoint loads, and with room it goes on."""
    config = Config(
        **{
            **config.to_dict(),
            "cache_dir": str(small_disk / "cache"),
            "checkpoint_every": "2",
            "report": True,
            "export": ("torchscript",),
        }
    )
    plain, entered, folder = stopwatch.Stopwatch.stage, 0, small_disk / "run"

    @contextlib.contextmanager
    def filling(self: stopwatch.Stopwatch, name: str) -> Iterator[None]:
        nonlocal entered
        entered += name == stage
        if name == stage and entered == times:
            fill(small_disk)
        with plain(self, name):
            yield

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FastCNNWarning)
        patch.setattr(stopwatch.Stopwatch, "stage", filling)
        patch.setattr(cache, "check_space", lambda *arguments: None)  # it fills up after that
        patch.setattr(cache_files, "CHUNK", 20)
        said = ""
        try:
            fit(config, run_dir=folder)
        except FastCNNError as error:
            said = str(error)
    assert "\n" not in said
    assert "No space left on device" in said or "no export" in said or entered < times
    print(stage, times, said)
    (small_disk / "ballast").unlink(missing_ok=True)
    if (folder / "last.pt").is_file():
        checkpoint.load(folder / "last.pt")
    if (folder / "config.yaml").is_file():
        with contextlib.suppress(UsageError):  # it was finished
            go_on(folder)
    else:
        fit(config, run_dir=folder)
    assert_equal(folder, whole)


@pytest.mark.long
def test_a_cache_without_room_is_said_before_anything_is_decoded(config: Config, small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(FastCNNError, match=r"cannot write the cache|the cache needs 0 MiB"):
        fit(Config(**{**config.to_dict(), "cache_dir": str(small_disk), "loader": "resident"}))


@pytest.mark.long
def test_a_read_only_cache_is_used_where_it_is_whole(config: Config, whole: Path, small_disk: Path) -> None:
    config = Config(**{**config.to_dict(), "cache_dir": str(small_disk)})
    fit(config, run_dir="first")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = fit(config, run_dir="second")
    assert run.summary["num_decoded"] == 0
    assert_equal(run.run_dir, whole)
    with pytest.raises(FastCNNError, match=r"cannot write the cache .*; choose another with --cache-dir"):
        fit(Config(**{**config.to_dict(), "image_size": 40}), run_dir="third")
    assert not Path("third").exists()
