"""The training step, from gather to metric sums, as one function of device tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.data.feeds import Feed, SamplingWeights
from fastcnn.network.masked_dropout import MaskedDropout
from fastcnn.network.pixels import Normalise
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.training.augment import Augment, Batch
from fastcnn.training.metrics import Sums
from fastcnn.training.optimizers import LossScale, Optimizer
from fastcnn.training.parameters import FlatParameters


def forward(
    model: nn.Module,
    normalise: Normalise,
    images: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (N,) cross-entropy losses and (N,) most probable classes of a uint8 batch.

    targets: (N,) int64 labels, or (N, num_classes) class probabilities.
    """
    logits = model(normalise(images))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, weight=class_weights, reduction="none", label_smoothing=label_smoothing)
    return losses, logits.detach().argmax(1)


@dataclass(frozen=True, kw_only=True)
class StepFunctions:
    """Functions that a step calls in turn, each one graph of fixed shapes to a compiler.

    A step offers its plain ones; an engine builds its own from them and gives them to each call of the step.
    """

    read: Callable[[], tuple[Batch, Tensor]] | None = None
    """Returns batch and targets; None where the step reads it itself."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    """The one with a backward: see `forward`."""
    collect: Callable[[Sequence[Tensor], Tensor], None] | None = None
    """Gradients and losses (N,) into the flat buffer; None where nothing is trained."""
    update: Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], None] | None = None
    """Losses, predictions and labels (N,), and buffers before the batch: updates weights and sums."""


def takes_weights(losses: Tensor) -> bool:
    """Whether the gradient of losses is taken with given weights, for which a GPU has no kernel more.

    On a CPU it is that of their dot product, the same to the bit: given weights, torch first imports sympy, which takes
    a third of a second.
    """
    return losses.is_cuda


class TrainingStep:
    """One optimizer step over a Feed. Calling it does no host work and returns nothing: results are in `sums`.

    Every tensor that it reads or writes between calls is allocated once and listed by `state`: a captured step is
    replayed without arguments.

    It calls its `StepFunctions` in turn. Between `collect` and `update` the ranks add their gradients.

    Args:
        parameters: those of the network.
        optimizer: updates the parameters.
        feed: training images and labels.
        normalise: uint8 pixels to network input; its dtype is that of the arithmetic.
        batch_size: images per step, on all ranks together.
        lr_schedule: (T,) learning rate of each step of the run.
        augment: gathers and augments a batch; None gathers it unchanged.
        label_smoothing: fraction of each label that is spread over all classes.
        class_weights: (num_classes,) weights of the losses, 1 on average; None: all 1.
        limit: most steps per epoch; None: all.
        clip_norm: largest norm of the gradient; None: no limit.
        skip_nan: skip a step that gives no finite loss and weights, and go on; False: update nothing from that loss on.
        average: (T,) weight of each step's values in their moving average; None: no average.
        ranks: processes that take each step together, each with its part of the batch.
        generator: draws the masks of dropout; None: torch's own.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        optimizer: Optimizer,
        feed: Feed,
        normalise: Normalise,
        *,
        batch_size: int,
        lr_schedule: Tensor,
        augment: Augment | None = None,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        limit: int | None = None,
        clip_norm: float | None = None,
        skip_nan: bool = False,
        average: Tensor | None = None,
        ranks: Ranks = ALONE,
        generator: torch.Generator | None = None,
    ) -> None:
        device = feed.images.device
        self.parameters, self.optimizer, self.feed, self.normalise = parameters, optimizer, feed, normalise
        self.network = parameters.compute
        self.batch_size, self.clip_norm, self.label_smoothing = batch_size, clip_norm, label_smoothing
        self.skip_nan, self.ranks = skip_nan, ranks
        self.augment = augment or Augment((), feed.images.shape[1])
        wide = torch.promote_types(normalise.dtype, torch.float32)
        self.class_weights = None if class_weights is None else class_weights.to(device, wide)
        self.lr_schedule = lr_schedule.to(device)
        self.average_weights = None if average is None else average.to(parameters.values)
        self.average = None if average is None else parameters.values.clone()
        self.loss_scale = LossScale(device) if normalise.dtype == torch.float16 else None
        # The tail of an epoch's permutation, shorter than a batch, is dropped.
        self.num_steps = min(len(feed) // batch_size, limit or len(feed))
        self.dropout = self._masked_dropout(generator)
        self.generator = generator if self.dropout else None
        batch_per_rank = batch_size // ranks.count
        self.offsets = ranks.rank * batch_per_rank + torch.arange(batch_per_rank, device=device)
        self.sums = Sums(device)
        self.weights = self.sums.values.new_ones(batch_per_rank)
        self.loss_weights = torch.full((batch_per_rank,), 1 / batch_size, dtype=wide, device=device)  # in their mean
        self.draws = torch.zeros(self.augment.num_draws, len(feed), device=device)  # one column per image of the epoch
        self.one_hot = torch.eye(parameters.model.output.out_features, dtype=wide, device=device)
        self.step_count = torch.zeros(1, dtype=torch.int64, device=device)  # steps done
        # Steps that updated nothing because a loss was not finite: each of them, or all from the first on.
        self.skipped = torch.zeros((), device=device)

    def start_epoch(self, seed: int, epoch: int, done: int = 0, sampling_weights: SamplingWeights = None) -> Feed:
        """Return the feed at the start of an epoch, or `done` steps into it: see `Feed.start_epoch`."""
        if len(self.draws):
            self.draws.copy_(self.augment.draw(len(self.feed), (seed, epoch), sampling_weights))
        return self.feed.start_epoch(seed, epoch, done * self.batch_size, sampling_weights)

    @property
    def functions(self) -> StepFunctions:
        """The plain functions, by torch's own kernels."""
        return StepFunctions(read=self.read, forward=forward, collect=self.collect, update=self.update)

    def __call__(self, functions: StepFunctions | None = None) -> None:
        """Train on the batch at the feed's cursor, by an engine's functions or the plain ones; move the cursor on."""
        functions = functions or self.functions
        assert functions.read
        assert functions.collect
        assert functions.update
        batch, targets = functions.read()
        if self.dropout:
            self.dropout.draw()
        buffers = [buffer.clone() for buffer in self.network.buffers()] if self.skip_nan else []
        losses, predictions = functions.forward(
            self.network, self.normalise, batch.images, targets, self.label_smoothing, self.class_weights
        )
        # Weighted losses instead of their mean: its derivative would take two more kernels, in fp16 three.
        loss_weights = self.loss_weights if self.loss_scale is None else self.loss_weights * self.loss_scale.scale
        if takes_weights(losses):
            gradients = torch.autograd.grad(losses, self.parameters.inputs, loss_weights)
        else:
            gradients = torch.autograd.grad(torch.dot(losses, loss_weights), self.parameters.inputs)
        functions.collect(gradients, losses.detach())
        self.ranks.sum_(self.parameters.reduced)
        functions.update(losses.detach(), predictions, batch.labels, buffers)

    def read(self) -> tuple[Batch, Tensor]:
        """Return the batch at the feed's cursor and its targets."""
        feed = self.feed
        order = feed.cursor + self.offsets
        photos, draws = feed.permutation.index_select(0, order), self.draws.index_select(1, order)
        batch = self.augment(feed.images, photos, feed.labels.index_select(0, photos), draws)
        return batch, self._targets(batch)

    def collect(self, gradients: Sequence[Tensor], losses: Tensor) -> None:
        """Copy gradients (one per parameter) into the flat gradient, and the sum of the losses (N,) behind it."""
        self.parameters.set_gradients(gradients, losses.sum() if self.ranks.joined else None)

    def update(self, losses: Tensor, predictions: Tensor, labels: Tensor, buffers: Sequence[Tensor]) -> None:
        """Update the weights by the flat gradient, add losses and predictions (N,) to the sums, and advance the cursor.

        buffers: the network's buffers before the batch, restored where the step is skipped; empty unless `skip_nan`.
        """
        skip = self._update(self.parameters.loss if self.ranks.joined else losses.sum())
        weights = self.weights
        if self.skip_nan:
            losses, weights = losses.masked_fill(skip > 0, 0), weights * (1 - skip)
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(torch.where(skip > 0, before, buffer))  # running statistics would stay NaN
        self.sums.add(losses, predictions == labels, weights)
        self.feed.cursor.add_(self.batch_size)
        self.step_count.add_(1)

    def state(self) -> list[Tensor]:
        """Return every tensor that a call changes and the next one reads."""
        parameters, optimizer = self.parameters, self.optimizer
        tensors = [
            parameters.values,
            parameters.reduced,
            parameters.values_16bit,
            *parameters.model.buffers(),
            *optimizer.state_dict().values(),
            *(self.loss_scale.state_dict().values() if self.loss_scale else ()),
            self.average,
            self.feed.cursor,
            self.step_count,
            self.skipped,
            self.sums.values,
        ]
        return [tensor for tensor in tensors if tensor is not None]

    def _masked_dropout(self, generator: torch.Generator | None) -> MaskedDropout | None:
        """Give the network a dropout whose masks this step draws; None where it has no dropout."""
        network = self.network
        if not network.dropout.p:
            return None
        mask = torch.ones(
            (self.batch_size, network.dense.out_features), dtype=self.normalise.dtype, device=self.feed.images.device
        )
        network.dropout = dropout = MaskedDropout(network.dropout.p, mask, self.ranks, generator)
        return dropout

    def _targets(self, batch: Batch) -> Tensor:
        if batch.others is None or batch.share is None:
            return batch.labels
        own, other = self.one_hot.index_select(0, batch.labels), self.one_hot.index_select(0, batch.others)
        return torch.lerp(other, own, batch.share[:, None].to(own.dtype))

    def _update(self, loss: Tensor) -> Tensor:
        """Update the weights; return () 1 where the step gives no finite loss or weights, else 0."""
        parameters, optimizer, gradient = self.parameters, self.optimizer, self.parameters.gradient
        changed = [parameters.values, optimizer.num_updates, *optimizer.moments.values()]
        if self.skip_nan and self.loss_scale is None:
            loss = loss + 0 * gradient.sum()  # an overflowed gradient would make the weights NaN for good
        skipped_now = torch.ne(loss - loss, 0).to(self.skipped.dtype)
        if not self.skip_nan:
            skipped_now = torch.maximum(skipped_now, self.skipped.clamp(max=1))
        skip = skipped_now
        if self.loss_scale is not None:
            gradient.div_(self.loss_scale.scale)
            overflow = (~gradient.isfinite().all()).to(skip.dtype)
            self.loss_scale.update(overflow)
            skip = torch.maximum(skip, overflow)
        if self.clip_norm is not None:
            gradient.mul_((self.clip_norm / (gradient.norm() + 1e-6)).clamp(max=1))
        optimizer.lr.copy_(self.lr_schedule.index_select(0, self.step_count).squeeze(0))
        before = [tensor.clone() for tensor in changed] if self.skip_nan else []
        optimizer.step(skip)
        if self.skip_nan:
            overflowed = (~parameters.values.isfinite().all()).to(skip.dtype)
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(overflowed > 0, old, tensor))
            skipped_now = torch.maximum(skipped_now, overflowed)
        self.skipped.add_(skipped_now)
        parameters.refresh()
        if self.average is not None and self.average_weights is not None:
            self.average.lerp_(parameters.values, self.average_weights.index_select(0, self.step_count))
        return skipped_now
