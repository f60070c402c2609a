"""Ways in which a sweep ends: exit code, last line and sweep.csv of each."""

from __future__ import annotations

import csv
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from fastcnn.cli import app as cli
from fastcnn.errors import FastCNNError
from fastcnn.runs.failures import explained
from fastcnn.storage import files
from fastcnn.sweeps import summary, sweep, trial_process
from fastcnn.sweeps.study import Study
from fastcnn.sweeps.sweep_file import METRICS
from fastcnn.sweeps.trial_process import Ending, Epoch, Job
from tests.runs.test_out_of_room import fill, small_disk

pytest.importorskip("optuna")
__all__ = ["small_disk"]

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
KILLED = "its process was ended by SIGKILL"


class Scripted:
    """Ends trials as a script says, in place of a TrialProcess."""

    script: ClassVar[list[object]] = []

    def __init__(self, on_epoch: Callable[[Epoch], bool], on_warning: Callable[[str], None]) -> None:
        self.on_epoch, self.busy, self.stopped = on_epoch, False, False
        self._reader, self._writer = Pipe()

    def start(self, job: Job) -> None:
        self.job, self.busy = job, True
        self._writer.send("there is something to poll")

    @property
    def handles(self) -> list[Any]:
        return [self._reader]

    def poll(self) -> Ending | None:
        if self.stopped:
            self.busy = False
            return Ending(state="stopped")
        event = self.script.pop(0)
        if isinstance(event, signal.Signals):
            os.kill(os.getpid(), event)
            return None
        self.busy = False
        if isinstance(event, float):
            row = {**dict.fromkeys(METRICS, event), "epoch": 1.0}
            self.on_epoch(Epoch(row=row, is_last=True))
            return Ending(state="finished")
        if event == "pruned":
            return Ending(state="pruned")
        return Ending(state="failed", reason=str(event).format(folder=Path(self.job.run_dir).name))

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the trials of a sweep end, and what is then right."""

    script: list[object]
    """Of each trial: its metric, a signal that the sweep gets meanwhile, "pruned", or why it failed."""
    states: str
    """In sweep.csv."""
    code: int = 0
    last: str = ""
    """In the last line: of standard error where the sweep failed, else of the output."""
    text: dict[str, Any] = field(default_factory=dict)
    """Keys of the sweep file."""
    options: tuple[str, ...] = ()


LRS = {"lr": {"values": [0.1, 0.2, 0.3]}}
RANDOM: dict[str, Any] = {"method": "random", "parameters": LRS}
CASES = {
    "all finish": Case(script=[0.5, 0.7, 0.6], states="finished finished finished", last="best trial-0001"),
    "the space is used up": Case(
        script=[0.5, 0.7, 0.6], states="finished finished finished", text=RANDOM, options=("--trials=9",)
    ),
    "the cap is reached": Case(script=[0.5, 0.6], states="finished finished", text={"run_cap": 2}),
    "the target is reached": Case(
        script=[0.5, 0.9],
        states="finished finished",
        text={"metric": {"name": "val/accuracy", "goal": "maximize", "target": 0.8}},
    ),
    "one fails": Case(script=["no", 0.7, 0.6], states="failed finished finished", last="2 finished, 1 failed"),
    "one is killed": Case(script=[0.5, KILLED, 0.6], states="finished failed finished", last="1 failed"),
    "one has no number": Case(script=[0.5, math.nan, 0.6], states="finished failed finished", last="1 failed"),
    "one is pruned": Case(script=[0.5, "pruned", 0.6], states="finished pruned finished", last="1 pruned"),
    "all fail": Case(
        script=["a", "b", "b"], states="failed failed failed", code=1, last="2 of 3 trials failed with: b"
    ),
    "all fail alike": Case(
        script=["a"] * 3,
        states="failed failed failed",
        code=1,
        last="first 3 trials failed alike: a",
        text={"parameters": {"lr": {"values": [0.1, 0.2, 0.3, 0.4]}}},
    ),
    "all fail alike in their folders": Case(
        script=["no {folder}/x"] * 3,
        states="failed failed failed",
        code=1,
        last="failed alike: no its folder/x",
        text={"parameters": {"lr": {"values": [0.1, 0.2, 0.3, 0.4]}}},
    ),
    "all are killed": Case(script=[KILLED] * 3, states="failed failed failed", code=1, last=KILLED),
    "all are pruned": Case(
        script=["pruned"] * 3, states="pruned pruned pruned", code=1, last="3 of 3 trials were pruned"
    ),
    "Ctrl-C": Case(script=[0.5, signal.SIGINT], states="finished running", code=130, last="same command to resume"),
    "SIGTERM": Case(script=[signal.SIGTERM], states="running", code=143, last="same command to resume"),
    "SIGHUP": Case(script=[0.5, signal.SIGHUP], states="finished running", code=129, last="same command to resume"),
}  # fmt: skip


@pytest.fixture
def _scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trials end by a script, which is used up, and nothing is drawn, as that takes a second."""
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        Path("photos", name, "1.jpg").touch()
    Scripted.script = []
    monkeypatch.setattr(sweep, "TrialProcess", Scripted)
    monkeypatch.setattr(summary, "_draw", lambda study, folder, records: None)
    yield
    assert not Scripted.script


