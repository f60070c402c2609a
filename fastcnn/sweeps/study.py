"""`Study`: the trials of a sweep in Optuna's storage, which processes and machines may share and which outlives them.

A trial belongs to the process that began it, which holds a lock as long as it lives. If that process is gone, another
one resumes the trial with its number, parameters and run folder: no trial is run twice, and none is lost.
"""

from __future__ import annotations

import json
import math
import random
import secrets
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcnn.errors import FastCNNError, UsageError, first_line, ignoring_warnings, os_error_as
from fastcnn.storage import files, locks
from fastcnn.sweeps import journal, sampling
from fastcnn.sweeps.search_space import Sweep

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

ATTEMPTS = 20  # to draw a point that no trial has

FOLDER = "trial-{:04}"

_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "running"}


@dataclass(frozen=True, kw_only=True)
class ClaimedTrial:
    """A trial that this process is to run."""

    number: int
    values: dict[str, Any]
    """Value of each parameter."""
    repeat: int
    """Which of its point's trials it is, from 0: each has a seed of its own."""
    resumed: bool
    """Whether a process that is gone began it."""
    handle: Trial

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return FOLDER.format(self.number)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """State, best metric and parameters of one trial."""

    number: int
    state: str
    """finished, pruned, failed or running."""
    value: float | None
    """The sweep's metric in the best epoch."""
    metrics: dict[str, float]
    """Metrics of the best epoch, as in metrics.csv."""
    epochs: int
    values: dict[str, Any]
    """Value of each parameter."""
    reason: str
    """Why it failed."""

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return FOLDER.format(self.number)


