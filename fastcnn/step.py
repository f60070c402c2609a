"""The training step: gather, normalise, forward, loss, backward, update, sums, as one function of device tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.loader import Feed
from fastcnn.metrics import Sums
from fastcnn.optim import Adam, FlatParameters


class Normalise:
    """uint8 photos to the network's input: (N, H, W, 3) to (N, 3, H, W) channels_last, float."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
        self.dtype = dtype

    def __call__(self, images: Tensor) -> Tensor:
        """Return the normalised images. The arithmetic is fp32; the result is rounded once."""
        return (images * self.scale + self.shift).to(self.dtype).permute(0, 3, 1, 2)


class TrainingStep:
    """One optimizer step over a Feed. Calling it does no host work and returns nothing: results are in `sums`.

    Every tensor that it reads or writes between calls is an attribute, allocated once: a captured step is replayed
    without arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: FlatParameters,
        optimizer: Adam,
        feed: Feed,
        normalise: Normalise,
        *,
        batch_size: int,
    ) -> None:
        device = feed.images.device
        self.model, self.parameters, self.optimizer = model, parameters, optimizer
        self.feed, self.normalise = feed, normalise
        self.batch_size = batch_size
        self.offsets = torch.arange(batch_size, device=device)
        self.weights = torch.ones(batch_size, device=device)
        self.sums = Sums(device)

    def __call__(self) -> None:
        """Train on the batch at the feed's cursor and move the cursor behind it."""
        feed = self.feed
        photos = feed.permutation.index_select(0, feed.cursor + self.offsets)
        images = feed.images.index_select(0, photos)  # (N, H, W, 3) uint8
        labels = feed.labels.index_select(0, photos)  # (N,)
        logits, losses = forward(self.model, self.normalise, images, labels)
        gradients = torch.autograd.grad(losses.mean(), self.parameters.parameters)
        self.parameters.set_gradients(gradients)
        self.optimizer.step()
        self.sums.add(losses.detach(), logits.detach().argmax(1) == labels, self.weights)
        feed.cursor.add_(self.batch_size)


def forward(model: nn.Module, normalise: Normalise, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, num_classes) fp32 logits and (N,) cross-entropy of a uint8 batch."""
    with precision(images.device, normalise.dtype):
        logits = model(normalise(images)).float()
    return logits, F.cross_entropy(logits, labels, reduction="none")


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Return autocast to a 16-bit type, or nothing for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
