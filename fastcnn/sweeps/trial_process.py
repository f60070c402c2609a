"""`TrialProcess`: a process that trains a sweep's trials, one at a time.

The process imports torch once, trains trial after trial with `fit`, and sends the metrics of each epoch through a pipe.
Each trial leaves an ordinary run folder. If the process dies, its trial has failed and the next one gets a new process.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

from fastcnn.errors import FastCNNError, first_line
from fastcnn.runs.trackers import Run, Tracker
from fastcnn.storage.locks import locked
from fastcnn.system import quick_start


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trial to train."""

    options: Mapping[str, Any]
    """Fields of Config that are given; the run folder's config.yaml completes them."""
    run_dir: str
    """The run folder; an unfinished run in it is resumed."""
    lock: str
    """File that is locked while the trial runs, so that no other process resumes it meanwhile."""
    num_parallel: int = 1
    """Trials at once, which share the cores."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the trial."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial ended."""

    state: Literal["finished", "pruned", "failed", "stopped"]
    """A stopped one is resumed by the next sweep."""
    reason: str = ""
    """Why it failed, or was stopped other than by a signal."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Metrics of an epoch, as in metrics.csv."""

    row: dict[str, float]
    is_last: bool


class Pruned(FastCNNError):
    """The trial was stopped early, as others did better."""


class TrialProcess:
    """A process, and the job that it has.

    Args:
        on_epoch: receives each epoch's metrics; returns whether to prune the trial.
        on_warning: receives each warning of the trial.
    """

    def __init__(self, on_epoch: Callable[[Epoch], bool], on_warning: Callable[[str], None]) -> None:
        self.on_epoch, self.on_warning = on_epoch, on_warning
        self.busy = False
        self._told_to_stop = False
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def start(self, job: Job) -> None:
        """Start a trial; then call `poll` until it returns an ending."""
        assert not self.busy
        if self._process is None or not self._process.is_alive():
            self._start_process()
        assert self._connection
        self.busy, self._told_to_stop = True, False
        with contextlib.suppress(OSError):  # the process died just now; `poll` finds out
            self._connection.send(job)

    @property
    def handles(self) -> list[Any]:
        """Handles for `multiprocessing.connection.wait` while the process is busy."""
        assert self._connection
        assert self._process
        return [self._connection, self._process.sentinel]

    def poll(self) -> Ending | None:
        """Handle the messages of the process; return the trial's ending once it has ended."""
        assert self._connection
        assert self._process
        try:
            while self._connection.poll():
                message = self._connection.recv()
                if isinstance(message, Epoch):
                    self._connection.send(self.on_epoch(message))
                elif isinstance(message, str):
                    self.on_warning(message)
                else:
                    self.busy = False
                    return message  # type: ignore[no-any-return]
            if self._process.is_alive():
                return None
        except (EOFError, OSError):
            pass
        self._process.join()
        code = self._process.exitcode or 0
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._forget()
        if self._told_to_stop:  # before it had begun
            return Ending(state="stopped")
        return Ending(state="failed", reason=f"its process was ended {ended}")

    def run(self, job: Job) -> Ending:
        """Run a trial to its end. An exception raised meanwhile, by a signal or another thread, stops it."""
        self.start(job)
        try:
            while True:
                wait(self.handles, timeout=1)
                ending = self.poll()
                if ending:
                    return ending
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Tell the trial to save its state and stop."""
        if self.busy and self._process and self._process.is_alive():
            self._told_to_stop = True
            self._process.terminate()

    def close(self) -> None:
        """Stop the trial, then end the process."""
        if self._process is None:
            return
        self.stop()
        assert self._connection
        self._connection.close()  # a process without a job sees the end of the pipe
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._forget()

    def _start_process(self) -> None:
        self._forget()
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks and, on a GPU, a context
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), name="fastcnn-trial")
        self._process.start()
        theirs.close()

    def _forget(self) -> None:
        self.busy = False
        if self._connection:
            self._connection.close()
        if self._process and not self._process.is_alive():
            self._process.close()
        self._connection = self._process = None


def work(connection: Connection) -> None:
    """Run, in the trial process, the jobs that come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between trials; `fit` handles both signals during one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # during a trial, too: the sweep gets it as well, and stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sent: set[str] = set()

    def send_once(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = str(message)
        if text not in sent:  # every trial warns again
            sent.add(text)
            connection.send(text)

    warnings.showwarning = send_once
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        ending = _run(job, connection)
        gc.collect()
        try:
            connection.send(ending)
        except OSError:
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)  # whoever resumes the sweep resumes this trial


def _run(job: Job, connection: Connection) -> Ending:
    from fastcnn.runs.failures import RunInterrupted

    before = dict(os.environ)
    os.environ.update(job.environment)
    try:
        with locked(Path(job.lock), lambda: None):  # waits, as the trial's previous process may not be gone yet
            _train(job, connection)
        return Ending(state="finished")
    except Pruned:
        return Ending(state="pruned")
    except (RunInterrupted, KeyboardInterrupt):
        return Ending(state="stopped")
    except FastCNNError as error:
        return Ending(state="stopped" if _is_disk_full(error) else "failed", reason=str(error))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return Ending(state="failed", reason=f"{type(error).__name__}: {first_line(error)}")
    finally:
        os.environ.clear()
        os.environ.update(before)


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error comes of a disk, or a quota, without room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _train(job: Job, connection: Connection) -> None:
    from fastcnn.config import resolve

    with quick_start.importing():
        from fastcnn.runs.fit import fit
    from fastcnn.runs.resume import is_finished, resumed_config
    from fastcnn.storage import checkpoint, run_folder

    folder = Path(job.run_dir)

    def tracker(run: Run) -> PipeTracker:
        return PipeTracker(connection, run)

    if is_finished(folder):  # and its process was killed before it could say so
        for row in checkpoint.load(folder / "last.pt")["rows"]:
            _should_prune(connection, row, is_last=True)
    elif (folder / run_folder.CONFIG).is_file():
        fit(resumed_config(folder, {}), resume=folder, trackers=[tracker])
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fit(resolve(split_cores(job.options, job.num_parallel)), run_dir=folder, trackers=[tracker])


class PipeTracker(Tracker):
    """A tracker that sends the metrics through the pipe, and ends the run when the answer is to prune it."""

    def __init__(self, connection: Connection, run: Run) -> None:
        self.connection, self.num_epochs = connection, run.num_epochs
        for row in run.rows:  # a killed process may not have sent them
            _should_prune(connection, row, is_last=True)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Send the metrics of an epoch. Raises Pruned where the trial is to end."""
        is_last = row["epoch"] >= self.num_epochs
        if _should_prune(self.connection, row, is_last=is_last) and not is_last:
            raise Pruned(f"pruned after epoch {row['epoch']:g}")

    def finish(self, outcome: object) -> None:
        """Do nothing more with a finished run."""


def _should_prune(connection: Connection, row: Mapping[str, float], *, is_last: bool) -> bool:
    connection.send(Epoch(row=dict(row), is_last=is_last))
    return bool(connection.recv())


def split_cores(options: Mapping[str, Any], num_parallel: int) -> dict[str, Any]:
    """Return a trial's options for a CPU: its part of the threads where several run at once, photos in memory once."""
    from fastcnn.system.device import num_cores, pick_device

    shared = dict(options)
    if pick_device(str(shared.get("device", "auto"))).type == "cpu":
        if num_parallel > 1 and shared.get("threads") is None:
            shared["threads"] = max(1, num_cores() // num_parallel)
        if shared.get("loader", "auto") == "auto":
            shared["loader"] = "shared"
    return shared
