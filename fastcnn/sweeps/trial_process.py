"""A place where one trial runs at a time: a process of its own, which outlives its trials and may die of one.

The process imports torch once, trains trial after trial with `fit`, and tells each epoch's figures through a pipe. What
a trial leaves is an ordinary run folder. A trial that takes its process with it has failed; the next gets a new one.
"""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, Any, Literal

from fastcnn.errors import FastCNNError, first_line

if TYPE_CHECKING:
    from fastcnn.runs.trackers import Run

State = Literal["done", "pruned", "failed", "stopped"]

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trial to run."""

    options: Mapping[str, Any]
    """Of Config: what the run folder's config.yaml will say, as far as it is given."""
    run_dir: str
    """The run folder; where it holds a run that was stopped or killed, that one goes on."""
    lock: str
    """A file that is locked while the trial runs, so that no other process goes on with it meanwhile."""
    num_parallel: int = 1
    """Trials at once, which share the cores."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to set for the trial."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial ended."""

    state: State
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The figures of an epoch, as in metrics.csv."""

    row: Row
    is_last: bool
    """Whether the run is over now anyhow."""


class Pruned(FastCNNError):
    """The trial was given up, as it does worse than others."""


class TrialProcess:
    """A process, and the job that it has.

    Args:
        on_epoch: is told each epoch's figures; returns whether to give the trial up.
        on_warning: is told what the trial warns of.
    """

    def __init__(self, on_epoch: Callable[[Epoch], bool], on_warning: Callable[[str], None]) -> None:
        self.on_epoch, self.on_warning = on_epoch, on_warning
        self.busy = False
        self._told_to_stop = False
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def start(self, job: Job) -> None:
        """Begin with a trial; `poll` until it returns an ending."""
        assert not self.busy
        if self._process is None or not self._process.is_alive():
            self._start_process()
        assert self._connection
        self.busy, self._told_to_stop = True, False
        with contextlib.suppress(OSError):  # died just now; `poll` finds out
            self._connection.send(job)

    @property
    def handles(self) -> list[Any]:
        """What `multiprocessing.connection.wait` is to wait for while the slot is busy."""
        assert self._connection
        assert self._process
        return [self._connection, self._process.sentinel]

    def poll(self) -> Ending | None:
        """Handle what the process has sent; return the trial's ending once it has ended."""
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
        """Run a trial to its end. What is raised meanwhile, by a signal or another thread, stops it."""
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
        """Tell the trial to stop, after saving where it is."""
        if self.busy and self._process and self._process.is_alive():
            self._told_to_stop = True
            self._process.terminate()

    def close(self) -> None:
        """End the process, and first its trial."""
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
    """Be the process: run the jobs that come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between trials; a trial has its own answer to it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = str(message)
        if text not in said:  # of every trial once more
            said.add(text)
            connection.send(text)

    warnings.showwarning = show
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
    os._exit(1)  # whoever goes on with the sweep goes on with this trial


def _run(job: Job, connection: Connection) -> Ending:
    import filelock

    from fastcnn.runs.failures import RunInterrupted

    before = dict(os.environ)
    os.environ.update(job.environment)
    try:
        with filelock.FileLock(job.lock):  # its last process may have a moment to live
            _train(job, connection)
        return Ending(state="done")
    except Pruned:
        return Ending(state="pruned")
    except (RunInterrupted, KeyboardInterrupt):
        return Ending(state="stopped")
    except FastCNNError as error:
        return Ending(state="failed", reason=str(error))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return Ending(state="failed", reason=f"{type(error).__name__}: {first_line(error)}")
    finally:
        os.environ.clear()
        os.environ.update(before)


def _train(job: Job, connection: Connection) -> None:
    from fastcnn.config import load
    from fastcnn.runs.fit import fit
    from fastcnn.runs.resume import is_finished, resumed_config
    from fastcnn.storage import checkpoint
    from fastcnn.storage import run_folder as runs

    folder = Path(job.run_dir)

    def reporter(run: Run) -> Reporter:
        return Reporter(connection, run)

    if is_finished(folder):  # and killed before it could say so
        rows = checkpoint.load(folder / "last.pt")["rows"]
        for row in rows:
            _ask(connection, row, is_last=True)
    elif (folder / runs.CONFIG).is_file():
        fit(resumed_config(folder, {}), resume=folder, trackers=[reporter])
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fit(load.resolve(split_cores(job.options, job.num_parallel)), run_dir=folder, trackers=[reporter])


class Reporter:
    """A tracker that tells the figures through the pipe, and ends the run when the answer is to give it up."""

    def __init__(self, connection: Connection, run: Run) -> None:
        self.connection, self.num_epochs = connection, run.num_epochs
        for row in run.rows:  # what a killed process may not have told
            _ask(connection, row, is_last=True)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Tell the figures of an epoch."""
        is_last = row["epoch"] >= self.num_epochs
        if _ask(self.connection, row, is_last=is_last) and not is_last:
            raise Pruned(f"given up after epoch {row['epoch']:g}")

    def finish(self, outcome: object) -> None:
        """Take what the run leaves."""

    def close(self, exit_code: int) -> dict[str, Any]:
        """Say nothing more."""
        return {}


def _ask(connection: Connection, row: Mapping[str, float], *, is_last: bool) -> bool:
    connection.send(Epoch(row=dict(row), is_last=is_last))
    return bool(connection.recv())


def split_cores(options: Mapping[str, Any], num_parallel: int) -> dict[str, Any]:
    """Return a trial's options with its share of a CPU: threads where several run at once, photos in memory once."""
    from fastcnn.system.device import num_cores, pick_device

    shared = dict(options)
    if pick_device(str(shared.get("device", "auto"))).type == "cpu":
        if num_parallel > 1 and shared.get("threads") is None:
            shared["threads"] = max(1, num_cores() // num_parallel)
        if shared.get("loader", "auto") == "auto":
            shared["loader"] = "shared"
    return shared
