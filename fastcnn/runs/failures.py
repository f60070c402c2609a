"""Failures that end a run early: a signal, a full disk, memory or a loss that is not finite; and how to continue."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from fastcnn.config import Config
from fastcnn.data.buffered_feed import BUFFERS_A_THREAD
from fastcnn.data.cached_photos import CacheLost
from fastcnn.data.dataset import Dataset
from fastcnn.data.feeds import READERS, Feed, shuffled
from fastcnn.errors import FastCNNError, warn
from fastcnn.network.small_cnn import all_finite
from fastcnn.runs.build import start
from fastcnn.runs.state import RunState
from fastcnn.storage import files
from fastcnn.system.device import is_out_of_memory, release_memory, synchronize
from fastcnn.system.signals import StopSignal
from fastcnn.system.text import printable

NUM_CLASSES = 100  # of the network that is tried: the output layer takes the least memory
_REMEDY = "try a lower --lr, --clip-norm 1 or --precision fp32"


class RunInterrupted(FastCNNError):
    """A signal stopped the run; the message says what is saved."""

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {how_to_continue(run_dir)}")
        self.exit_code = 128 + signum


def how_to_continue(run_dir: Path) -> str:
    """Return what is saved of a run that ends here, and the command that continues it."""
    if not (run_dir / "split.csv").is_file():
        return "no step was saved yet, but the images decoded so far are; to continue, run the same command again"
    if not (run_dir / "last.pt").is_file():
        return f"no step was saved yet; to begin again, run: {_resume(run_dir)}"
    return f"saved in {run_dir / 'last.pt'}; to continue, run: {_resume(run_dir)}"


def _resume(run_dir: Path) -> str:
    return f"fastcnn train --resume {shlex.quote(str(run_dir))}"


@contextlib.contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Turn a signal, a cache that is gone or a file that cannot be written into an error that says how to continue."""
    try:
        yield
    except StopSignal as stopped:
        raise RunInterrupted(stopped.signum, run_dir) from None
    except CacheLost as error:
        raise FastCNNError(f"{error.problem}; {how_to_continue(run_dir)}") from None
    except OSError as error:
        path = error.filename or run_dir
        raise FastCNNError(f"cannot write {path}: {error.strerror or error}; {how_to_continue(run_dir)}") from None


def raise_if_not_finite(state: RunState, data: Dataset, epoch: int, *, skipped_before: int, steps_done: int) -> None:
    """Raise FastCNNError if a loss of this epoch or a weight is NaN or infinite.

    With `--on-nan skip`, steps that would lead there were left out; warn of them at the epoch's end. Waits for the
    device.

    Args:
        state: of the run.
        data: for the names of the images in the step that failed.
        epoch: counted from 1.
        skipped_before: steps that were skipped before this epoch.
        steps_done: steps of this epoch that are queued or done.
    """
    step, run_dir = state.step, state.run_dir
    skipped = int(step.skipped) - skipped_before
    if step.skip_nan or not skipped:
        average = [] if step.average is None else [step.average]
        if not all_finite([step.parameters.values, *state.model.buffers(), *average]):
            raise FastCNNError(f"weights became NaN or infinite in epoch {epoch}: {_REMEDY}{_last_good(run_dir)}")
        if skipped and steps_done == step.num_steps:
            if skipped >= step.num_steps:
                raise FastCNNError(f"no step of epoch {epoch} had a finite loss: {_REMEDY}{_last_good(run_dir)}")
            warn(f"skipped {skipped:,} of {steps_done:,} steps of epoch {epoch}: they gave no finite number")
        return
    failed = int(step.step_count) - skipped  # the first: every step from it on counts as skipped
    batch = slice((failed % step.num_steps) * step.batch_size, (failed % step.num_steps + 1) * step.batch_size)
    order = shuffled(len(step.feed), (state.config.seed, epoch), state.sampling_weights)
    names = [data.index.paths[photo] for photo in data.photos("train")[order[batch]]]
    if state.ranks.first:
        files.write_csv(run_dir / "not_finite.csv", [("path",), *((name,) for name in names)])
    more = f" and {len(names) - 3} more ({run_dir / 'not_finite.csv'})" if len(names) > 3 else ""
    raise FastCNNError(
        f"the loss of step {failed + 1} (epoch {epoch}) is not a finite number, at learning rate "
        f"{float(step.lr_schedule[failed]):g} and with {', '.join(map(printable, names[:3]))}{more}; "
        f"no later step changed the weights; {_REMEDY}, or --on-nan skip{_last_good(run_dir)}"
    )


def raise_if_validation_not_finite(loss: float, epoch: int, run_dir: Path) -> None:
    """Raise FastCNNError if the validation loss of an epoch is NaN or infinite, before anything of it is saved."""
    if not math.isfinite(loss):
        raise FastCNNError(
            f"the validation loss of epoch {epoch} is not a finite number: its weights are too large; "
            f"{_REMEDY}{_last_good(run_dir)}"
        )


def _last_good(run_dir: Path) -> str:
    """Return how to continue from the checkpoint before a bad step, if there is one."""
    last = run_dir / "last.pt"
    if not last.is_file():
        return ""
    new_run = f"--init-from {shlex.quote(str(run_dir))}"
    return f"; {last} was saved before it: {new_run} begins a new run with it; to continue, run: {_resume(run_dir)}"


def memory_advice(config: Config, why: str, run_dir: Path) -> str:
    """Return the error message of a run that ran out of memory: the loader and batch size that would fit.

    Args:
        config: resolved for this machine.
        why: first line of the original error.
        run_dir: the run folder; it may hold a checkpoint.
    """
    release_memory()
    fits = largest_batch_size(config)
    problem = f"out of memory on {config.device} ({why})"
    if fits is None:
        other = "use fewer --filters, a smaller --image-size or another --device"
        return f"{problem}: not even one batch of {2 * config.devices} fits; {other}"
    if fits < config.batch_size:
        return f"{problem}: use --loader mapped --batch-size {fits}, which fits"
    if config.loader in ("auto", "resident"):
        has_checkpoint = (run_dir / "last.pt").is_file()
        resume = f"; to continue, run: {_resume(run_dir)} --loader mapped" if has_checkpoint else ""
        return f"{problem}: use --loader mapped, which fits with --batch-size {fits}{resume}"
    return f"{problem}: --batch-size {fits} alone fits, so end what else takes the memory, or try {fits // 2}"


def largest_batch_size(config: Config) -> int | None:
    """Return the largest of the batch size, its half, its quarter ... with which one step fits into memory.

    Each is tried here, with one device's part of the batch, beside the batches that a loader holds. None if not
    even 2 images per device fit.
    """
    size = config.batch_size // config.devices
    alone = dataclasses.replace(config, devices=1, init_from=None, limit_train_batches=1, epochs=1)
    while size >= 2:
        if _fits(dataclasses.replace(alone, batch_size=size)):
            return size * config.devices
        size //= 2
        release_memory()
    return None


def _fits(config: Config) -> bool:
    device, count = torch.device(config.device), BUFFERS_A_THREAD * READERS * config.batch_size
    try:
        feed = Feed(
            images=torch.zeros((count, *[config.decoded_size] * 2, 3), dtype=torch.uint8, device=device),
            labels=torch.arange(count, device=device) % NUM_CLASSES,
            permutation=torch.arange(count, device=device),
            cursor=torch.zeros(1, dtype=torch.int64, device=device),
        )
        start(config, Path(), tuple(map(str, range(NUM_CLASSES))), feed).step()
        synchronize(device)
    except Exception as error:  # any but a lack of memory does not answer the question
        return not is_out_of_memory(error)
    return True
