"""Sweeps as they run: trials in processes, killed and resumed, packed, failing."""

from __future__ import annotations

import csv
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastcnn.cli import app as cli
from fastcnn.config import read_yaml, resolve
from fastcnn.errors import DataError, FastCNNError, UsageError
from fastcnn.runs.fit import fit
from fastcnn.storage import checkpoint
from fastcnn.sweeps import search_space, sweep, sweep_file, trial_process, wandb_agent
from fastcnn.sweeps.study import TrialRecord
from fastcnn.sweeps.trial_process import Ending, Epoch, Job, TrialProcess
from fastcnn.system import device

pytest.importorskip("optuna")


SMALL = {"epochs": 2, "image_size": 32, "filters": [8], "batch_size": 16, "report": False, "workers": 1}


EXACT = {**SMALL, "threads": 1, "on_nan": "stop"}  # one thread computes the same each time


# The second of them fails in its first epoch.
LRS = [0.001, 1e30, 0.01]


def plan(**more: Any) -> search_space.Sweep:
    text = {"name": "small", "method": "grid", "parameters": {"lr": {"values": LRS}}, **more}
    return sweep_file.parse(text, "s.yaml")


class InlineProcess:
    """Trains in the test's own process, in place of a TrialProcess, where processes are not the point."""

    def __init__(self, on_epoch: Callable[[Epoch], bool], on_warning: Callable[[str], None]) -> None:
        self.on_epoch, self.busy = on_epoch, False
        self._reader, self._writer = multiprocessing.Pipe()

    def start(self, job: Job) -> None:
        self.job, self.busy = job, True
        self._writer.send("started")

    @property
    def handles(self) -> list[Any]:
        return [self._reader]

    def poll(self) -> Ending:
        self._reader.recv()
        ending = trial_process._run(self.job, self)  # type: ignore[arg-type]
        self.busy = False
        return ending

    def run(self, job: Job) -> Ending:
        self.start(job)
        return self.poll()

    def send(self, epoch: Epoch) -> None:
        self._answer = self.on_epoch(epoch)

    def recv(self) -> bool:
        return self._answer

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


@pytest.fixture
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sweep, wandb_agent):
        monkeypatch.setattr(module, "TrialProcess", InlineProcess)


# packed


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrialRecord]]:
    """A sweep of three trials, two at once, one of which fails. Read-only."""
    folder = tmp_path_factory.mktemp("sweeps") / "packed"
    return folder, sweep.run(plan(), {"data": str(photos), **EXACT}, folder=folder, pack=2)


def test_a_trial_that_fails_leaves_the_others_alone(packed: tuple[Path, list[TrialRecord]]) -> None:
    folder, records = packed
    assert [record.state for record in records] == ["finished", "failed", "finished"]
    assert "loss" in records[1].reason
    assert [record.values["lr"] for record in records] == LRS
    assert not (folder / records[1].folder / "result.json").exists()


@pytest.mark.parametrize("number", [0, 2])
def test_a_packed_trial_is_what_it_is_alone(
    packed: tuple[Path, list[TrialRecord]], number: int, tmp_path: Path
) -> None:
    run = packed[0] / packed[1][number].folder
    alone = fit(resolve(read_yaml(run / "config.yaml")), run_dir=tmp_path / "alone").run_dir
    for name in ("last.pt", "best.pt"):
        here, there = (checkpoint.load(folder / name)["model"] for folder in (run, alone))
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_what_a_sweep_leaves(packed: tuple[Path, list[TrialRecord]]) -> None:
    folder, records = packed
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [f"trial-000{i}" for i in range(3)]
    assert [float(row["lr"]) for row in rows] == LRS
    assert float(rows[2]["val/accuracy"]) == records[2].value
    best = max((record for record in records if record.value is not None), key=lambda record: record.value or 0)
    assert (folder / "config.yaml").read_bytes() == (folder / best.folder / "config.yaml").read_bytes()
    assert (folder / "parallel_coordinates.png").read_bytes().startswith(b"\x89PNG")
    values = read_yaml(folder / "config.yaml")
    assert (values["threads"], values["loader"], values["wandb"]) == (1, "shared", "disabled")


