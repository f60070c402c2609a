"""The book of a sweep's trials: an Optuna study that processes and machines may share, and that outlives them.

A trial belongs to the process that began it, which holds a lock as long as it lives. A trial whose process is gone is
taken over as it is, with its number, its parameters and its run folder: none is run twice, and none is lost.
"""

from __future__ import annotations

import json
import math
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcnn.errors import FastCNNError, UsageError, first_line
from fastcnn.storage import files
from fastcnn.sweeps.search_space import Bell, Choice, Hyperband, Parameter, Sweep

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

FOLDER = "trial-{:04}"
JOURNAL = "journal.log"

_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "running"}


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A trial that is this process's to run."""

    number: int
    values: dict[str, Any]
    """What each parameter is."""
    taken_over: bool
    """Whether a process that is gone began it."""
    handle: Trial


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What the book says of a trial."""

    number: int
    state: str
    """finished, pruned, failed or running."""
    value: float | None
    """The best figure of its epochs."""
    figures: dict[str, float]
    """Of that epoch, as in metrics.csv."""
    epochs: int
    values: dict[str, Any]
    reason: str

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        return FOLDER.format(self.number)


class Study:
    """The trials of a sweep.

    Args:
        folder: of the sweep; made where it is not there.
        sweep: what is varied.
        storage: an address that SQLAlchemy knows, as sqlite:///sweep.db; None is a journal in the folder.
        seed: of the search.
        definition: what makes the sweep another one where it is another: shown in the error by its keys.

    Raises FastCNNError where Optuna or the storage is missing, UsageError where the book is another sweep's.
    """

    def __init__(
        self, folder: Path, sweep: Sweep, *, storage: str | None, seed: int, definition: Mapping[str, Any]
    ) -> None:
        try:
            import filelock
            import optuna
        except ImportError as error:
            raise FastCNNError(f"sweeps need Optuna ({error}): pip install 'fastcnn[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.seed = sweep, seed
        try:
            self._locks = folder / "locks"
            self._locks.mkdir(parents=True, exist_ok=True)
            self._claiming = filelock.FileLock(self._locks / "claim")
            with self._claiming:
                identity = self._locks / "folder"
                if not identity.exists():
                    files.write(identity, secrets.token_hex(8))
                self._folder_id = identity.read_text(encoding="utf-8")
                self._owner = secrets.token_hex(8)
                self._alive = filelock.FileLock(self._locks / self._owner)
                self._alive.acquire()
        except OSError as error:
            raise FastCNNError(f"cannot write {folder}: {error.strerror or error}; choose another with --dir") from None
        try:
            with self._claiming:
                self.optuna = optuna.create_study(
                    study_name=sweep.name if storage else "sweep",
                    storage=_storage(storage, folder),
                    direction=sweep.goal,
                    pruner=_pruner(sweep.early),
                    load_if_exists=True,
                )
                self._check(definition, folder)
        except (FastCNNError, AssertionError):
            raise
        except Exception as error:  # whatever the storage's driver raises
            where = storage or folder / JOURNAL
            raise FastCNNError(f"cannot use the storage {where}: {first_line(error)}; see --storage") from None

    def close(self) -> None:
        """Give up what is not finished, so that another process may take it over."""
        self._alive.release()

    def claim(self, limit: int) -> Claimed | None:
        """Return a trial to run, one that was left behind before a new one; None where `limit` are begun already."""
        import optuna
        from optuna.trial import Trial, TrialState

        with self._claiming:
            trials = self.optuna.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and self._is_left_behind(trial):
                    handle = Trial(self.optuna, trial._trial_id)
                    return self._begin(handle, taken_over=True)
            size = self.sweep.grid_size
            limit = limit if size is None else min(limit, size)
            if len(trials) >= limit or self._has_enough():
                return None
            # The real sampler comes with the trial's number: processes that draw at once must not draw alike.
            self.optuna.sampler = optuna.samplers.RandomSampler(seed=self.seed)
            return self._begin(self.optuna.ask(), taken_over=False)

    def report(self, trial: Claimed, row: Mapping[str, float], *, may_prune: bool) -> bool:
        """Write an epoch's figures down; return whether the trial is to be given up."""
        epoch, value = int(row["epoch"]), row[self.sweep.metric]
        known: dict[int, float] = self.optuna.get_trials(deepcopy=False)[trial.number].intermediate_values
        if epoch not in known and not math.isnan(value):
            if not known or self.rank(value) < self.rank(self._best(known.values())):
                trial.handle.set_user_attr("figures", dict(row))
            early = self.sweep.early
            so_far = value if early is None or early.strict else self._best([value, *known.values()])
            trial.handle.report(so_far, epoch)
        trial.handle.set_user_attr("epochs", epoch)
        return may_prune and self.sweep.early is not None and trial.handle.should_prune()

    def tell(self, trial: Claimed, state: str, reason: str = "") -> TrialRecord:
        """Write down how a trial ended: finished, pruned or failed. Return its line."""
        from optuna.trial import TrialState

        known = self.optuna.get_trials(deepcopy=False)[trial.number].intermediate_values.values()
        if state == "finished" and not known:
            state, reason = "failed", f"no epoch had a {self.sweep.metric} that is a number"
        if reason:
            trial.handle.set_user_attr("reason", reason)
        code = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[state]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = self._best(known) if state == "finished" else None
            self.optuna.tell(trial.handle, value, state=code, skip_if_finished=True)
        return self.lines()[trial.number]

    def lines(self) -> list[TrialRecord]:
        """Return what the book says, by number."""
        return [self._line(trial) for trial in self.optuna.get_trials(deepcopy=False)]

    def best(self) -> TrialRecord | None:
        """Return the best of the trials that finished."""
        finished = [line for line in self.lines() if line.state == "finished" and line.value is not None]
        return min(finished, key=lambda line: self.rank(line.value)) if finished else None

    def rank(self, value: float | None) -> float:
        """Order values: the best first, none last."""
        return math.inf if value is None else value if self.sweep.goal == "minimize" else -value

    def importance(self) -> dict[str, float]:
        """Return each parameter's share of what makes a trial a good one (PED-ANOVA), the most important first.

        Empty where fewer than four trials finished, or nothing was varied.
        """
        import optuna

        if sum(line.state == "finished" for line in self.lines()) < 4 or not self.sweep.parameters:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dict(
                optuna.importance.get_param_importances(
                    self.optuna, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
                )
            )

    def _best(self, values: Any) -> float:
        return float(min(values, key=self.rank))

    def _line(self, trial: FrozenTrial) -> TrialRecord:
        notes, known = trial.user_attrs, trial.intermediate_values
        return TrialRecord(
            number=trial.number,
            state=_STATES[trial.state.name],
            value=self._best(known.values()) if known else None,
            figures=dict(notes.get("figures", {})),
            epochs=int(notes.get("epochs", 0)),
            values=dict(notes.get("values", {})),
            reason=str(notes.get("reason", "")),
        )

    def _begin(self, handle: Trial, *, taken_over: bool) -> Claimed:
        handle.set_user_attr("owner", [self._folder_id, self._owner])
        values = handle.user_attrs.get("values")
        if values is None:
            self.optuna.sampler = self._sampler(handle.number)
            values = {name: suggest(handle, name, parameter) for name, parameter in self.sweep.parameters.items()}
            handle.set_user_attr("values", values)
        return Claimed(number=handle.number, values=values, taken_over=taken_over, handle=handle)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return what chooses a trial's values: the same for the same seed, number and trials before it."""
        from optuna import samplers

        if self.sweep.method == "grid":
            return _grid_point(self.sweep.grid_point(number))
        seed = (self.seed * 1_000_003 + number) % 2**32
        if self.sweep.method == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, multivariate=False, constant_liar=True)

    def _is_left_behind(self, trial: FrozenTrial) -> bool:
        """Return whether the process that began a trial is gone. Of other folders' processes nobody here can tell."""
        import filelock

        folder, owner = trial.user_attrs.get("owner", (self._folder_id, "nobody"))
        if folder != self._folder_id or owner == self._owner:
            return False
        if not (self._locks / owner).exists():
            return True
        lock = filelock.FileLock(self._locks / owner)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        lock.release()
        return True

    def _has_enough(self) -> bool:
        target, best = self.sweep.target, self.best()
        return target is not None and best is not None and self.rank(best.value) <= self.rank(target)

    def _check(self, definition: Mapping[str, Any], folder: Path) -> None:
        """Remember what the sweep is, or see that it is the one that was begun."""
        wanted = json.loads(json.dumps(dict(definition)))
        if "definition" not in self.optuna.user_attrs:
            self.optuna.set_user_attr("definition", wanted)
            self.optuna.set_user_attr("identity", secrets.token_hex(8))
        begun, identity = self.optuna.user_attrs["definition"], self.optuna.user_attrs["identity"]
        other = sorted(key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key))
        mark = self._locks / "study"
        if not mark.exists():
            files.write(mark, identity)
        elif mark.read_text(encoding="utf-8") != identity:
            other = ["--storage"]
        if other:
            raise UsageError(
                f"{folder} is of another sweep: it was begun with another {', '.join(other)}; give the same to go on "
                "with it, or choose another folder with --dir"
            )


