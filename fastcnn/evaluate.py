"""A model's score on a Feed: every photo counted once, whatever the batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.loader import Feed
from fastcnn.metrics import Score, Sums
from fastcnn.model import SmallCNN
from fastcnn.step import Normalise, forward

BATCH_SIZE = 128


@dataclass(frozen=True)
class Evaluation:
    """A score and what it was made of."""

    score: Score
    predicted: Tensor
    """(M,) int64 most probable class of each photo, on the device."""


def restore(state: dict[str, Any]) -> SmallCNN:
    """Return the network of a checkpoint, with its weights, ready to be evaluated."""
    model = SmallCNN(**state["network"])
    model.load_state_dict(state["model"])
    return model.eval()


def evaluate(model: nn.Module, feed: Feed, normalise: Normalise) -> Evaluation:
    """Return the model's score on all photos of a feed, in the feed's own order.

    Every batch has the same shape: the last is filled up with the last photo, whose repeats weigh nothing.
    """
    device, count = feed.images.device, len(feed)
    batch_size = min(BATCH_SIZE, count)
    offsets = torch.arange(batch_size, device=device)
    sums = Sums(device)
    predicted = torch.empty(count, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            places = offsets + start
            photos = places.clamp(max=count - 1)
            labels = feed.labels.index_select(0, photos)
            logits, losses = forward(model, normalise, feed.images.index_select(0, photos), labels)
            guesses = logits.argmax(1)
            sums.add(losses, guesses == labels, places < count)
            predicted[start : start + batch_size] = guesses[: count - start]
    model.train(was_training)
    return Evaluation(sums.read(), predicted)
