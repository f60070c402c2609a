"""`run`: a sweep's trials over one dataset, several at once where asked, and what they come to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fastcnn.config import load, option_name
from fastcnn.errors import DataError, FastCNNError, UsageError, warn
from fastcnn.storage import files
from fastcnn.storage import run_folder as runs
from fastcnn.sweeps import plots as sweep_pictures
from fastcnn.sweeps.search_space import Sweep
from fastcnn.sweeps.study import FOLDER, Claimed, Study, TrialRecord
from fastcnn.sweeps.sweep_file import METRICS
from fastcnn.sweeps.trial_process import Ending, Epoch, Job, TrialProcess
from fastcnn.system import signals
from fastcnn.system.console import Console

SWEEPS = Path("sweeps")
SAME_FAILURES = 3  # in a row, before anything else ended: then the next ones need not be tried
NUM_SHOWN = 20  # trials in the table
LOCAL = frozenset(
    {"data", "cache_dir", "device", "loader", "memory_limit", "strict", "threads", "wandb", "workers"}
)  # options that may differ between the machines that share a sweep

_STATES = {"done": "finished", "pruned": "pruned", "failed": "failed"}


class SweepStopped(FastCNNError):
    """The sweep was told to stop; the message says how to go on."""

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped; what was running is saved: the same command goes on with {folder}")
        self.exit_code = 128 + signum


@dataclass
class Place:
    """A slot and the trial in it."""

    slot: TrialProcess
    trial: Claimed | None = None
    began: float = 0.0


@dataclass
class Sweeping:
    """A sweep that is being run by this process."""

    study: Study
    folder: Path
    options: Mapping[str, Any]
    """Of every trial."""
    limit: int
    pack: int
    console: Console
    places: list[Place] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Why each trial failed, as long as none ended otherwise."""
    warned: set[str] = field(default_factory=set)

    def fill(self) -> None:
        """Give every free slot a trial, as long as there are any."""
        for place in self.places:
            if place.slot.busy or self._is_hopeless():
                continue
            trial = self.study.claim(self.limit)
            if trial is None:
                return
            place.trial, place.began = trial, time.perf_counter()
            if trial.taken_over:
                self.console.line(f"{FOLDER.format(trial.number)} was left behind: going on with it")
            place.slot.start(self._job(trial))

    def wait(self) -> None:
        """Wait until a trial has something to say, and take it in."""
        handles = [handle for place in self.places if place.slot.busy for handle in place.slot.handles]
        wait(handles, timeout=0.5)
        for place in self.places:
            ending = place.slot.poll() if place.slot.busy else None
            if ending:
                self._end(place, ending)

    @property
    def is_busy(self) -> bool:
        """Whether a trial is running."""
        return any(place.slot.busy for place in self.places)

    def add_place(self) -> None:
        """Add a slot."""
        place = Place(TrialProcess(lambda epoch: self._report(place, epoch), self._warn))
        self.places.append(place)

    def _job(self, trial: Claimed) -> Job:
        name = FOLDER.format(trial.number)
        return Job(
            options={**self.options, **trial.values},
            run_dir=str(self.folder / name),
            lock=str(self.folder / "locks" / name),
            num_parallel=self.pack,
        )

    def _report(self, place: Place, epoch: Epoch) -> bool:
        assert place.trial
        return self.study.report(place.trial, epoch.row, may_prune=not epoch.is_last)

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warn(text)

    def _end(self, place: Place, ending: Ending) -> None:
        trial, place.trial = place.trial, None
        assert trial
        if ending.state == "stopped":
            return  # it stays in the book as begun, and whoever goes on with the sweep goes on with it
        line = self.study.tell(trial, _STATES[ending.state], ending.reason)
        self.failures = [*self.failures, line.reason] if line.state == "failed" else []
        if line.state != "failed":
            self.failures = ["", *self.failures]  # not all of them fail
        self.console.line(self._said(line, time.perf_counter() - place.began))

    def _said(self, line: TrialRecord, seconds: float) -> str:
        metric, values = self.study.sweep.metric, " ".join(f"{k}={_shown(v)}" for k, v in line.values.items())
        if line.state == "failed":
            what = f"failed: {line.reason}"
        else:
            value = "" if line.value is None else f"{metric} {line.value:.4f}"
            epochs = f"{line.epochs} epoch" + ("s" if line.epochs != 1 else "")
            what = f"{value}  {epochs}, {seconds:.1f} s" + ("  given up" if line.state == "pruned" else "")
        best = self.study.best()
        is_best = best is not None and best.number == line.number
        return f"{line.folder}  {what}{'  best' if is_best else ''}  {values}"

    def _is_hopeless(self) -> bool:
        last = self.failures[-SAME_FAILURES:]
        return len(self.failures) >= SAME_FAILURES and last[0] != "" and len(set(last)) == 1 and "" not in self.failures

    @property
    def hopeless(self) -> str:
        """Why the sweep was ended early, "" where it was not."""
        return self.failures[-1] if self._is_hopeless() else ""