@pytest.mark.usefixtures("_inline")
def test_seeds_repeat_each_point(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(yaml.safe_dump({"method": "bayes", "parameters": {"lr": {"values": [0.001, 0.01]}}}))
    options = ["--image-size=32", "--filters=8", "--epochs=1", "--no-report", "--seed=5"]
    status = cli.main(["sweep", str(photos), "--config=s.yaml", "--trials=9", "--seeds=2", *options])
    assert not status
    output = capsys.readouterr().out
    assert "4 trials: 4 finished; best trial-000" in output
    assert "95% interval" in output
    configs = [read_yaml(Path("sweeps/s", f"trial-000{i}", "config.yaml")) for i in range(4)]
    assert [config["seed"] for config in configs] == [5, 6, 5, 6]
    assert configs[0]["lr"] == configs[1]["lr"] != configs[2]["lr"] == configs[3]["lr"]
    with Path("sweeps/s/sweep.csv").open(newline="") as file:
        values = {row["trial"]: float(row["val/accuracy"]) for row in csv.DictReader(file)}
    with Path("sweeps/s/points.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    assert {row["trial"] for row in points} == {"trial-0000", "trial-0002"}
    for row in points:
        first = int(row["trial"][-1])
        mean = (values[f"trial-000{first}"] + values[f"trial-000{first + 1}"]) / 2
        assert float(row["mean val/accuracy"]) == pytest.approx(mean)
        assert float(row["low"]) <= mean <= float(row["high"])
    status = cli.main(["sweep", str(photos), "--config=s.yaml", "--trials=9", "--seeds=3", *options])
    assert status == 2
    assert "begun with another --seeds" in capsys.readouterr().err


def test_all_of_it_is_there_already(packed: tuple[Path, list[TrialRecord]], photos: Path) -> None:
    before = (packed[0] / "trial-0002" / "last.pt").stat().st_mtime_ns
    again = sweep.run(plan(), {"data": str(photos), **EXACT}, folder=packed[0], pack=2)
    assert again == packed[1]
    assert (packed[0] / "trial-0002" / "last.pt").stat().st_mtime_ns == before


def test_trials_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "num_cores", lambda: 8)
    assert trial_process.split_cores({"device": "cpu"}, 3) == {"device": "cpu", "threads": 2, "loader": "shared"}
    assert trial_process.split_cores({"device": "cpu", "threads": 4, "loader": "mapped"}, 3)["threads"] == 4
    assert "threads" not in trial_process.split_cores({"device": "cpu"}, 1)


# a trial process


@pytest.fixture
def job(photos: Path, tmp_path: Path) -> Job:
    return Job(
        options={"data": str(photos), **SMALL, "wandb": "disabled"},
        run_dir=str(tmp_path / "trial"),
        lock=str(tmp_path / "lock"),
    )


@pytest.fixture
def process() -> Iterator[TrialProcess]:
    made = TrialProcess(lambda epoch: False, lambda text: None)
    yield made
    made.close()


@pytest.mark.long
def test_a_process_that_dies_takes_its_trial_alone(job: Job, process: TrialProcess) -> None:
    epochs = []

    def kill_once(epoch: Epoch) -> bool:
        epochs.append(epoch.row["epoch"])
        if len(epochs) == 1:
            assert process._process
            process._process.kill()
        return False

    process.on_epoch = kill_once
    assert process.run(job) == Ending(state="failed", reason="its process was ended by SIGKILL")
    assert process.run(job) == Ending(state="finished"), "in another process, from where the first one was"
    assert epochs == [1, 1, 2]
    process.on_epoch = lambda epoch: epochs.append(epoch.row["epoch"]) is None
    assert process.run(job) == Ending(state="finished"), "a run that is finished is not trained again"
    assert epochs[3:] == [1, 2]
    job = Job(options=job.options, run_dir=f"{job.run_dir}-2", lock=job.lock)
    assert process.run(job) == Ending(state="pruned")
    assert epochs[5:] == [1]


def test_a_trial_that_is_stopped_before_it_begins_has_not_failed(job: Job, process: TrialProcess) -> None:
    process.start(job)
    process.stop()
    while (ending := process.poll()) is None:
        time.sleep(0.01)
    assert ending == Ending(state="stopped")


# stopped and killed


def arguments(photos: Path) -> list[str]:
    """Write a sweep file of three trials; return the options of the command."""
    Path("s.yaml").write_text(yaml.safe_dump({"method": "random", "name": "kills", "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-2}, "dropout": {"values": [0, 0.2]},
    }}))  # fmt: skip
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name not in ("filters", "report")
    ]
    return ["sweep", str(photos), "--config=s.yaml", "--trials=3", "--filters=8", "--no-report", *options]


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_stopped_and_resumed(signum: signal.Signals, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("sweeps/kills")
    command = [sys.executable, "-m", "fastcnn.cli", *arguments(photos)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (folder / "trial-0001" / "config.yaml").exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.02)
    process.send_signal(signum)
    output = process.communicate()[0].decode()
    if signum == signal.SIGINT:
        assert process.returncode == 130, output
        assert "run the same command to resume" in output
        assert (folder / "sweep.csv").exists()

    status = cli.main(arguments(photos))
    assert not status
    output = capsys.readouterr().out
    assert "trial-0001 was interrupted: resuming it" in output
    assert "3 trials: 3 finished" in output
    assert sorted(path.name for path in folder.glob("trial-*")) == [f"trial-000{i}" for i in range(3)]
    for run in folder.glob("trial-*"):
        with (run / "metrics.csv").open(newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


# what is refused


@pytest.mark.usefixtures("_inline")
def test_a_sweep_whose_first_trials_fail_alike_ends(photos: Path) -> None:
    options = {"data": str(photos), **SMALL, "batch_size": 1000}
    with pytest.raises(FastCNNError, match=r"the first 3 trials failed alike: .*do not fill one batch"):
        sweep.run(plan(), options)
    assert len(list(Path("sweeps/small").glob("trial-*"))) == 0, "a trial that did nothing leaves no folder"


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize("num_trials", [1, 2])
def test_a_sweep_of_which_no_trial_finished_has_failed(
    num_trials: int, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.yaml").write_text(yaml.safe_dump({"method": "random", "parameters": {"lr": {"values": [0.1, 0.2]}}}))
    command = ["sweep", str(photos), "--config=s.yaml", f"--trials={num_trials}", "--batch-size=1000", "--epochs=1"]
    for _ in range(2):  # again: all of them have begun already
        status = cli.main([*command, "--image-size=32", "--filters=8"])
        assert status == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"no trial finished: {num_trials} of {num_trials} trials failed with: " in last
        assert "do not fill one batch" in last
    assert Path("sweeps/s/sweep.csv").read_text().count("failed") == num_trials


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "which photos"),
        ({"data": "nowhere"}, DataError, "no folder nowhere"),
    ],
)
def test_photos_are_needed(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep.run(plan(), options)


def test_a_number_of_trials_is_needed(photos: Path) -> None:
    endless = plan(method="random")
    with pytest.raises(UsageError, match="how many trials"):
        sweep.run(endless, {"data": str(photos)})


def test_packing_is_for_cpus(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "pick_device", lambda name: torch.device("cuda", 0))
    with pytest.raises(UsageError, match="--pack is for CPUs"):
        sweep.run(plan(), {"data": str(photos)}, pack=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "--sweep-id", "abc"], "--sweep-id works only with --wandb"),
        (["photos", "--wandb", "--pack", "2"], "leave out --storage, --pack and --seeds"),
        (["photos", "--config", "none.yaml"], "cannot read the configuration none.yaml"),
        (["photos", "--trails", "3"], "did you mean '--trials'"),
        (["photos", "--lr", "-1"], "expected a number above 0"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["sweep", *arguments])
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_shipped_file_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["sweep", "--print-file"])
    assert status == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"] == "bayes"


def test_options_are_the_files_commands_then_the_given_ones(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}
    monkeypatch.setattr(sweep, "run", lambda plan, options, **more: taken.update(plan=plan, options=options))
    cli.main(["sweep", str(photos), "--trials=2", "--lr=0.01", "--image-size", "64", "--recipe", "strong"])
    assert taken["options"]["data"] == str(photos)
    assert resolve(taken["options"]).epochs == 10, "the file's command says so, after the recipe"
    assert (taken["options"]["lr"], taken["options"]["image_size"]) == ("0.01", "64")
    assert "lr" not in taken["plan"].parameters
    assert "dropout" in taken["plan"].parameters
