"""W&B: what it was given is read back from what it wrote, by its own `wandb leet inspect`."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fastcnn import Config, fit
from fastcnn.cli import main
from fastcnn.errors import FastCNNError, FastCNNWarning
from fastcnn.export import exporters
from fastcnn.reporting.outcome import Outcome, Sample
from fastcnn.runs import trackers as tracking
from fastcnn.runs import wandb_tracker
from fastcnn.runs.trackers import COLUMNS, Run
from fastcnn.runs.wandb_tracker import WandbTracker
from fastcnn.storage import checkpoint
from fastcnn.system.console import Console

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the right form, and nobody's
SMALL = ["--epochs", "1", "--image-size", "32", "--filters", "8", "--batch-size", "16"]
TINY: dict[str, Any] = {
    "epochs": 1,
    "image_size": 32,
    "filters": (8,),
    "batch_size": 16,
    "report": False,
    "wandb": "disabled",
}
CLASSES = ("cat", "dog")
CONFUSION = np.array([[3, 1], [0, 5]])
SAMPLES = [
    Sample(path="cat/1.jpg", image=np.full((8, 8, 3), 7, np.uint8), label="cat", predicted="dog", probability=0.75),
    Sample(path="dog/2.jpg", image=np.zeros((8, 8, 3), np.uint8), label="dog", predicted="dog", probability=0.5),
]


@pytest.fixture(autouse=True)
def _logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in, and nothing is written outside the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def start(mode: str, run_dir: str = "run") -> WandbTracker:
    Path(run_dir).mkdir()
    config = {"wandb": mode, "wandb_project": None, "lr": 0.01}
    return WandbTracker(Run(run_dir=Path(run_dir), console=Console(quiet=True), num_epochs=1, config=config))


def figures(epoch: int) -> dict[str, float]:
    return {**dict.fromkeys(COLUMNS, 0.25), "epoch": epoch, "train/loss": 1 / epoch}


def read(folder: Path) -> dict[str, list[Any]]:
    """Return what wandb wrote into a run folder, by kind of record."""
    (log,) = folder.glob("wandb/*run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[Any]] = {}
    for record in map(json.loads, done.stdout.splitlines()):
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def epochs(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [record["item"] for record in found["history"] if "train/loss" in record["item"]]


def table(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"wandb/*run-*/files/media/table/{name}_*.table.json")
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.long
def test_an_offline_run_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.torchscript").write_bytes(b"model")
    before = dict(os.environ)
    tracker = start("offline")
    for epoch in (1, 2):
        tracker.epoch(figures(epoch))
    outcome = Outcome(
        summary={"val_accuracy": 0.8, "seconds": {"train": 2.5}},
        classes=CLASSES,
        confusion=CONFUSION,
        samples=SAMPLES,
        exported=[tmp_path / "model.torchscript"],
    )
    tracker.finish(outcome)
    note = tracker.close(0)["wandb"]
    assert dict(os.environ) == before

    found = read(Path("run"))
    (run,) = found["run"]
    assert (run["project"], run["display_name"]) == ("fastcnn", "run")
    assert run["config"]["update"]["lr"] == 0.01
    assert [row["epoch"] for row in epochs(found)] == [1, 2]
    assert set(COLUMNS) <= set(epochs(found)[0])
    assert epochs(found)[1]["train/loss"] == 0.5
    assert {"glob_name": "*", "step_metric": "epoch"}.items() <= found["metric"][1].items()
    summary = {key: value for record in found["summary"] for key, value in record["update"].items()}
    assert summary["val_accuracy"] == 0.8
    assert summary["seconds"] == {"train": 2.5}
    assert found["stats"][0]["item"]["memory_percent"] > 0
    assert found["exit"][0]["exit_code"] == 0

    assert table(Path("run"), "confusion_matrix_table")["data"] == [
        ["cat", "cat", 3], ["cat", "dog", 1], ["dog", "cat", 0], ["dog", "dog", 5],
    ]  # fmt: skip
    samples = table(Path("run"), "samples")
    assert samples["columns"] == ["image", "path", "label", "predicted", "probability"]
    assert [row[1:] for row in samples["data"]] == [
        ["cat/1.jpg", "cat", "dog", 0.75], ["dog/2.jpg", "dog", "dog", 0.5],
    ]  # fmt: skip
    artifacts = {artifact["type"]: artifact for artifact in found["artifact"]}
    (model,) = artifacts["model"]["manifest"]["contents"]
    assert model["path"] == "model.torchscript"
    # What is to be uploaded lies with the run.
    assert Path(model["local_path"]).read_bytes() == b"model"
    assert Path(model["local_path"]).is_relative_to(tmp_path / "run" / "wandb")
    images = [e for a in found["artifact"] for e in a["manifest"]["contents"] if e["path"].endswith(".png")]
    assert len(images) == 2

    (folder,) = Path("run/wandb").glob("offline-run-*")
    assert note == {"mode": "offline", "id": run["run_id"], "url": None, "sync": f"wandb sync {folder}"}


def test_what_a_run_does_not_have_is_left_out() -> None:
    tracker = start("offline")
    tracker.finish(Outcome(summary={}, classes=CLASSES))
    tracker.close(0)
    assert {"history", "artifact"}.isdisjoint(read(Path("run")))


def test_a_run_cut_short_is_finished_as_such(tmp_path: Path) -> None:
    config = {"wandb": "offline", "wandb_project": "mine"}
    run = Run(run_dir=tmp_path, console=Console(quiet=True), num_epochs=2, config=config)

    def cut_short() -> None:
        with tracking.opened(run) as trackers:
            for tracker in trackers:
                tracker.epoch(figures(1))
            raise FastCNNError("the loss is not a number")

    with pytest.raises(FastCNNError):
        cut_short()
    found = read(tmp_path)
    assert found["run"][0]["project"] == "mine"
    assert len(epochs(found)) == 1
    assert found["exit"][0]["exit_code"] == 1


@pytest.mark.long
@pytest.mark.usefixtures("verified_here")
def test_no_login_and_no_terminal(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status = main(["train", str(photos), *SMALL, "--export", "torchscript"])
    out, err = capfd.readouterr()
    assert (status, err) == (0, f"opening {photos}\n")
    note = result(tmp_path / "runs" / "photos")["wandb"]
    assert note["mode"] == "offline"
    assert f"W&B: recorded offline; to send it: {note['sync']}" in out
    assert "wandb: " not in out
    found = read(tmp_path / "runs" / "photos")
    assert len(epochs(found)) == 1
    config = found["run"][0]["config"]["update"]
    assert {"batch_size": 16, "export": ["torchscript"], "device": "cpu"}.items() <= config.items()
    assert config["versions"]["torch"]
    assert config["hardware"]["cores"]
    assert "model" in {artifact["type"] for artifact in found["artifact"]}


@contextlib.contextmanager
def a_terminal() -> Iterator[Callable[[], str]]:
    """Have a terminal, into which nobody types, for standard input, output and error; yield what reads it."""
    leader, terminal = os.openpty()
    before = [os.dup(number) for number in range(3)]
    streams = [(name, getattr(sys, name)) for name in ("stdin", "stdout", "stderr")]
    try:
        for number, (name, _) in enumerate(streams):
            os.dup2(terminal, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        yield lambda: os.read(leader, 100_000).decode()
    finally:
        for number, (name, stream) in enumerate(streams):
            getattr(sys, name).close()
            setattr(sys, name, stream)
            os.dup2(before[number], number)
        for file in (*before, terminal, leader):
            os.close(file)


@pytest.mark.skipif(os.name != "posix", reason="opens a POSIX terminal")
@pytest.mark.filterwarnings("default::fastcnn.errors.FastCNNWarning")
def test_a_terminal_is_never_asked(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with a_terminal() as shown:
        assert sys.stdin.isatty()
        assert sys.stderr.isatty()
        status = main(["train", str(photos), *SMALL, "--no-report", "--quiet"])
        output = shown()
    note = result(tmp_path / "runs" / "photos")["wandb"]
    assert status == 0
    assert output.splitlines() == [
        "fastcnn: warning: W&B: not logged in (wandb login), so the run was recorded offline; "
        f"to send what was recorded: {note['sync']}"
    ]
    assert note["mode"] == "offline"
    assert len(epochs(read(tmp_path / "runs" / "photos"))) == 1


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = start("auto")
    with pytest.warns(FastCNNWarning, match="http://127.0.0.1:9 does not answer, so the run was recorded offline"):
        assert tracker.close(0)["wandb"]["mode"] == "offline"


class Server(BaseHTTPRequestHandler):
    """Answers like W&B's as far as a run with figures needs it, and keeps these; hangs where `silent`."""

    silent = False
    history: dict[str, list[dict[str, Any]]]
    """By run, the lines that were logged, as W&B keeps them: those sent from an offset on replace the ones there."""

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        while self.silent:
            time.sleep(0.1)
        if not self.path.endswith(("graphql", "file_stream")):
            return self._answer({})
        asked = json.loads(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        if self.path.endswith("file_stream"):
            sent = asked.get("files", {}).get("wandb-history.jsonl")
            if sent:
                lines, start = self.history[self.path.split("/")[-2]], sent["offset"]
                lines[start : start + len(sent["content"])] = map(json.loads, sent["content"])
            return self._answer({})
        variables, data = asked["variables"], {}
        project = {"id": "cA==", "name": "fastcnn", "entity": {"id": "ZQ==", "name": "me"}}
        bucket = {"id": "Yg==", "name": variables.get("name"), "config": "{}"}
        if "upsertBucket" in asked["query"]:
            inserted = variables["name"] not in self.history
            self.history.setdefault(variables["name"], [])
            data = {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": inserted}}
        elif "RunResumeStatus" in asked["query"]:
            lines = self.history.get(variables["name"])
            counts = {"historyLineCount": len(lines or ()), "eventsLineCount": 0, "logLineCount": 0}
            tail = {"historyTail": json.dumps([json.dumps(line) for line in (lines or [])[-1:]]), "eventsTail": "[]"}
            told = {**bucket, **counts, **tail, "summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "tags": []}
            data = {"model": {**project, "bucket": None if lines is None else told}}
        elif "createRunFiles" in asked["query"]:
            url = f"http://{self.headers['Host']}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            data = {"createRunFiles": {"runID": "Yg==", "uploadHeaders": [], "files": files}}
        return self._answer({"data": data})

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """A server that somebody is logged in to."""

    class Handler(Server):
        history: ClassVar[dict[str, list[dict[str, Any]]]] = {}

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield Handler
        Handler.silent = False
        listening.shutdown()


def test_online_when_logged_in(server: type[Server]) -> None:
    tracker = start("auto")
    tracker.epoch(figures(1))
    tracker.finish(Outcome(summary={"val_accuracy": 0.8}, classes=CLASSES))
    note = tracker.close(0)["wandb"]
    assert (note["mode"], note["sync"]) == ("online", None)
    assert note["url"].endswith(f"/me/fastcnn/runs/{note['id']}")


def part(mode: str, run_dir: Path, done: int, more: int) -> dict[str, Any]:
    """Record some more epochs of a run that has some, as a resumed run does; return the entry for result.json."""
    run_dir.mkdir(exist_ok=True)
    time.sleep(1)  # wandb names a part by the second
    config = {"wandb": mode, "wandb_project": None}
    rows = [figures(epoch) for epoch in range(1, done + 1)]
    tracker = WandbTracker(Run(run_dir=run_dir, console=Console(quiet=True), num_epochs=1, config=config, rows=rows))
    for epoch in range(done + 1, done + more + 1):
        tracker.epoch(figures(epoch))
    return tracker.close(130)["wandb"]  # type: ignore[no-any-return]


def assert_one_run(server: type[Server], run_id: str, num_epochs: int) -> None:
    """One run is on the server, with each epoch once."""
    assert list(server.history) == [run_id]
    assert [line["epoch"] for line in server.history[run_id]] == list(range(1, num_epochs + 1))


@pytest.mark.skipif(os.name != "posix", reason="names are text here")
def test_two_parts_recorded_offline_are_sent_as_one_run(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder whose name is not UTF-8, and named so on the command line."""
    run_dir = tmp_path / os.fsdecode(b"caf\xe9")
    monkeypatch.setattr(sys, "argv", ["fastcnn", "train", str(run_dir)])
    first, second = part("offline", run_dir, 1, 1), part("offline", run_dir, 2, 1)
    assert sys.argv[-1] == str(run_dir)
    assert first["id"] == second["id"]
    names = [path.name for path in sorted(run_dir.glob("wandb/offline-run-*"))]
    assert [Path(word).name for word in shlex.split(second["sync"])[2:]] == names
    assert all(name.endswith(f"-{first['id']}") for name in names)
    subprocess.run([sys.executable, "-m", *shlex.split(second["sync"])], check=True, capture_output=True)
    assert_one_run(server, first["id"], 3)


@pytest.mark.long
@pytest.mark.parametrize(
    "modes", ["online online", "online offline", "offline online", "offline offline", "disabled online"]
)
def test_a_resumed_run_goes_on_in_the_same_run(modes: str, server: type[Server], tmp_path: Path) -> None:
    notes = [part(mode, tmp_path / "run", 2 * number, 2) for number, mode in enumerate(modes.split())]
    assert len({note["id"] for note in notes} - {None}) == 1
    for note in notes[-1:]:
        if note["sync"]:
            subprocess.run([sys.executable, "-m", *shlex.split(note["sync"])], check=True, capture_output=True)
    (lines,) = server.history.values()
    assert sorted(line["epoch"] for line in lines) == [1, 2, 3, 4]
    assert [part.name for part in tmp_path.glob(f"run/wandb/*run-*-{notes[-1]['id']}")]


@pytest.mark.long
def test_a_part_that_the_server_does_not_take_leaves_the_one_before(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = part("online", tmp_path / "run", 0, 2)
    before = set(tmp_path.glob("run/wandb/run-*-*"))
    monkeypatch.setattr(wandb_tracker, "INIT_SECONDS", 1)
    server.silent = True
    with pytest.warns(FastCNNWarning, match="so the run was recorded offline"):
        second = part("online", tmp_path / "run", 2, 2)
    server.silent = False
    assert (second["mode"], second["id"]) == ("offline", first["id"])
    assert before == set(tmp_path.glob("run/wandb/run-*-*"))
    subprocess.run([sys.executable, "-m", *shlex.split(second["sync"])], check=True, capture_output=True)
    assert_one_run(server, first["id"], 4)


@pytest.mark.long
def test_a_run_that_is_stopped_and_resumed_is_one_run(server: type[Server], photos: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "fastcnn.cli", "train"]
    options = [*SMALL[2:], "--epochs=500", "--patience=500", "--no-report", "--run-dir=run", "--wandb=offline"]
    begun = subprocess.Popen([*line, str(photos), *options])
    while not Path("run/wandb/run.json").exists():
        assert begun.poll() is None
        time.sleep(0.02)
    begun.send_signal(signal.SIGTERM)
    assert begun.wait() == 143
    done = len(checkpoint.load(Path("run/last.pt"))["rows"])
    subprocess.run([*line, "--resume", "run", "--epochs", str(done + 2)], check=True)
    note = result(tmp_path / "run")["wandb"]
    subprocess.run([sys.executable, "-m", *shlex.split(note["sync"])], check=True, capture_output=True)
    assert_one_run(server, note["id"], done + 2)


def test_a_server_that_falls_silent_is_not_waited_for(server: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tracker, "SEND_SECONDS", 1)
    tracker = start("online")
    tracker.epoch(figures(1))
    while not tracker.url:
        time.sleep(0.05)
    server.silent = True
    tracker.epoch(figures(2))
    with pytest.warns(FastCNNWarning, match="to send what was recorded: wandb sync --include-online run/w"):
        note = tracker.close(0)["wandb"]
    assert note["mode"] == "online"
    assert len(epochs(read(Path("run")))) == 2


@pytest.mark.long
def test_a_server_that_never_takes_the_run(server: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tracker, "INIT_SECONDS", 1)
    server.silent = True
    tracker = start("online")
    tracker.epoch(figures(1))
    with pytest.warns(FastCNNWarning, match="so the run was recorded offline"):
        assert tracker.close(0)["wandb"]["mode"] == "offline"
    assert len(epochs(read(Path("run")))) == 1


def test_a_failing_tracker_does_not_fail_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    logged = wandb.Run.log

    def log(self: object, data: dict[str, float]) -> None:
        if data["epoch"] == 2:
            raise RuntimeError("half-way")
        logged(self, data)

    monkeypatch.setattr(wandb.Run, "log", log)
    config = Config(data=str(photos), **{**TINY, "epochs": 3, "wandb": "offline"})
    with pytest.warns(FastCNNWarning, match="W&B: half-way; to send what was recorded: wandb sync"):
        run = fit(config)
    assert len(run.metrics) == 3
    assert [row["epoch"] for row in epochs(read(run.run_dir))] == [1, 3]


def test_disabled_imports_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    run = fit(Config(data=str(photos), **{**TINY, "wandb": "auto"}))
    assert not (run.run_dir / "wandb").exists()
    assert run.summary["wandb"]["mode"] == "disabled"


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        ("auto", "", "auto"),
        ("auto", "disabled", "disabled"),
        ("auto", "dryrun", "offline"),
        ("auto", "nonsense", "auto"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_wandb_mode_counts_where_no_option_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, asked: str, environment: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_tracker.asked_mode(asked) == mode


def test_an_export_that_fails_leaves_a_finished_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **options: object) -> Path:
        raise FastCNNError("the outputs differ")

    monkeypatch.setattr(exporters, "export_run", failing)
    with pytest.raises(FastCNNError, match="differ"):
        fit(Config(data=str(photos), export=("torchscript",), **TINY))
    assert result(Path("runs/photos"))["finished"] is True


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 8])
def test_runs_in_several_threads_are_recorded_whole(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None ends the process of wandb that another still needs, and each one's pending uploads lie with it."""
    monkeypatch.setattr(wandb_tracker, "WAIT_SECONDS", 300)  # on a busy machine, too
    before, turn = dict(os.environ), threading.Barrier(count)

    def one(number: int) -> dict[str, Any]:
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "model.torchscript").write_text(f"model {number}")
        tracker = start("offline", f"run-{number}")
        turn.wait()
        for epoch in range(1, 4 + 4 * number):
            tracker.epoch(figures(epoch))
        if number:
            first_is_closed.wait(60)
        exported = [tmp_path / f"{number}" / "model.torchscript"]
        tracker.finish(
            Outcome(
                summary={"number": number}, classes=CLASSES, confusion=CONFUSION, samples=SAMPLES, exported=exported
            )
        )
        note: dict[str, Any] = tracker.close(0)["wandb"]
        first_is_closed.set()
        assert not tracker.problem
        return note

    first_is_closed = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        notes = list(pool.map(one, range(count)))
    assert len({note["id"] for note in notes}) == count
    for number in range(count):
        found = read(Path(f"run-{number}"))
        assert [row["epoch"] for row in epochs(found)] == list(range(1, 4 + 4 * number))
        assert found["exit"][0]["exit_code"] == 0
        artifacts = {artifact["type"]: artifact for artifact in found["artifact"]}
        (model,) = artifacts["model"]["manifest"]["contents"]
        assert Path(model["local_path"]).read_text() == f"model {number}"
        assert Path(model["local_path"]).is_relative_to(tmp_path / f"run-{number}" / "wandb")
    assert dict(os.environ) == before
