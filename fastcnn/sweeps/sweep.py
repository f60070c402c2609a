"""`run`: trains a sweep's trials on one dataset, several at once where asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fastcnn.config import Config, option_name, require_data, resolve
from fastcnn.data import index
from fastcnn.errors import DataError, FastCNNError, UsageError, first_line, warn
from fastcnn.sweeps import summary
from fastcnn.sweeps.search_space import Sweep
from fastcnn.sweeps.study import ClaimedTrial, Study, TrialRecord
from fastcnn.sweeps.trial_process import Ending, Epoch, Job, TrialProcess
from fastcnn.system import signals
from fastcnn.system.console import Console
from fastcnn.system.text import comparable

SWEEPS = Path("sweeps")
SAME_FAILURES = 3  # a sweep ends when its first trials fail this often in a row for the same reason
# Options that may differ between the machines that share a sweep.
LOCAL = frozenset({"data", "cache_dir", "device", "loader", "memory_limit", "strict", "threads", "wandb", "workers"})

_RESUME = "run the same command to resume"


class SweepStopped(FastCNNError):
    """The sweep received SIGINT, SIGTERM or SIGHUP; the message says how to resume it."""

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped, and the running trials are saved in {folder}: {_RESUME}")
        self.exit_code = 128 + signum


def run(
    sweep: Sweep,
    options: Mapping[str, Any],
    *,
    folder: Path | None = None,
    trials: int | None = None,
    seeds: int = 1,
    storage: str | None = None,
    pack: int = 1,
    console: Console | None = None,
) -> list[TrialRecord]:
    """Run a sweep until `trials` of its trials have begun, and return the record of each.

    Each trial is an ordinary run in the sweep's folder. Beside the runs, at the end and when the sweep is stopped, are
    sweep.csv, config.yaml of the best, parallel_coordinates.png and importance.png. The same call resumes a sweep that
    was stopped or killed, and joins one that is running.

    Args:
        sweep: parameters, method and metric; see `sweep_file.read`.
        options: options of every trial, as `fastcnn.config.resolve` takes them; `data` is needed.
        folder: the sweep's folder; None is `sweeps/` with its name.
        trials: number of points to try; None is the file's run_cap, or the whole grid.
        seeds: trials of each point, with seeds from the options' on; figures are then means with their intervals.
        storage: SQLAlchemy address for Optuna, as sqlite:///sweep.db; None is a journal in the folder.
        pack: trials at once, on a CPU, each with its part of the cores.
        console: where progress is shown; None shows nothing.

    Raises UsageError for wrong options or photos that changed, DataError where they are missing, SweepStopped on a
    signal, FastCNNError where the first trials all fail for one reason, or no trial finished and none still runs.
    """
    console, folder = console or Console(quiet=True), folder or SWEEPS / sweep.name
    options = {**options, **sweep.fixed}
    base = resolve(options)
    _check_data(base.data)
    limit = _num_trials(sweep, trials)
    if pack > 1:
        _check_pack(base.device)
    options = {"wandb": "disabled", **options, "data": str(Path(base.data).resolve())}
    same = {**_definition(sweep, options, seeds), "photos": _photos(base)}
    study = Study(folder, sweep, storage=storage, seed=base.seed, seeds=seeds, definition=same)
    begun = len(study.records())
    console.line(
        f"{limit * seeds} trials by {sweep.method} search over {', '.join(sweep.parameters)}; sweep folder {folder}"
        + (f"; {begun} have begun already" if begun else "")
    )
    runner = Runner(study, folder, options, limit, pack, console)
    try:
        with _explained(folder, storage), signals.received() as stop:
            runner.run(stop)
            records = study.records()
            summary.write(study, folder, options)
    finally:
        runner.close()
        study.close()
    console.line(summary.table(study, records))
    console.line(summary.outcome(study, records, folder))
    if stop.signum:
        raise SweepStopped(stop.signum, folder)
    _raise_if_none_finished(runner, records)
    return records


@contextlib.contextmanager
def _explained(folder: Path, storage: str | None) -> Iterator[None]:
    """Turn what the disk or the storage refuses into an error that says how to resume."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write {error.filename or folder}: {error.strerror or error}"
        raise FastCNNError(f"{problem}; mend that, then {_RESUME}") from None
    except FastCNNError:
        raise
    except Exception as error:
        if storage is None or type(error).__module__.split(".")[0] not in ("optuna", "sqlalchemy"):
            raise
        problem = f"cannot use the storage {storage}: {first_line(error)}"
        raise FastCNNError(f"{problem}; mend that, then {_RESUME}") from None


def _raise_if_none_finished(runner: Runner, records: list[TrialRecord]) -> None:
    if runner.common_failure is not None:
        raise FastCNNError(f"the first {SAME_FAILURES} trials failed alike: {runner.common_failure}")
    if reason := summary.why_none_finished(records):
        raise FastCNNError(f"no trial finished: {reason}; see {runner.folder / 'sweep.csv'}")


def _check_data(data: str) -> None:
    require_data(data, "sweep")
    if not Path(data).is_dir():
        raise DataError(f"no folder {data}: expected a folder of photos")


def _photos(base: Config) -> str:
    """Return a digest of the photos' paths and sizes, wherever their folder is: trials on others do not compare."""
    found = index.scan(base.data, None, base.layout)
    listed = sorted(zip(map(comparable, found.paths), found.sizes.tolist(), strict=True))
    return hashlib.blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest()


