"""Forward by a library's convolutions with kernels of our own around them: the same parameters, the same results.

A block is its convolution, without bias, and one kernel for all else; the dense layers and the loss of a small batch
are one kernel. A map of full size is written once and read once, forward as backward; no index takes 64 bits.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.network.masked_dropout import MaskedDropout
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import BatchNorm, Block, SmallCNN
from fastcnn.network.sync_layers import SyncBatchNorm

Forward = Callable[..., tuple[Tensor, Tensor]]


def unavailable(device: torch.device) -> str:
    """Return the reason why the kernels cannot run on a device; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"it needs compute capability 8.0, and this GPU has {major}.{minor}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "it needs an NVIDIA GPU"


def refusals(model: SmallCNN) -> list[str]:
    """Return for each block the reason why it takes the plain path; "" where the kernels take it."""
    side, found = int(str(model.options["image_size"])), []
    for block in model.blocks:
        assert isinstance(block, Block)
        found.append(_refusal(block, side))
        side //= 2
    return found


def plain_blocks(model: SmallCNN) -> str:
    """Return a sentence that names the blocks on the plain path, with reasons; "" where there is none."""
    found = [f"block {number} takes the plain path: {why}" for number, why in enumerate(refusals(model), 1) if why]
    return "; ".join(found)


def _refusal(block: Block, side: int) -> str:
    if side % 2:
        return f"its side, {side}, is odd"
    if isinstance(block.norm, SyncBatchNorm):
        return "its batch norm takes the statistics of several devices (--no-sync-batch-norm: of each its own)"
    if block.conv.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its type is {block.conv.weight.dtype}"
    return ""


class HybridForward:
    """Forward function of a training step.

    plain: for what the kernels do not take.
    counters: see `pool_norm_layer.new_counters`.
    """

    def __init__(self, plain: Forward, counters: Tensor) -> None:
        self.plain, self.counters = plain, counters

    def __call__(
        self,
        model: SmallCNN,
        normalise: Normalise,
        images: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return losses and predictions, as the plain forward does.

        images: (N, H, W, 3) uint8, or (N, 3, H, W) that are normalised already.
        """
        from fastcnn.network.kernels import head_layer

        x = images if images.is_floating_point() else normalise(images)
        for block, refusal in zip(model.blocks, refusals(model), strict=True):
            x = block(x) if refusal else self._block(block, x)  # type: ignore[arg-type]
        if not head_layer.usable(x, model.dense, model.output):
            return self.plain(_head(model), _as_it_is, x, targets, label_smoothing, class_weights)
        dropped = model.dropout.mask if isinstance(model.dropout, MaskedDropout) else None
        activation = str(model.options["activation"])
        loss = head_layer.Loss(targets, label_smoothing, class_weights)
        return head_layer.head(x, model.dense, model.output, activation, dropped, loss, self.counters)

    def _block(self, block: Block, x: Tensor) -> Tensor:
        from fastcnn.network.kernels.pool_norm_layer import Norm, pool_norm

        conv, layer = block.conv, block.norm
        norm = None
        if isinstance(layer, BatchNorm):
            norm = Norm(layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.momentum, layer.eps)
        assert conv.bias is not None
        sums = F.conv2d(x, conv.weight, None, padding=conv.padding)
        return pool_norm(sums, conv.bias, block.name, norm, self.counters)


def _head(model: SmallCNN) -> Callable[[Tensor], Tensor]:
    return lambda x: model.output(model.dropout(model.activation(model.dense(x.flatten(1)))))


def _as_it_is(x: Any) -> Any:
    return x
