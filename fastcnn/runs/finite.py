"""A loss that is no finite number: where, with which photos, and what to try."""

from __future__ import annotations

from pathlib import Path

from fastcnn.data.dataset import Dataset
from fastcnn.data.feeds import shuffled
from fastcnn.errors import FastCNNError, warn
from fastcnn.runs.state import Session
from fastcnn.storage import files
from fastcnn.system.text import printable


def check(session: Session, data: Dataset, epoch: int, before: int, done: int) -> None:
    """Raise FastCNNError where a loss was no finite number, `done` steps into an epoch; warn where it is skipped.

    before: steps that were skipped before this epoch. This waits for the device.
    """
    step, folder = session.step, session.run_dir
    skipped = int(step.skipped) - before
    if not skipped:
        return
    if step.skip_nan:
        if done == step.num_steps:
            if skipped >= step.num_steps:
                raise FastCNNError(f"no step of epoch {epoch} had a finite loss: {_TRY}{_before(folder)}")
            warn(f"{skipped:,} of {done:,} steps of epoch {epoch} were skipped: their loss is not a finite number")
        return
    number = int(step.number) - skipped  # from it on, every step is counted
    batch = slice((number % step.num_steps) * step.batch_size, (number % step.num_steps + 1) * step.batch_size)
    order = shuffled(len(step.feed), (session.config.seed, epoch), session.chances)
    names = [data.index.paths[photo] for photo in data.photos("train")[order[batch]]]
    if session.ranks.first:
        files.write_csv(folder / "not_finite.csv", [("path",), *((name,) for name in names)])
    raise FastCNNError(
        f"the loss of step {number + 1} (epoch {epoch}) is not a finite number, at learning rate "
        f"{float(step.rates[number]):g} and with {', '.join(map(printable, names[:3]))}"
        + (f" and {len(names) - 3} more ({folder / 'not_finite.csv'})" if len(names) > 3 else "")
        + f"; nothing was updated from there on; {_TRY}, or --on-nan skip{_before(folder)}"
    )


_TRY = "try a lower --lr, --clip-norm 1 or --precision fp32"


def _before(folder: Path) -> str:
    """Return what there is to go on from."""
    if not (folder / "last.pt").is_file():
        return ""
    return f"; {folder / 'last.pt'} is from before: --resume goes on from it, --init-from {folder} begins a new run"