def _num_trials(sweep: Sweep, trials: int | None) -> int:
    limits = [limit for limit in (trials, sweep.run_cap, sweep.grid_size) if limit is not None]
    if not limits:
        raise UsageError("how many trials? give --trials N, or run_cap in the file")
    return min(*limits, sweep.num_points or limits[0])


def _check_pack(device: str) -> None:
    from fastcnn.system.device import pick_device  # imports torch, which this process needs for nothing else

    kind = pick_device(device).type
    if kind != "cpu":
        raise UsageError(f"--pack is for CPUs: leave it out on {kind}, where trials run one after another")


def _definition(sweep: Sweep, options: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Return what a sweep that is resumed must have in common with the one that was begun."""
    if seeds > 1 and "seed" in sweep.parameters:
        raise UsageError("--seeds repeats each point with other seeds: take seed out of the sweep file's parameters")
    spelled = {str(key).replace("-", "_"): value for key, value in sweep.text["parameters"].items()}
    return {
        **({"--seeds": seeds} if seeds > 1 else {}),
        "method": sweep.method,
        "metric": [sweep.metric, sweep.goal],
        "early_terminate": sweep.text.get("early_terminate"),
        "parameters": {name: spelled[name] for name in sweep.parameters},
        **{option_name(name): value for name, value in options.items() if name not in LOCAL},
    }


@dataclass
class Worker:
    """A trial process, and the trial that it trains."""

    process: TrialProcess
    trial: ClaimedTrial | None = None
    started: float = 0.0


class Runner:
    """Gives trials of a study to processes until `limit` of them have begun or the sweep is stopped."""

    def __init__(
        self, study: Study, folder: Path, options: Mapping[str, Any], limit: int, pack: int, console: Console
    ) -> None:
        self.study, self.folder, self.options, self.limit, self.console = study, folder, options, limit, console
        self.workers: list[Worker] = []
        self.any_trial_succeeded = False
        self.failures: list[str] = []
        self._warned: set[str] = set()
        for _ in range(pack):
            self._add_worker()

    def run(self, stop: signals.StopRequest) -> None:
        """Run the trials; once `stop` has a signal, let those that run save their state, and return."""
        told_to_stop = False
        while True:
            if not stop.signum:
                self._start_trials()
            elif not told_to_stop:
                told_to_stop = True
                for worker in self.workers:
                    worker.process.stop()
            busy = [worker for worker in self.workers if worker.process.busy]
            if not busy:
                return
            wait([handle for worker in busy for handle in worker.process.handles], timeout=0.5)
            for worker in busy:
                ending = worker.process.poll()
                if ending:
                    self._end(worker, ending)

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.process.close()

    @property
    def common_failure(self) -> str | None:
        """Reason for which the first trials all failed, so that no others are tried; None otherwise."""
        last = self.failures[-SAME_FAILURES:]
        hopeless = not self.any_trial_succeeded and len(last) == SAME_FAILURES and len(set(last)) == 1
        return last[0] if hopeless else None

    def _add_worker(self) -> None:
        worker = Worker(TrialProcess(lambda epoch: self._report(worker, epoch), self._warn_once))
        self.workers.append(worker)

    def _start_trials(self) -> None:
        for worker in self.workers:
            if worker.process.busy or self.common_failure is not None:
                continue
            trial = self.study.claim(self.limit)
            if trial is None:
                return
            worker.trial, worker.started = trial, time.perf_counter()
            summary.write_table(self.study, self.folder)  # at once, as this process may be killed
            if trial.resumed:
                self.console.line(f"{trial.folder} was interrupted: resuming it")
            worker.process.start(
                Job(
                    options={**self.options, **trial.values, **self._seed_of(trial)},
                    run_dir=str(self.folder / trial.folder),
                    lock=str(self.folder / "locks" / trial.folder),
                    num_parallel=len(self.workers),
                )
            )

    def _seed_of(self, trial: ClaimedTrial) -> dict[str, int]:
        return {"seed": self.study.seed + trial.repeat} if self.study.seeds > 1 else {}

    def _report(self, worker: Worker, epoch: Epoch) -> bool:
        assert worker.trial
        return self.study.report(worker.trial, epoch.row, may_prune=not epoch.is_last)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warn(text)

    def _end(self, worker: Worker, ending: Ending) -> None:
        trial, worker.trial = worker.trial, None
        assert trial
        if ending.state == "stopped":  # the study keeps it as running, and whoever resumes the sweep resumes it
            if ending.reason:
                raise FastCNNError(f"{trial.folder}: {ending.reason}; to go on with the sweep, {_RESUME}")
            return
        record = self.study.tell(trial, ending.state, ending.reason)
        if record.state == "failed":
            self.failures.append(record.reason.replace(record.folder, "its folder"))
        else:
            self.any_trial_succeeded = True
        summary.write_table(self.study, self.folder)
        self.console.line(self._describe(record, time.perf_counter() - worker.started))

    def _describe(self, record: TrialRecord, seconds: float) -> str:
        values = " ".join(f"{name}={summary.shown(value)}" for name, value in record.values.items())
        if record.state == "failed":
            return f"{record.folder}  failed: {record.reason}  {values}"
        metric = "" if record.value is None else f"{self.study.sweep.metric} {record.value:.4f}"
        epochs = f"{record.epochs} epoch" + ("s" if record.epochs != 1 else "")
        pruned = "  pruned" if record.state == "pruned" else ""
        best = self.study.best()
        is_best = best is not None and best.number == record.number
        return f"{record.folder}  {metric}  {epochs}, {seconds:.1f} s{pruned}{'  best' if is_best else ''}  {values}"