def run(
    sweep: Sweep,
    options: Mapping[str, Any],
    *,
    folder: Path | None = None,
    trials: int | None = None,
    storage: str | None = None,
    pack: int = 1,
    console: Console | None = None,
) -> list[TrialRecord]:
    """Run a sweep's trials until `trials` of them are begun, and return what the book says of each.

    Each is an ordinary run in the sweep's folder; beside them, at the end and when the sweep is told to stop, are
    sweep.csv, config.yaml of the best, parallel_coordinates.png and importance.png. The same call goes on with a sweep
    that was stopped or killed, and runs beside one that is still running.

    Args:
        sweep: what is varied; see `sweepfile.read`.
        options: of every trial, as `config.resolve` takes them; `data` is needed, and what is varied comes before them.
        folder: of the sweep; None is `sweeps/` with its name.
        trials: how many of them there are to be in all; None is the file's run_cap, or the whole grid.
        storage: an SQLAlchemy address for Optuna, as sqlite:///sweep.db; None is a journal in the folder.
        pack: trials at once, on a CPU, each with its share of the cores.
        console: where progress is shown; None shows nothing.

    Raises UsageError for what cannot be meant, DataError where the photos are missing, SweepStopped
    on SIGINT and SIGTERM.
    """
    console = console or Console(quiet=True)
    options = {**options, **sweep.fixed}
    base = load.resolve(options)
    if not base.data:
        raise UsageError("which photos? fastcnn sweep DATA, where DATA is a folder of photos")
    if not Path(base.data).is_dir():
        raise DataError(f"no folder {base.data}: expected a folder of photos")
    options = {"wandb": "disabled", **options, "data": str(Path(base.data).resolve())}
    limits = [limit for limit in (trials, sweep.run_cap, sweep.grid_size) if limit is not None]
    if not limits:
        raise UsageError("how many trials? give --trials N, or run_cap in the file")
    if pack > 1:
        _check_pack(base.device)
    folder = folder or SWEEPS / sweep.name
    definition = {
        "method": sweep.method,
        "metric": [sweep.metric, sweep.goal],
        "early_terminate": sweep.text.get("early_terminate"),
        "parameters": {name: sweep.text["parameters"][_key(sweep, name)] for name in sweep.parameters},
        **{option_name(name): value for name, value in options.items() if name not in LOCAL},
    }
    study = Study(folder, sweep, storage=storage, seed=base.seed, definition=definition)
    sweeping = Sweeping(study, folder, options, min(limits), pack, console)
    begun = len(study.lines())
    console.line(
        f"{min(limits)} trials by {sweep.method} search over {', '.join(sweep.parameters)}; sweep folder {folder}"
        + (f"; {begun} of them are there" if begun else "")
    )
    for _ in range(pack):
        sweeping.add_place()
    try:
        with signals.received() as stop:
            _loop(sweeping, stop)
            lines = study.lines()
            write_summary(study, folder, options)
    finally:
        for place in sweeping.places:
            place.slot.close()
        study.close()
    console.line(table(sweep, lines))
    console.line(_outcome(study, lines, folder))
    if stop.signum:
        raise SweepStopped(stop.signum, folder)
    if sweeping.hopeless:
        raise FastCNNError(f"the first {SAME_FAILURES} trials failed alike: {sweeping.hopeless}")
    return lines


