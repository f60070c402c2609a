"""W&B tracker: talks to wandb in a thread of its own, through a queue, so that a run never waits and never asks."""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import secrets
import shlex
import shutil
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from fastcnn.config import Wandb
from fastcnn.errors import first_line, warn
from fastcnn.reporting.outcome import Outcome
from fastcnn.system.console import Console
from fastcnn.system.text import as_utf8, texts_as_utf8

if TYPE_CHECKING:
    import wandb

PROJECT = "fastcnn"
PROBE_SECONDS = 5.0  # for a server to answer at all
INIT_SECONDS = 20.0  # for it to take the run
SEND_SECONDS = 20.0  # for wandb to send the rest when the run ends
WAIT_SECONDS = 30.0  # for all of that, at the end of a run that was shorter


def asked_mode(option: str) -> str:
    """Return the mode from `--wandb`, or if that is auto, from WANDB_MODE."""
    value = os.environ.get("WANDB_MODE", "")
    value = {"dryrun": "offline", "run": "online", "shared": "online"}.get(value, value)
    return value if option == "auto" and value in get_args(Wandb) else option


class WandbTracker:
    """Records a run in W&B: configuration, figures of every epoch, confusion matrix, samples, exported models.

    wandb is imported and called in a daemon thread only. Its first failure becomes one warning at the end of the run;
    the rest is still recorded in the run folder.
    """

    def __init__(self, run_dir: Path, console: Console, config: Mapping[str, Any]) -> None:
        self.run_dir, self.console, self.config = run_dir, console, dict(config)
        self.mode = asked_mode(self.config["wandb"])
        self.id: str | None = None
        self.url: str | None = None
        self.folder: Path | None = None
        self.problem = ""
        self._sent = False
        self._announced = False
        self._jobs: queue.SimpleQueue[Callable[[wandb.Run], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self.mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="fastcnn-wandb", daemon=True)
            self._thread.start()

    def epoch(self, row: Mapping[str, float]) -> None:
        """Log the figures of an epoch under their own names."""
        figures = dict(row)
        self._put(lambda run: run.log(figures))
        if self.url and not self._announced:
            self._announced = True
            self.console.line(f"W&B: {self.url}")

    def finish(self, outcome: Outcome) -> None:
        """Log the outcome of a finished run."""
        self._put(lambda run: _log_outcome(run, outcome))

    def close(self, exit_code: int) -> dict[str, Any]:
        """Wait at most `WAIT_SECONDS` for the rest to be written; return the entry for result.json."""
        self._put(lambda run: run.finish(exit_code=exit_code))
        self._put(None)
        if self._thread:
            self._thread.join(WAIT_SECONDS)
            if self._thread.is_alive():
                self._note("it did not take everything in time")
        sync = None
        if self.folder and not self._sent:
            sync = f"wandb sync {shlex.quote(_relative(self.folder))}"
        if self.problem:
            warn(f"W&B: {self.problem}" + (f"; to send what was recorded: {sync}" if sync else ""))
        elif sync:
            self.console.line(f"W&B: recorded offline; to send it: {sync}")
        return {"wandb": {"mode": self.mode, "id": self.id, "url": self.url, "sync": sync}}

    def _put(self, job: Callable[[wandb.Run], None] | None) -> None:
        if self._thread:
            self._jobs.put(job)

    def _note(self, problem: str) -> None:
        self.problem = self.problem or problem  # the first one causes those that follow

    def _work(self) -> None:
        """Start the wandb run and carry out the queued jobs; this is the thread's function."""
        ours = "WANDB_SERVICE" not in os.environ  # else another part of the process uses W&B
        # Pending uploads stay in the run folder, and an offline run reports nothing.
        folder = str((self.run_dir / "wandb").resolve())
        with _environment(WANDB_DATA_DIR=folder, WANDB_ERROR_REPORTING="false"):
            try:
                run = self._begin(ours)
                while run and (job := self._jobs.get()):
                    try:
                        job(run)
                    except Exception as error:
                        self._note(first_line(error))
                self._sent = self.mode == "online" and not self.problem
            except BaseException as error:  # also of a library that calls sys.exit
                self._note(first_line(error))
            finally:
                if ours:
                    with contextlib.suppress(BaseException):
                        _teardown()

    def _begin(self, ours: bool) -> wandb.Run | None:
        """Start a wandb run, offline if online is impossible; None if W&B is disabled."""
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True) if ours else None).settings
        base_url = settings.base_url
        wanted, self.mode = self.mode, "offline"
        if wanted == "auto":
            wanted = settings.mode if settings.mode in ("offline", "disabled") else "auto"  # by `wandb offline`
        if wanted == "disabled":
            self.mode = "disabled"
            return None
        if wanted in ("auto", "online"):
            if not logged_in(settings):
                if wanted == "online":
                    self._note("not logged in (wandb login), so the run was recorded offline")
            elif not _answers(base_url):
                self._note(f"{base_url} does not answer, so the run was recorded offline")
            else:
                self.mode = "online"
        root = settings.root_dir if "WANDB_DIR" in os.environ else str(self.run_dir)

        def init(mode: str, run_id: str | None) -> wandb.Run:
            return wandb.init(
                project=self.config["wandb_project"] or settings.project or PROJECT,
                name=settings.run_name or as_utf8(self.run_dir.name),
                id=run_id,
                dir=root,
                config=texts_as_utf8(self.config),
                mode="online" if mode == "online" else "offline",
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    console="off",  # the run's own output is left as it is
                    init_timeout=min(settings.init_timeout, INIT_SECONDS),
                    finish_timeout=SEND_SECONDS,
                    finish_timeout_raises=True,
                ),
            )

        if self.mode == "online":
            run_id = settings.run_id or secrets.token_hex(4)
            try:
                run = init("online", run_id)
            except Exception as error:
                self._note(f"{first_line(error)}, so the run was recorded offline")
                for rest in Path(root, "wandb").glob(f"run-*-{run_id}"):
                    shutil.rmtree(rest, ignore_errors=True)
                self.mode = "offline"
        if self.mode == "offline":
            run = init("offline", None)
        self.id, self.folder = run.id, Path(run.settings.sync_dir)
        if self.mode == "online":
            self.url = run.url
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return run


