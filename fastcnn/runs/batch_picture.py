"""Picture of the first batch of a run, as the training step gets it: augmented and normalised, with its targets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastcnn.errors import first_line, warn
from fastcnn.reporting import plots
from fastcnn.runs.build import Training
from fastcnn.runs.state import RunContext, RunState
from fastcnn.storage import files
from fastcnn.training.engines import Engine

NAME = "batch.png"
NUM_IMAGES = 36  # of a batch that are shown


def drawing_engine(run: RunContext, training: Training) -> Engine:
    """Return the engine of a run; where the run wants a picture of a batch and has none, its first step makes it."""
    wanted = run.config.report and run.ranks.first and not (run.run_dir / NAME).exists()
    return DrawingEngine(run, training) if wanted else training.engine


class DrawingEngine:
    """Engine that draws the batch of the first step it is asked for; otherwise the one that it is made from.

    Reading a batch draws no random numbers and changes nothing: all of an epoch's were drawn before it began.
    """

    def __init__(self, run: RunContext, training: Training) -> None:
        self.run_context, self.training, self.drawn = run, training, False

    def run(self, num_steps: int) -> None:
        """Run the step `num_steps` times."""
        if self.drawn:
            self.training.engine.run(num_steps)
            return
        self.drawn, state = True, self.training.state
        place = f"Epoch {state.epoch + 1}, step {state.steps_done + 1}"
        batch, targets = state.step.read()
        self.training.engine.run(num_steps)  # before the picture: a GPU computes while it is drawn
        with self.run_context.stopwatch.stage("report"):
            try:
                files.write(self.run_context.run_dir / NAME, draw(state, batch.images, targets, place))
            except Exception as error:
                warn(f"training goes on without {NAME}, which cannot be drawn: {first_line(error)}")


def draw(state: RunState, images: Tensor, targets: Tensor, place: str) -> bytes:
    """Return the picture of a batch's images (N, H, W, 3) and targets as a PNG file; `place` of its step is the title.

    targets: (N,) int64 labels, or (N, num_classes) class probabilities.
    """
    step = state.step
    shown = step.normalise(images[:NUM_IMAGES])  # (n, 3, H, W)
    count = f"{len(shown)} of {step.batch_size} photos" if len(shown) < step.batch_size else f"{len(shown)} photos"
    pixels = step.normalise.pixels(shown).cpu().numpy()
    return plots.batch(pixels, captions(targets[:NUM_IMAGES], state.classes), f"{place}: {count}")


def captions(targets: Tensor, classes: Sequence[str]) -> list[list[str]]:
    """Return the lines below each image: its class, or the two classes that were mixed, each with its weight."""
    if targets.dim() == 1:
        return [[classes[label]] for label in targets.tolist()]
    lines = []
    for weights, labels in zip(*(part.tolist() for part in targets.topk(2)), strict=True):
        parts = [(classes[label], f"{weight:.0%}") for weight, label in zip(weights, labels, strict=True)]
        mixed = parts[1][1] != "0%"
        lines.append([f"{percent} {name}" for name, percent in parts] if mixed else [parts[0][0]])
    return lines
