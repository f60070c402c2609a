"""W&B tracker: talks to wandb in a thread of its own, through a queue, so that a run never waits and never asks.

A resumed run goes on in its W&B run, whose id, project and entity are in `wandb/run.json` in the run folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import secrets
import shlex
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastcnn.config import Wandb
from fastcnn.errors import FastCNNError, first_line, warn
from fastcnn.reporting.outcome import Outcome
from fastcnn.runs import wandb_process
from fastcnn.runs.wandb_server import answers, logged_in
from fastcnn.storage import files
from fastcnn.storage.paths import user_cache_folder
from fastcnn.system.text import as_utf8, texts_as_utf8

if TYPE_CHECKING:
    import wandb

    from fastcnn.runs.trackers import Run

PROJECT = "fastcnn"
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
    the rest is still recorded in the run folder. Epochs that a resumed run already has are logged where no W&B run has
    them.
    """

    def __init__(self, run: Run) -> None:
        self.run_dir, self.console, self.config = run.run_dir, run.console, dict(run.config)
        self.mode = asked_mode(self.config["wandb"])
        self.begun = _read_begun(run.run_dir)
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
        if not self.begun:
            for row in run.rows:
                self.epoch(row)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Log the figures of an epoch under their own names."""
        figures = dict(row)
        self._put(lambda run: run.log(figures))
        if self.url and not self._announced:
            self._announced = True
            self.console.line(f"W&B: {self.url}")

    def finish(self, outcome: Outcome) -> None:
        """Log the outcome of a finished run."""

        def log(run: wandb.Run) -> None:
            with wandb_process.uploads_in(_as_wandb_reads(self.run_dir) / "wandb"):
                _log_outcome(run, outcome)

        self._put(log)

    def close(self, exit_code: int) -> dict[str, Any]:
        """Wait at most `WAIT_SECONDS` for the rest to be written; return the entry for result.json."""
        self._put(lambda run: run.finish(exit_code=exit_code))
        self._put(None)
        if self._thread:
            self._thread.join(WAIT_SECONDS)
            if self._thread.is_alive():
                self._note("it did not take everything in time")
        sync = self._sync_command()
        if self.problem:
            warn(f"W&B: {self.problem}" + (f"; to send what was recorded: {sync}" if sync else ""))
        elif sync:
            part = "an earlier part was recorded offline" if self._sent else "recorded offline"
            self.console.line(f"W&B: {part}; to send it: {sync}")
        return {"wandb": {"mode": self.mode, "id": self.id, "url": self.url, "sync": sync}}

    def _put(self, job: Callable[[wandb.Run], None] | None) -> None:
        if self._thread:
            self._jobs.put(job)

    def _sync_command(self) -> str | None:
        """Return the command that sends all parts of this run that were not sent, in their order; None if all were."""
        if not self.folder:
            return None
        parts = [
            part
            for part in sorted(self.folder.parent.glob(f"offline-run-*-{self.id}"))
            if part != self.folder and not (part / f"run-{self.id}.wandb.synced").exists()
        ]
        parts += [] if self._sent else [self.folder]
        options = ["--include-online"] if self.mode == "online" and not self._sent else []
        return shlex.join(["wandb", "sync", *options, *map(_relative, parts)]) if parts else None

    def _note(self, problem: str) -> None:
        self.problem = self.problem or problem  # the first one causes those that follow

    def _work(self) -> None:
        """Start the wandb run and carry out the queued jobs; this is the thread's function."""
        # Pending uploads stay in the run folder, and an offline run reports nothing.
        try:
            root = _as_wandb_reads(self.run_dir)
        except OSError as error:
            return self._note(f"its files need a path in UTF-8, and no link can be made: {error}")
        with wandb_process.used(root / "wandb") as ours:
            try:
                run = self._begin(ours, root)
                while run and (job := self._jobs.get()):
                    try:
                        job(run)
                    except Exception as error:
                        self._note(first_line(error))
                self._sent = self.mode == "online" and not self.problem
            except BaseException as error:  # also of a library that calls sys.exit
                self._note(first_line(error))

    def _begin(self, ours: bool, root: Path) -> wandb.Run | None:
        """Start the wandb run, or its next part, offline if online is impossible; None if W&B is disabled."""
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True) if ours else None).settings
        self.mode = self._possible_mode(settings)
        if self.mode == "disabled":
            return None
        root = _as_wandb_reads(Path(settings.root_dir)) if "WANDB_DIR" in os.environ else root
        run_id = settings.run_id or self.begun.get("id") or secrets.token_hex(4)
        if self.mode == "online":
            before = set(_online_parts(root, run_id))
            try:
                # Sending a run again that was begun so replaces its figures, and appends them to one that was resumed.
                run = self._init(settings, root, run_id, "allow" if self.begun else None)
            except Exception as error:
                for rest in set(_online_parts(root, run_id)) - before:
                    shutil.rmtree(rest, ignore_errors=True)
                if not self.begun:
                    run_id = secrets.token_hex(4)
                elif not wandb_process.end_if_alone():  # it takes no second run of that id
                    raise FastCNNError(f"{first_line(error)}, so this part of the run was not recorded") from error
                self._note(f"{first_line(error)}, so the run was recorded offline")
                self.mode = "offline"
        if self.mode == "offline":
            run = self._init(settings, root, run_id, "allow")
        self.id, self.folder = run.id, Path(run.settings.sync_dir)
        begun = {"id": run.id, "project": run.project, "entity": run.entity or self.begun.get("entity", "")}
        files.write(_begun_file(self.run_dir), json.dumps(begun) + "\n")
        if self.mode == "online":
            self.url = run.url
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return run

    def _possible_mode(self, settings: wandb.Settings) -> str:
        """Return online, offline or disabled; note why it is not online where that was asked for."""
        wanted, base_url = self.mode, settings.base_url
        if wanted == "auto":
            wanted = settings.mode if settings.mode in ("offline", "disabled") else "auto"  # by `wandb offline`
        if wanted not in ("auto", "online"):
            return wanted
        if not logged_in(settings):
            if wanted == "online":
                self._note("not logged in (wandb login), so the run was recorded offline")
        elif not answers(base_url):
            self._note(f"{base_url} does not answer, so the run was recorded offline")
        else:
            return "online"
        return "offline"

    def _init(self, settings: wandb.Settings, root: Path, run_id: str, resume: Literal["allow"] | None) -> wandb.Run:
        import wandb

        return wandb.init(
            project=self.begun.get("project") or self.config["wandb_project"] or settings.project or PROJECT,
            entity=self.begun.get("entity") or settings.entity,
            name=settings.run_name or as_utf8(self.run_dir.name),
            id=run_id,
            resume=settings.resume or resume,
            dir=str(root),
            config=texts_as_utf8(self.config),
            mode="online" if self.mode == "online" else "offline",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",  # the run's own output is left as it is
                init_timeout=min(settings.init_timeout, INIT_SECONDS),
                finish_timeout=SEND_SECONDS,
                finish_timeout_raises=True,
            ),
        )


def _begun_file(run_dir: Path) -> Path:
    return run_dir / "wandb" / "run.json"


def _read_begun(run_dir: Path) -> dict[str, str]:
    """Return id, project and entity of the W&B run that an earlier part of this run began; {} if none did."""
    begun = files.read_json(_begun_file(run_dir))
    return {name: str(begun.get(name, "")) for name in ("id", "project", "entity")} if begun else {}


def _online_parts(root: Path, run_id: str) -> list[Path]:
    return list(root.glob(f"wandb/run-*-{run_id}"))


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
        artifact.add_file(str(_as_wandb_reads(path.parent) / path.name))
        run.log_artifact(artifact)


def _as_wandb_reads(folder: Path) -> Path:
    """Return the absolute path of a folder, or where that is not UTF-8, of a link to it in the user's cache folder.

    The link is left: what was recorded offline names files by it. Raises OSError where it cannot be made.
    """
    folder = folder.resolve()
    if as_utf8(str(folder)) == str(folder):
        return folder
    link = user_cache_folder() / "wandb" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder)
    return link


def _relative(path: Path) -> str:
    """Return a path relative to the current folder, if it lies below it."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)
