"""The training step, from gather to metric sums, as one function of device tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.augment import augment
from fastcnn.loader import Feed
from fastcnn.metrics import Sums
from fastcnn.optim import Adam, FlatParameters, LossScale


class Normalise:
    """uint8 photos to the network's input: (N, H, W, 3) to (N, 3, H, W) channels_last, float."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # For a whole row of pixels (W * 3,): broadcasting three numbers takes 3.5 times as long on a CPU.
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device).repeat(image_size)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).repeat(image_size)
        self.dtype = dtype

    def __call__(self, images: Tensor) -> Tensor:
        """Return the normalised images. The arithmetic is fp32; the result is rounded once."""
        rows = images.flatten(2)  # (N, H, W * 3)
        return torch.addcmul(self.shift, rows, self.scale).to(self.dtype).view(images.shape).permute(0, 3, 1, 2)


def forward(model: nn.Module, normalise: Normalise, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N,) cross-entropy and (N,) most probable class of a uint8 batch. This is what is compiled."""
    logits = model(normalise(images)).float()
    return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(1)


class TrainingStep:
    """One optimizer step over a Feed. Calling it does no host work and returns nothing: results are in `sums`.

    Every tensor that it reads or writes between calls is allocated once and listed by `state`: a captured step is
    replayed without arguments.

    Args:
        parameters: the network's.
        optimizer: what updates them.
        feed: the photos.
        normalise: pixels to input; its dtype is the arithmetic's.
        batch_size: photos a step.
        rates: (T,) learning rate of each step of the run.
        augmentations: names in `augment.AUGMENTATIONS`.
        clip_norm: the gradient's largest norm; None leaves it.
        average: (T,) weight of each step's values in their moving average; None keeps none.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        optimizer: Adam,
        feed: Feed,
        normalise: Normalise,
        *,
        batch_size: int,
        rates: Tensor,
        augmentations: Sequence[str] = (),
        clip_norm: float | None = None,
        average: Tensor | None = None,
    ) -> None:
        device = feed.images.device
        self.parameters, self.optimizer, self.feed, self.normalise = parameters, optimizer, feed, normalise
        self.batch_size, self.augmentations, self.clip_norm = batch_size, tuple(augmentations), clip_norm
        self.rates = rates.to(device)
        self.average_weights = None if average is None else average.to(device)
        self.average = None if average is None else parameters.values.clone()
        self.loss_scale = LossScale(device) if normalise.dtype == torch.float16 else None
        self.num_steps = len(feed) // batch_size  # an epoch's: the permutation's tail is dropped
        self.offsets = torch.arange(batch_size, device=device)
        self.weights = torch.ones(batch_size, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # steps done
        self.frozen = torch.zeros((), device=device)  # 1 from the first loss that is no number: no more updates
        self.sums = Sums(device)
        self.forward: Callable[..., tuple[Tensor, Tensor]] = forward  # an engine may put a compiled one here

    def __call__(self) -> None:
        """Train on the batch at the feed's cursor and move the cursor behind it."""
        feed = self.feed
        photos = feed.permutation.index_select(0, feed.cursor + self.offsets)
        images = augment(feed.images.index_select(0, photos), self.augmentations)  # (N, H, W, 3) uint8
        labels = feed.labels.index_select(0, photos)  # (N,)
        losses, guesses = self.forward(self.parameters.compute, self.normalise, images, labels)
        loss = losses.mean()
        objective = loss if self.loss_scale is None else loss * self.loss_scale.scale
        self.parameters.set_gradients(torch.autograd.grad(objective, self.parameters.inputs))
        self._update(loss.detach())
        self.sums.add(losses.detach(), guesses == labels, self.weights)
        feed.cursor.add_(self.batch_size)
        self.number.add_(1)

    def state(self) -> list[Tensor]:
        """Return every tensor that outlives a call and is changed by it."""
        parameters, optimizer = self.parameters, self.optimizer
        tensors = [
            parameters.values,
            parameters.gradient,
            parameters.low,
            *parameters.model.buffers(),
            *optimizer.state_dict().values(),
            *(self.loss_scale.state() if self.loss_scale else ()),
            self.average,
            self.feed.cursor,
            self.number,
            self.frozen,
            self.sums.values,
        ]
        return [tensor for tensor in tensors if tensor is not None]

    def _update(self, loss: Tensor) -> None:
        parameters, optimizer, gradient = self.parameters, self.optimizer, self.parameters.gradient
        torch.maximum(self.frozen, torch.ne(loss - loss, 0).to(self.frozen.dtype), out=self.frozen)
        skip = self.frozen
        if self.loss_scale is not None:
            gradient.div_(self.loss_scale.scale)
            overflow = (~gradient.isfinite().all()).to(skip.dtype)
            self.loss_scale.update(overflow)
            skip = torch.maximum(skip, overflow)
        if self.clip_norm is not None:
            gradient.mul_((self.clip_norm / (gradient.norm() + 1e-6)).clamp(max=1))
        optimizer.lr.copy_(self.rates.index_select(0, self.number).squeeze(0))
        optimizer.step(skip)
        parameters.refresh()
        if self.average is not None and self.average_weights is not None:
            self.average.lerp_(parameters.values, self.average_weights.index_select(0, self.number))