def _loop(sweeping: Sweeping, stop: signals.StopRequest) -> None:
    told = False
    while True:
        if not stop.signum:
            sweeping.fill()
        elif not told:
            told = True
            for place in sweeping.places:
                place.slot.stop()
        if not sweeping.is_busy:
            return
        sweeping.wait()


def write_summary(study: Study, folder: Path, options: Mapping[str, Any]) -> None:
    """Write what the trials come to so far into the sweep's folder."""
    sweep, lines = study.sweep, study.lines()
    names = list(sweep.parameters)
    figures = [name for name in METRICS if name != sweep.metric]
    header = ["trial", "state", sweep.metric, "epochs", *figures, *names, "reason"]
    rows = [
        [
            line.folder,
            line.state,
            "" if line.value is None else line.value,
            line.epochs,
            *(line.figures.get(name, "") for name in figures),
            *(_whole(line.values.get(name, "")) for name in names),
            line.reason,
        ]
        for line in lines
    ]
    files.write_csv(folder / "sweep.csv", [header, *rows])
    measured = [line for line in lines if line.value is not None and line.values]
    if measured and names:
        points = [({**line.values, sweep.metric: line.value}, line.state == "finished") for line in measured]
        logs = [name for name, p in sweep.parameters.items() if getattr(p, "log", False)]
        picture = sweep_pictures.parallel_coordinates(
            points, sweep.metric, logs=logs, maximize=sweep.goal == "maximize"
        )
        files.write(folder / "parallel_coordinates.png", picture)
    importance = study.importance()
    if importance:
        num_finished = sum(line.state == "finished" for line in lines)
        files.write(folder / "importance.png", sweep_pictures.importance(importance, sweep.metric, num_finished))
    best = study.best()
    if best is not None:
        _write_best(best, folder, options)


def _write_best(best: TrialRecord, folder: Path, options: Mapping[str, Any]) -> None:
    theirs = folder / best.folder / runs.CONFIG
    if theirs.is_file():
        files.write(folder / runs.CONFIG, theirs.read_bytes())
        return
    import yaml  # the trial ran on another machine

    text = yaml.safe_dump(load.resolve(options, best.values).to_dict(), sort_keys=False, allow_unicode=True)
    files.write(folder / runs.CONFIG, text)


def table(sweep: Sweep, lines: Sequence[TrialRecord]) -> str:
    """Return the trials as a table, the best first; of many the first ones."""

    def rank(line: TrialRecord) -> tuple[bool, float]:
        worst = float("inf") if line.value is None else line.value if sweep.goal == "minimize" else -line.value
        return line.state == "failed", worst

    header = ["trial", "state", sweep.metric, "epochs", *sweep.parameters]
    rows = [
        [
            line.folder,
            line.state,
            "" if line.value is None else f"{line.value:.4f}",
            str(line.epochs),
            *(_shown(line.values.get(name, "")) for name in sweep.parameters),
        ]
        for line in sorted(lines, key=rank)[:NUM_SHOWN]
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    more = len(lines) - len(rows)
    return "\n".join(["", *text, *([f"and {more} more in sweep.csv"] if more else []), ""])


def _outcome(study: Study, lines: Sequence[TrialRecord], folder: Path) -> str:
    counts = {
        state: sum(line.state == state for line in lines) for state in ("finished", "pruned", "failed", "running")
    }
    said = f"{len(lines)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    best = study.best()
    if best is None or best.value is None:
        return f"{said}; see {folder / 'sweep.csv'}"
    return (
        f"{said}; best {best.folder}: {study.sweep.metric} {best.value:.4f}; "
        f"to train it again: fastcnn train --config {folder / runs.CONFIG}"
    )


def _check_pack(device: str) -> None:
    from fastcnn.system.device import pick_device

    kind = pick_device(device).type
    if kind != "cpu":
        raise UsageError(f"--pack is for CPUs: on {kind} it was not measured, and trials run one after another")


def _key(sweep: Sweep, name: str) -> str:
    """Return a parameter's name as the file spells it."""
    return next(str(key) for key in sweep.text["parameters"] if key.replace("-", "_") == name)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _whole(value)


def _whole(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
