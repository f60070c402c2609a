"""Score of a model on a Feed: every image counts once, whatever the batch size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.data.feeds import Feed
from fastcnn.network.pixels import Normalise, resized
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.training.engines import Eager, Engine, Step
from fastcnn.training.metrics import Score, Sums
from fastcnn.training.step import StepFunctions, forward

BATCH_SIZE = 128


@dataclass(frozen=True)
class Evaluation:
    """Score of a model, with its prediction for each image."""

    score: Score
    predicted: Tensor
    """(M,) int64 most probable class of each image, on the device, in the order of the feed's permutation. With several
    ranks M counts this rank's images, or all images where probabilities were asked for."""
    probabilities: Tensor
    """(M, num_classes) fp32 in the same order; (M, 0) where none were asked for."""


class EvaluationStep:
    """Evaluation of one batch, as a function of device tensors like the training step.

    Every batch has the same shape: the last one is padded with the last image, whose repeats have weight 0. With
    `num_classes`, the width of the network's output, the probabilities of every image are kept too.
    """

    def __init__(
        self, model: SmallCNN, feed: Feed, normalise: Normalise, batch_size: int = BATCH_SIZE, num_classes: int = 0
    ) -> None:
        device, count = feed.images.device, len(feed)
        batch_size = feed.batch_size or max(1, min(batch_size, count))
        self.network, self.feed, self.normalise, self.batch_size = model, feed, normalise, batch_size
        self.num_steps = -(-count // batch_size)
        self.offsets = torch.arange(batch_size, device=device)
        self.predicted = torch.zeros(count + 1, dtype=torch.int64, device=device)  # padding is written to the last
        self.probabilities = torch.zeros(count + 1, num_classes, device=device)
        self.sums = Sums(device)
        self.generator: torch.Generator | None = None  # nothing is drawn
        self.ranks = ALONE  # nothing is summed over the ranks

    @property
    def functions(self) -> StepFunctions:
        """The plain functions, by torch's own kernels."""
        return StepFunctions(forward=_forward_logits if self.probabilities.size(1) else forward)

    def __call__(self, functions: StepFunctions | None = None) -> None:
        """Score the batch at the feed's cursor, by an engine's functions or the plain ones; move the cursor on."""
        functions = functions or self.functions
        feed, count = self.feed, len(self.feed)
        places = feed.cursor + self.offsets
        photos = feed.permutation.index_select(0, places.clamp(max=count - 1))
        labels = feed.labels.index_select(0, photos)
        with torch.no_grad():
            images = resized(feed.images.index_select(0, photos), self.normalise.image_size)
            losses, predictions = functions.forward(self.network, self.normalise, images, labels)
            if self.probabilities.size(1):
                self.probabilities.index_copy_(0, places.clamp(max=count), predictions.softmax(1).float())
                predictions = predictions.argmax(1)
        self.sums.add(losses, predictions == labels, places < count)
        self.predicted.index_copy_(0, places.clamp(max=count), predictions)
        feed.cursor.add_(self.batch_size)

    def state(self) -> list[Tensor]:
        """Return every tensor that outlives a call and is changed by it."""
        return [self.predicted, self.probabilities, self.feed.cursor, self.sums.values]


class Evaluator:
    """Scores a model on a feed, again and again, by one engine.

    With several ranks each has a feed of its own, every count-th image, and all of them return the score of the whole.
    """

    def __init__(
        self,
        model: SmallCNN,
        feed: Feed,
        normalise: Normalise,
        engine: Callable[[Step], Engine] = Eager,
        num_classes: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.step, self.ranks = EvaluationStep(model, feed, normalise, num_classes=num_classes), ranks
        with evaluation_mode(model):
            self.engine = engine(self.step) if len(feed) else Eager(self.step)

    def __call__(self) -> Evaluation:
        """Return the model's score on all images of the feed."""
        step = self.step
        step.sums.reset()
        with evaluation_mode(step.network), step.feed.start_in_order() as feed:
            feed.drive(self.engine.run, step.num_steps)
        self.ranks.sum_(step.sums.values)
        score = step.sums.read()
        predicted, probabilities = step.predicted[:-1].clone(), step.probabilities[:-1].clone()
        if step.probabilities.size(1):  # else nobody needs the other ranks' predictions
            predicted = self.ranks.gather_interleaved(predicted, score.count)
            probabilities = self.ranks.gather_interleaved(probabilities, score.count)
        return Evaluation(score, predicted, probabilities)


def _forward_logits(model: SmallCNN, normalise: Normalise, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N,) cross-entropy and (N, num_classes) logits of a uint8 batch."""
    logits = model(normalise(images))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none"), logits


@contextlib.contextmanager
def evaluation_mode(model: SmallCNN) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