@dataclass(frozen=True)
class Point:
    """Trials of one point of the search space, each with a seed of its own."""

    records: Sequence[TrialRecord]

    @property
    def finished(self) -> list[TrialRecord]:
        """Those that finished."""
        return [record for record in self.records if record.state == "finished" and record.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean of the metric over the seeds that finished."""
        values = [record.value for record in self.finished if record.value is not None]
        return statistics.mean(values) if values else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the mean, by Student's t; None for fewer than two seeds."""
        values = [record.value for record in self.finished if record.value is not None]
        if len(values) < 2:
            return None
        from scipy.stats import t  # takes a second to import

        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return statistics.mean(values) - half, statistics.mean(values) + half


class Study:
    """The trials of a sweep.

    Args:
        folder: the sweep's folder, made if missing.
        sweep: parameters, method and metric.
        storage: SQLAlchemy address, as sqlite:///sweep.db; None is a journal in the folder.
        seed: seed of the search.
        seeds: trials of each point.
        definition: settings that must be equal to resume the sweep; the error names the keys that differ.

    Raises FastCNNError where Optuna or the storage is missing, UsageError where the folder is another sweep's.
    """

    def __init__(
        self,
        folder: Path,
        sweep: Sweep,
        *,
        storage: str | None,
        seed: int,
        seeds: int = 1,
        definition: Mapping[str, Any],
    ) -> None:
        try:
            import filelock
            import optuna

            if seeds > 1:  # here, not after all trials
                import scipy.stats  # noqa: F401
        except ImportError as error:
            raise FastCNNError(f"sweeps need more packages ({error}): pip install 'fastcnn[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.seed, self.seeds = sweep, seed, seeds
        with os_error_as(f"cannot write {folder}", "; choose another with --dir"):
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
        try:
            with self._claiming:
                self.optuna = optuna.create_study(
                    study_name=sweep.name if storage else "sweep",
                    storage=journal.open_storage(storage, folder),
                    direction=sweep.goal,
                    pruner=sampling.pruner(sweep.early),
                    load_if_exists=True,
                )
                self._check(definition, folder)
        except (FastCNNError, AssertionError):
            raise
        except Exception as error:  # whatever the storage's driver raises
            where = storage or folder / journal.JOURNAL
            raise FastCNNError(f"cannot use the storage {where}: {first_line(error)}; see --storage") from None

    def close(self) -> None:
        """Release the unfinished trials, so that another process may resume them."""
        self._alive.release()

    def claim(self, limit: int) -> ClaimedTrial | None:
        """Return a trial to run, an interrupted one before a new one; None where those of `limit` points have begun."""
        import optuna
        from optuna.trial import Trial, TrialState

        with self._claiming:
            trials = self.optuna.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and self._is_interrupted(trial):
                    return self._begin(Trial(self.optuna, trial._trial_id), resumed=True)
            if len(trials) >= min(limit, self.sweep.grid_size or limit) * self.seeds:
                return None
            used_up = len(self._points_taken()) >= (self.sweep.num_points or math.inf)
            if len(trials) % self.seeds == 0 and (used_up or self._has_reached_target()):
                return None
            # The real sampler comes with the trial's number: processes that draw at once must not draw alike.
            self.optuna.sampler = optuna.samplers.RandomSampler(seed=self.seed)
            return self._begin(self.optuna.ask(), resumed=False)

    def report(self, trial: ClaimedTrial, row: Mapping[str, float], *, may_prune: bool) -> bool:
        """Record an epoch's metrics; return whether to prune the trial."""
        epoch, value = int(row["epoch"]), row[self.sweep.metric]
        known = self._intermediate_values(trial)
        if epoch not in known and not math.isnan(value):
            if not known or self.rank(value) < self.rank(self._best(known.values())):
                trial.handle.set_user_attr("figures", dict(row))
            early = self.sweep.early
            judged = value if early is None or early.strict else self._best([value, *known.values()])
            trial.handle.report(judged, epoch)
        trial.handle.set_user_attr("epochs", epoch)
        return may_prune and self.sweep.early is not None and trial.handle.should_prune()

    def tell(self, trial: ClaimedTrial, state: str, reason: str = "") -> TrialRecord:
        """Record that a trial ended as finished, pruned or failed; return its record."""
        from optuna.trial import TrialState

        known = self._intermediate_values(trial).values()
        if state == "finished" and not known:
            state, reason = "failed", f"no epoch had a {self.sweep.metric} that is a number"
        if reason:
            trial.handle.set_user_attr("reason", reason)
        code = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[state]
        with ignoring_warnings():
            value = self._best(known) if state == "finished" else None
            self.optuna.tell(trial.handle, value, state=code, skip_if_finished=True)
        return self.records()[trial.number]

    def records(self) -> list[TrialRecord]:
        """Return the record of every trial, by number."""
        return [self._record(trial) for trial in self.optuna.get_trials(deepcopy=False)]

    def best(self) -> TrialRecord | None:
        """Return the best of the finished trials, or the first of the point with the best mean."""
        return next((point.finished[0] for point in self.points(self.records()) if point.finished), None)

    def points(self, records: Sequence[TrialRecord]) -> list[Point]:
        """Return the points of trials, the best mean first; a point whose seeds have not all finished comes later."""
        points = [Point(records[i : i + self.seeds]) for i in range(0, len(records), self.seeds)]
        return sorted(points, key=lambda point: (-len(point.finished), self.rank(point.mean)))

    def rank(self, value: float | None) -> float:
        """Return a sort key that puts the best value first and a missing one last."""
        return math.inf if value is None else value if self.sweep.goal == "minimize" else -value

    def _best(self, values: Iterable[float]) -> float:
        return float(min(values, key=self.rank))

    def _intermediate_values(self, trial: ClaimedTrial) -> dict[int, float]:
        return self.optuna.get_trials(deepcopy=False)[trial.number].intermediate_values

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        notes, known = trial.user_attrs, trial.intermediate_values
        return TrialRecord(
            number=trial.number,
            state=_STATES[trial.state.name],
            value=self._best(known.values()) if known else None,
            metrics=dict(notes.get("figures", {})),
            epochs=int(notes.get("epochs", 0)),
            values=dict(notes.get("values", {})),
            reason=str(notes.get("reason", "")),
        )

    def _begin(self, handle: Trial, *, resumed: bool) -> ClaimedTrial:
        handle.set_user_attr("owner", [self._folder_id, self._owner])
        values = handle.user_attrs.get("values")
        if values is None:
            first = self.optuna.get_trials(deepcopy=False)[handle.number - handle.number % self.seeds]
            is_repeat = first.number != handle.number and "values" in first.user_attrs
            self.optuna.sampler = sampling.recorded(first.params) if is_repeat else self._sampler_of_new_point(handle)
            values = {name: sampling.suggest(handle, name, p) for name, p in self.sweep.parameters.items()}
            handle.set_user_attr("values", values)
        repeat = handle.number % self.seeds
        return ClaimedTrial(number=handle.number, values=values, repeat=repeat, resumed=resumed, handle=handle)

    def _sampler_of_new_point(self, handle: Trial) -> optuna.samplers.BaseSampler:
        """Return the sampler of a trial, which gives it a point that no other trial has.

        After some attempts the point is one of those that are left, as TPE likes those that it knows.
        """
        number = handle.number // self.seeds
        if self.sweep.method == "grid":
            return sampling.sampler(self.sweep, self.seed, number)
        taken, frozen = self._points_taken(), self.optuna.get_trials(deepcopy=False)[handle.number]
        for attempt in range(ATTEMPTS):
            draft = sampling.Draft(self.optuna, frozen, sampling.sampler(self.sweep, self.seed, number, attempt))
            values = {name: sampling.suggest(draft, name, p) for name, p in self.sweep.parameters.items()}
            if sampling.key(values) not in taken:
                break
        else:
            if self.sweep.num_points is not None:
                left = [point for point in self.sweep.points() if sampling.key(point) not in taken]
                point = random.Random(self.seed * 1_000_003 + number).choice(left)
                drawn = {n: sampling.in_optunas_terms(self.sweep.parameters[n], value) for n, value in point.items()}
                return sampling.recorded(drawn)
        return sampling.recorded(draft.drawn)

    def _points_taken(self) -> set[str]:
        """Return the points, as `sampling.key`, that trials have, failed and running ones among them."""
        trials = self.optuna.get_trials(deepcopy=False)
        return {sampling.key(trial.user_attrs["values"]) for trial in trials if "values" in trial.user_attrs}

    def _is_interrupted(self, trial: FrozenTrial) -> bool:
        """Return whether the process that began a trial is gone. False for another folder's: nobody can tell here."""
        folder, owner = trial.user_attrs.get("owner", (self._folder_id, "nobody"))
        if folder != self._folder_id or owner == self._owner:
            return False
        lock = self._locks / owner
        return not (lock.exists() and locks.is_held(lock))

    def _has_reached_target(self) -> bool:
        target, best = self.sweep.target, self.best()
        reached = self.points(self.records())[0].mean if best else None
        return target is not None and reached is not None and self.rank(reached) <= self.rank(target)

    def _check(self, definition: Mapping[str, Any], folder: Path) -> None:
        """Record the definition of a new sweep; raise UsageError where it differs from the one that was begun."""
        wanted = json.loads(json.dumps(dict(definition)))
        if "definition" not in self.optuna.user_attrs:
            self.optuna.set_user_attr("definition", wanted)
            self.optuna.set_user_attr("identity", secrets.token_hex(8))
        begun, identity = self.optuna.user_attrs["definition"], self.optuna.user_attrs["identity"]
        if "photos" not in begun:  # of 0.1.0
            wanted.pop("photos", None)
        other = sorted(key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key))
        mark = self._locks / "study"
        if not mark.exists():
            files.write(mark, identity)
        elif mark.read_text(encoding="utf-8") != identity:
            other = ["--storage"]
        if other:
            named = ", ".join(f"{'other' if key in ('parameters', 'photos') else 'another'} {key}" for key in other)
            raise UsageError(
                f"{folder} holds another sweep, begun with {named}: give the same to resume it, "
                "or choose another folder with --dir"
            )
