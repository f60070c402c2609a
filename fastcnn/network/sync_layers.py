"""Batch norm by the statistics of the whole batch of several ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.network.small_cnn import BatchNorm, Block, SmallCNN
from fastcnn.system.ranks import Ranks, detecting_lost_ranks, is_alone


def convert(model: SmallCNN, ranks: Ranks, *, batch_norm: bool) -> None:
    """Replace layers of a model, so that ranks on parts of a batch compute what one process computes on all of it.

    batch_norm: normalise by the statistics of the whole batch; False: each rank by those of its part.
    """
    if ranks.count == 1:
        return
    operators()
    for block in model.blocks:
        assert isinstance(block, Block)
        if batch_norm and isinstance(block.norm, BatchNorm):
            block.norm = SyncBatchNorm(block.norm, ranks)


class SyncBatchNorm(BatchNorm):
    """Batch norm over the batches of all ranks, which have one size.

    torch's own SyncBatchNorm refuses CPUs. This one uses torch's kernels for given statistics and adds the part of the
    gradient that they leave out: the dependence of the statistics on the input.
    """

    def __init__(self, norm: BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.weight.numel(), norm.momentum, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.count = ranks.count

    def forward(self, x: Tensor) -> Tensor:
        """See `BatchNorm.forward`."""
        if not self.training:
            return super().forward(x)
        y, mean, variance = _SyncNorm.apply(x, self.weight, self.bias, self.eps, self.count)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            number = self.count * x.numel() // x.size(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * (number / (number - 1))).to(self.running_var.dtype), self.momentum)
        return y  # type: ignore[no-any-return]


class _SyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0)
        # Chan, Golub and LeVeque (1979): parts of equal size are combined without cancellation.
        every = torch.ops.fastcnn.every_rank(torch.stack([mean, variance]), count)  # (ranks, 2, C)
        mean, variance = every[:, 0].mean(0), every[:, 1].mean(0) + every[:, 0].var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.number = eps, count * x.numel() // x.size(1)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, variance = ctx.saved_tensors
        by_value, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.ops.fastcnn.sum_of_ranks(torch.stack([by_weight, by_bias])) / ctx.number
        deviation = (variance + ctx.eps).rsqrt()
        slope = weight * deviation.square() * sums[0]
        start = weight * deviation * sums[1] - slope * mean
        rest = torch.addcmul(start[:, None, None], x.to(weight.dtype), slope[:, None, None])
        return (by_value - rest).to(x.dtype), by_weight, by_bias, None, None


@functools.cache
def operators() -> torch.library.Library:
    """Register the collectives as operators, which torch.compile does not trace into.

    `torch.library.custom_op` would import dynamo at the first call: seconds on every rank, where nothing is compiled.
    """
    library = torch.library.Library("fastcnn", "DEF")
    for schema, call, shape in (
        ("every_rank(Tensor part, int count) -> Tensor", _every_rank, _every_shape),
        ("sum_of_ranks(Tensor part) -> Tensor", _sum_of_ranks, torch.empty_like),
    ):
        library.define(schema)
        name = schema.partition("(")[0]
        library.impl(name, call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastcnn::{name}", shape, lib=library)
    return library


def _every_rank(part: Tensor, count: int) -> Tensor:
    if is_alone():
        return torch.stack([part] * count)
    parts = _every_shape(part, count)
    with detecting_lost_ranks():
        torch.distributed.all_gather(list(parts.unbind(0)), part)
    return parts


def _every_shape(part: Tensor, count: int) -> Tensor:
    return part.new_empty((count, *part.shape))


def _sum_of_ranks(part: Tensor) -> Tensor:
    whole = part.clone()
    if not is_alone():
        with detecting_lost_ranks():
            torch.distributed.all_reduce(whole)
    return whole