def _log_outcome(run: wandb.Run, outcome: Outcome) -> None:
    import wandb

    run.summary.update(texts_as_utf8(dict(outcome.summary)))
    logged: dict[str, Any] = {}
    if outcome.confusion is not None:
        counts = [
            [label, predicted, int(outcome.confusion[i, j])]
            for i, label in enumerate(map(as_utf8, outcome.classes))
            for j, predicted in enumerate(map(as_utf8, outcome.classes))
        ]
        # As wandb.plot.confusion_matrix draws it, which would need every single prediction.
        columns = ("Actual", "Predicted", "nPredictions")
        logged["confusion_matrix"] = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=list(columns), data=counts),
            {column: column for column in columns},
            {"title": "Confusion matrix"},
        )
    if outcome.samples:
        texts = [map(as_utf8, (sample.path, sample.label, sample.predicted)) for sample in outcome.samples]
        logged["samples"] = wandb.Table(
            columns=["image", "path", "label", "predicted", "probability"],
            data=[[wandb.Image(s.image), *text, s.probability] for s, text in zip(outcome.samples, texts, strict=True)],
        )
    if logged:
        run.log(logged)
    for path in outcome.exported:
        artifact = wandb.Artifact(f"model-{run.id}-{path.suffix[1:]}", type="model", metadata=dict(outcome.summary))
        artifact.add_file(str(path))
        run.log_artifact(artifact)


def _teardown() -> None:
    import wandb

    wandb.teardown()  # ends wandb's own process, so that ours does not wait for it on exit


def logged_in(settings: Any) -> bool:
    """Return whether wandb's settings hold a key or token for its server."""
    return bool(settings.api_key or settings.identity_token_file or in_netrc(settings.base_url))


def in_netrc(base_url: str) -> bool:
    """Return whether `wandb login` has stored a key for the server."""
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(Path(place).expanduser()).authenticators(urlsplit(base_url).netloc):
                return True
    return False


def _answers(base_url: str) -> bool:
    """Return whether a server answers; wandb itself would take half a minute to give up."""
    try:
        urllib.request.urlopen(base_url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # wandb may know another certificate
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set those environment variables that are unset; unset them afterwards."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _relative(path: Path) -> str:
    """Return a path relative to the current folder, if it lies below it."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)
