"""The training loop: epochs, the steps within them, and when checkpoints are written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from fastcnn.config import parse_interval
from fastcnn.runs.batch_picture import drawing_engine
from fastcnn.runs.build import Training
from fastcnn.runs.failures import RunInterrupted, raise_if_not_finite, raise_if_validation_not_finite
from fastcnn.runs.state import RunContext, RunState
from fastcnn.runs.trackers import Tracker
from fastcnn.system.console import Console
from fastcnn.system.signals import StopRequest
from fastcnn.system.thread_choice import ThreadChoice
from fastcnn.training.engines import Engine
from fastcnn.training.metrics import Live, Score
from fastcnn.training.step import TrainingStep

PORTION_SECONDS = 0.1  # of steps queued between two looks at progress and signals


def train(run: RunContext, training: Training, trackers: Sequence[Tracker], stop: StopRequest) -> None:
    """Train the epochs that are left, unless `--patience` ends them early.

    Raises RunInterrupted, after saving, once `stop` holds a signal, and FastCNNError if a loss or weight is not finite.
    """
    state, ranks, saving = training.state, run.ranks, CheckpointTimer(run.config.checkpoint_every)
    engine = drawing_engine(run, training)
    while state.epoch < state.config.epochs and not _is_stale(state, run.console):
        start = time.perf_counter()
        trained, images_per_second = _train_epoch(run, training, engine, saving, stop)
        state.average_batch_norms()
        with run.stopwatch.stage("eval"), state.averaged():
            val = training.evaluator().score
        raise_if_validation_not_finite(val.loss, state.epoch + 1, run.run_dir)
        row = {
            "epoch": state.epoch + 1,
            "seconds": time.perf_counter() - start,
            "train/loss": trained.loss,
            "train/accuracy": trained.accuracy,
            "val/loss": val.loss,
            "val/accuracy": val.accuracy,
            "lr": float(state.step.optimizer.lr),
            "images_per_second": images_per_second,
        }
        _finish_epoch(run, state, ranks.broadcast(row.copy))  # the first rank's, as times differ
        saving.restart()
        for tracker in trackers:
            tracker.epoch(state.rows[-1])
        (signum,) = ranks.maximum(stop.signum)
        if signum:
            raise RunInterrupted(signum, run.run_dir)


def _train_epoch(
    run: RunContext, training: Training, engine: Engine, saving: CheckpointTimer, stop: StopRequest
) -> tuple[Score, float]:
    """Take the steps of an epoch, or those that an interrupted run left of it; return its score and images/s."""
    state, step, ranks, watch = training.state, training.state.step, run.ranks, run.stopwatch
    epoch, first, skipped = state.epoch + 1, state.steps_done, int(step.skipped)
    start, seconds_before = time.perf_counter(), watch.seconds.get("train", 0.0)
    images_before = first * step.batch_size  # trained before the interruption
    step.parameters.compute.train()
    with (
        watch.stage("train"),
        step.start_epoch(state.config.seed, epoch, first, state.sampling_weights),
        run.console.progress(f"epoch {epoch}/{state.config.epochs}", "steps") as progress,
    ):
        training.threads.try_others()
        if not first:
            step.sums.reset()
        for done, live in run_steps(step, engine, first, saving, training.threads):
            rate = (live.count * ranks.count - images_before) / (time.perf_counter() - start)
            progress(done, step.num_steps, f"loss {live.loss:.4f}  {max(rate, 0):,.0f} images/s")
            signum, due = ranks.maximum(stop.signum, saving.due(done))
            save = (signum or due) and done < step.num_steps  # an epoch whose steps are done is finished first
            if save or not math.isfinite(live.loss):
                raise_if_not_finite(state, training.data, epoch, skipped_before=skipped, steps_done=done)
            if save:
                with watch.stage("checkpoint"):
                    state.save("last.pt")
                saving.restart()
                if signum:
                    raise RunInterrupted(signum, run.run_dir)
        # From here on the first rank has the sums of all ranks, as a checkpoint does.
        ranks.sum_(step.sums.values)
        score = step.sums.read()  # the one synchronisation of the epoch
        if not ranks.first:
            step.sums.reset()
    raise_if_not_finite(state, training.data, epoch, skipped_before=skipped, steps_done=step.num_steps)
    return score, (score.count - images_before) / (watch.seconds["train"] - seconds_before)


def run_steps(
    step: TrainingStep, engine: Engine, done: int, saving: CheckpointTimer, threads: ThreadChoice
) -> Iterator[tuple[int, Score]]:
    """Queue an epoch's steps, from step `done` on, in portions; yield the steps queued and the score so far.

    A portion takes about `PORTION_SECONDS`, so that progress is live and a signal is soon seen.
    """
    portion, live = 1, Live(step.sums)
    while done < step.num_steps:
        start = time.perf_counter()
        portion = min(portion, step.num_steps - done)
        steps = -step.ranks.maximum(-saving.limit(portion, done))[0]  # the lowest of all ranks
        step.feed.drive(engine.run, steps)
        live.mark()
        done += steps
        seconds = time.perf_counter() - start
        threads.took(steps, seconds)
        yield done, live.score
        if seconds < PORTION_SECONDS:
            portion *= 2
        elif seconds > 4 * PORTION_SECONDS:  # the machine has become slower
            portion = max(1, portion // 2)


def _finish_epoch(run: RunContext, state: RunState, row: dict[str, float]) -> None:
    """Add the figures of an epoch to the state and save it; `best.pt` too if none was better."""
    is_best = not state.best or merit(row) > merit(state.best)
    state.epoch += 1
    state.rows.append(row)
    if is_best:
        state.best = row
    with run.stopwatch.stage("checkpoint"):
        state.save("last.pt")  # first, as best.pt can be made from it after a crash
        if is_best:
            state.save_best()


def merit(row: dict[str, float]) -> tuple[float, float]:
    """Return what orders epochs: validation accuracy, then validation loss; without a finite loss it is last."""
    loss = row["val/loss"]
    return (row["val/accuracy"], -loss) if math.isfinite(loss) else (-math.inf, -math.inf)


def _is_stale(state: RunState, console: Console) -> bool:
    """Return whether the validation accuracy has not risen for `--patience` epochs."""
    patience = state.config.patience
    if patience is None or state.epoch - state.best.get("epoch", state.epoch) < patience:
        return False
    console.line(f"ended early: no better validation accuracy for {patience} epochs")
    return True


class CheckpointTimer:
    """When the next checkpoint within an epoch is due: after so many steps or seconds, or never."""

    def __init__(self, every: str | None) -> None:
        self.steps, self.seconds = parse_interval(every or "")
        self.restart()

    def restart(self) -> None:
        """Count the time from now on."""
        self.last = time.perf_counter()

    def due(self, done: int) -> bool:
        """Return whether a checkpoint is due, `done` steps into an epoch."""
        if self.steps:
            return done % self.steps == 0
        return self.seconds is not None and time.perf_counter() - self.last >= self.seconds

    def limit(self, portion: int, done: int) -> int:
        """Return how many of the next `portion` steps may be queued before a checkpoint is due."""
        return min(portion, self.steps - done % self.steps) if self.steps else portion