def suggest(trial: Trial, name: str, parameter: Parameter) -> Any:
    """Return the value that Optuna's sampler gives a parameter, as plain data."""
    if isinstance(parameter, Bell):  # Optuna has no such distributions: it draws the quantile
        return parameter.at(trial.suggest_float(name, 0.0, 1.0))
    if isinstance(parameter, Choice):
        if parameter.chances:
            return parameter.at(trial.suggest_float(name, 0.0, 1.0))
        labels = [_label(value) for value in parameter.values]
        return parameter.values[labels.index(trial.suggest_categorical(name, labels))]
    if parameter.whole:
        return trial.suggest_int(name, int(parameter.low), int(parameter.high))
    number = parameter.rounded(trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log))
    return int(number) if parameter.quantum and number.is_integer() else number


def _label(value: Any) -> Any:
    """Return what stands for a value in Optuna, whose choices cannot be lists."""
    return value if isinstance(value, bool | int | float | str | None) else json.dumps(value)


def _grid_point(places: Mapping[str, int]) -> optuna.samplers.BaseSampler:
    from optuna.samplers import RandomSampler

    class GridPoint(RandomSampler):
        """Gives each parameter the value that the grid's point has."""

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return param_distribution.choices[places[param_name]]

    return GridPoint()


def _pruner(early: Hyperband | None) -> optuna.pruners.BasePruner:
    """Return the rule by which W&B's "hyperband" works: one bracket of rungs, each let pass by the best 1 / eta.

    That is Optuna's successive halving; its Hyperband has several brackets, and would need the last epoch to be known.
    """
    from optuna import pruners

    if early is None:
        return pruners.NopPruner()
    return pruners.SuccessiveHalvingPruner(min_resource=early.first, reduction_factor=max(2, round(early.eta)))


def _storage(storage: str | None, folder: Path) -> Any:
    if storage is not None:
        return storage
    import filelock
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL

    class Lock:
        """The system's own lock: it goes with a process that is killed. What that left of a line is cut off."""

        def __init__(self) -> None:
            self.lock = filelock.FileLock(f"{path}.lock")

        def acquire(self) -> bool:
            self.lock.acquire()
            _mend(path)
            return True

        def release(self) -> None:
            self.lock.release()

    return JournalStorage(JournalFileBackend(str(path), lock_obj=Lock()))  # type: ignore[arg-type]


def _mend(path: Path) -> None:
    """Cut off a journal's last line where it has no end."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