def run(capsys: pytest.CaptureFixture[str], text: dict[str, Any], *options: str) -> tuple[int, str]:
    """Return exit code and last line of `fastcnn sweep`."""
    Path("s.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": LRS, **text}))
    status = cli.main(["sweep", "photos", "--config=s.yaml", *options])
    code, (out, err) = status, capsys.readouterr()
    assert "Traceback" not in err
    return code, ((err if code else out).splitlines() or [""])[-1]


def states(folder: str = "sweeps/s") -> str:
    """Return the trials' states in sweep.csv, all of whose rows are whole."""
    with Path(folder, "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [f"trial-{i:04}" for i in range(len(rows))]
    assert all(row["lr"] and None not in row.values() for row in rows)
    assert all(bool(row["val/accuracy"]) == (row["state"] == "finished") for row in rows)
    assert all(bool(row["reason"]) == (row["state"] == "failed") for row in rows)
    return " ".join(row["state"] for row in rows)


@pytest.mark.usefixtures("_scripted")
@pytest.mark.parametrize("name", CASES)
def test_the_ending_of_a_sweep(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    Scripted.script = list(case.script)
    code, last = run(capsys, case.text, *case.options)
    assert (code, states()) == (case.code, case.states)
    assert case.last in last
    assert bool(code) == last.startswith("fastcnn: error: ")
    if "running" in case.states:
        Scripted.script = [0.5] * (3 - case.states.count("finished"))
        assert run(capsys, case.text, *case.options)[0] == 0
        assert states() == "finished finished finished"
    elif (
        len(case.states.split()) == 3 and "parameters" not in case.text
    ):  # all have begun: the same again, and nothing is run
        again = run(capsys, case.text, *case.options)
        assert (again[0], states()) == (code, case.states)


@pytest.mark.usefixtures("_scripted")
@pytest.mark.parametrize("where", ["sweep.csv", "journal", "database"])
def test_a_sweep_that_can_no_longer_write(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    calls = 0
    broken: Exception = (
        OperationalError("INSERT", None, Exception("the database is gone")) if where == "database" else FULL
    )
    owner: Any = files if where == "sweep.csv" else Study
    name = "write_csv" if where == "sweep.csv" else "tell"
    plain = getattr(owner, name)

    def breaking(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise broken
        return plain(*arguments)

    options = ["--storage=sqlite:///sweep.db"] if where == "database" else []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaking)
        Scripted.script = [0.5] if where == "sweep.csv" else [0.5, 0.6]
        code, last = run(capsys, {}, *options)
    assert code == 1
    assert ("the database is gone" if where == "database" else "cannot write some/file: No space left") in last
    assert last.endswith("mend that, then run the same command to resume")
    assert states() == ("running" if where == "sweep.csv" else "finished running")
    Scripted.script = [0.5, 0.6]
    assert run(capsys, {}, *options)[0] == 0
    assert states() == "finished finished finished"


@pytest.mark.usefixtures("_scripted")
@pytest.mark.parametrize(
    ("text", "options", "code", "last"),
    [
        ({"parameters": {"lr": {"values": []}}}, [], 2, "parameters.lr.values: expected a list of values"),
        ({"parameters": {}}, [], 2, "parameters: expected at least one"),
        (RANDOM | {"parameters": {"lr": {"min": 0.1, "max": 0.2}}}, [], 2, "how many trials?"),
        ({}, ["--dir=s.yaml/below"], 1, "cannot write s.yaml/below: Not a directory; choose another with --dir"),
        ({}, ["--storage=sqlite:////nowhere/at/all.db"], 1, "cannot use the storage"),
        ({}, ["--wandb"], 1, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_a_sweep_that_cannot_begin(
    text: dict[str, Any],
    options: list[str],
    code: int,
    last: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    wandb.teardown()  # an earlier test's settings stay in the process
    found = run(capsys, text, *options)
    assert found[0] == code
    assert last in found[1]
    assert not list(Path().glob("**/sweep.csv"))


@pytest.mark.usefixtures("_scripted")
def test_a_sweep_goes_on_with_the_same_photos_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere, too; its trials do not compare with those on others."""
    Scripted.script = [0.5]
    assert run(capsys, {}, "--trials=1")[0] == 0
    Path("photos/b/2.jpg").touch()
    code, last = run(capsys, {})
    assert (code, states()) == (2, "finished")
    assert last.startswith("fastcnn: error: sweeps/s holds another sweep, begun with other photos: give the same ")
    Path("photos/b/2.jpg").unlink()
    Path("photos").rename("moved")
    Path("photos").symlink_to("moved")
    Scripted.script = [0.6, 0.7]
    assert run(capsys, {})[0] == 0
    assert states() == "finished finished finished"


@pytest.mark.usefixtures("_scripted")
def test_plots_that_cannot_be_drawn_take_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(summary, "_draw", failing)
    Scripted.script = [0.5, 0.7, 0.6]
    said: list[str] = []
    monkeypatch.setattr(summary, "warn", said.append)
    code, last = run(capsys, {})
    assert said == ["the plots of sweeps/s cannot be drawn: no font"]
    assert (code, states()) == (0, "finished finished finished")
    assert "best trial-0001" in last


def test_a_trial_without_room_is_stopped_not_failed() -> None:
    """So that it is resumed once there is room."""
    with pytest.raises(FastCNNError) as wrapped, explained(Path("run")):
        raise FULL
    assert trial_process._is_disk_full(wrapped.value)
    assert not trial_process._is_disk_full(FastCNNError("no"))


# with real trials


SMALL = ["--epochs=2", "--image-size=32", "--filters=8", "--batch-size=16", "--no-report", "--workers=1"]


def begin(photos: Path, *options: str, wandb: str = "disabled", **environment: str) -> subprocess.Popen[str]:
    Path("s.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": {**LRS, "wandb": {"value": wandb}}}))
    line = [sys.executable, "-m", "fastcnn.cli", "sweep", str(photos), "--config=s.yaml", *SMALL, *options]
    return subprocess.Popen(
        line, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.long
def test_a_killed_sweep_leaves_a_whole_table(photos: Path) -> None:
    process = begin(photos)
    while not Path("sweeps/s/trial-0001/config.yaml").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert states() == "finished running"
    resumed = begin(photos)
    out, err = resumed.communicate()
    assert (resumed.returncode, states()) == (0, "finished finished finished"), err
    assert "3 trials: 3 finished" in out


@pytest.mark.long
def test_an_unreachable_wandb_stops_no_trial(photos: Path, tmp_path: Path) -> None:
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
    process = begin(photos, wandb="online", **unreachable)
    _, err = process.communicate()
    assert (process.returncode, states()) == (0, "finished finished finished"), err


@pytest.mark.long
def test_a_disk_that_is_full(photos: Path, small_disk: Path) -> None:
    begin(photos, "--epochs=1", "--dir=elsewhere").communicate()  # the photos are in the cache
    fill(small_disk)
    os.truncate(small_disk / "ballast", (small_disk / "ballast").stat().st_size - 100_000)
    full = begin(photos, f"--dir={small_disk / 'sweep'}", "--filters=16")
    _, err = full.communicate()
    assert full.returncode == 1
    assert "No space left" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("run the same command to resume")
    (small_disk / "ballast").unlink()
    again = begin(photos, f"--dir={small_disk / 'sweep'}", "--filters=16")
    _, err = again.communicate()
    assert (again.returncode, states(str(small_disk / "sweep"))) == (0, "finished finished finished"), err
    shutil.rmtree(small_disk / "sweep")
