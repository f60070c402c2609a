"""Forward of the network by fused blocks: the same parameters and results, without full-size maps in memory."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcnn.network.pixels import Normalise, UnreadBatch
from fastcnn.network.small_cnn import BatchNorm, Block, SmallCNN
from fastcnn.network.sync_layers import SyncBatchNorm

Forward = Callable[..., tuple[Tensor, Tensor]]


def unavailable(device: torch.device) -> str:
    """Return the reason why fused kernels cannot run on a device; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"it needs compute capability 8.0, and this GPU has {major}.{minor}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "it needs an NVIDIA GPU"


def refusals(model: SmallCNN) -> list[str]:
    """Return for each block the reason why it takes the plain path; "" where it is fused."""
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
    out, into = block.conv.out_channels, block.conv.in_channels
    if block.conv.kernel_size != (3, 3):
        return f"its kernel is {block.conv.kernel_size[0]}x{block.conv.kernel_size[1]}, not 3x3"
    if out % 16 or (into != 3 and into % 16):
        return f"its channels, {into} to {out}, are not multiples of 16"
    if side % 2:
        return f"its side, {side}, is odd"
    if isinstance(block.norm, SyncBatchNorm):
        return "its batch norm takes the statistics of several devices (--no-sync-batch-norm: of each its own)"
    if block.conv.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its type is {block.conv.weight.dtype}"
    return ""


class FusedForward:
    """Forward function of a training step with fused blocks; it accepts unread batches, too."""

    def __init__(self, plain: Forward) -> None:
        self.plain = plain

    def __call__(
        self, model: SmallCNN, normalise: Normalise, images: Tensor | UnreadBatch, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """Return losses and predictions, as the plain forward does."""
        return self.plain(functools.partial(logits, model, normalise), _as_it_is, images, *rest)


def _as_it_is(images: Any) -> Any:
    return images


def logits(model: SmallCNN, normalise: Normalise, images: Tensor | UnreadBatch) -> Tensor:
    """Return (N, num_classes) logits of uint8 images (N, H, W, 3), or of an unread batch.

    The batch norm of a block is applied by the next block while it loads. `x` is therefore pooled but not yet
    normalised; `moments` (2, C), mean and 1 / deviation, and the norm module `due` say how to do that.
    """
    x: Tensor | None = None  # (N, H, W, C)
    moments: Tensor | None = None
    due: BatchNorm | None = None
    norms: list[tuple[BatchNorm, Tensor, Tensor]] = []
    for block, refusal in zip(model.blocks, refusals(model), strict=True):
        assert isinstance(block, Block)
        if refusal:
            planar = normalise(_read(images)) if x is None else _normalised(x, moments, due)
            x, moments, due = block(planar).permute(0, 2, 3, 1).contiguous(), None, None
            continue
        x, batch_moments, variance = _fused(block, x, moments, due, normalise, images)
        due = block.norm if isinstance(block.norm, BatchNorm) else None
        moments = None
        if due is not None and model.training:
            moments = batch_moments
            norms.append((due, batch_moments, variance))
        elif due is not None:
            moments = torch.stack([due.running_mean, (due.running_var + due.eps).rsqrt()])
    assert x is not None
    _record(norms)
    features = _normalised(x, moments, due).flatten(1)
    return model.output(model.dropout(model.activation(model.dense(features))))  # type: ignore[no-any-return]


def _fused(
    block: Block,
    x: Tensor | None,
    moments: Tensor | None,
    due: BatchNorm | None,
    normalise: Normalise,
    images: Tensor | UnreadBatch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled values (N, H / 2, W / 2, K) of a block, their moments (2, K) and unbiased variances (K,)."""
    from fastcnn.network.kernels import block_operators

    norm = block.norm
    own = block.name, isinstance(norm, BatchNorm) and block.training, norm.eps if isinstance(norm, BatchNorm) else 0.0
    weights = block.conv.weight, block.conv.bias
    if x is None:
        batch = images if isinstance(images, UnreadBatch) else UnreadBatch(images, None, None)
        made = block_operators.first_block(*batch, normalise.colours, *weights, *own)
    else:
        scale = (None, None) if due is None else (due.weight, due.bias)
        made = block_operators.block(x, moments, *scale, *weights, *own)
    pooled, _, _, batch_moments, variance = made
    return pooled, batch_moments, variance


def _normalised(x: Tensor, moments: Tensor | None, due: BatchNorm | None) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W) in channels_last, normalised by the norm that is due."""
    if due is not None and moments is not None:
        scale = moments[1] * due.weight
        x = ((x.float() - moments[0]) * scale + due.bias).to(x.dtype)
    return x.permute(0, 3, 1, 2)


def _record(norms: list[tuple[BatchNorm, Tensor, Tensor]]) -> None:
    """Move the running statistics towards those of a batch, all in one kernel."""
    if not norms:
        return
    with torch.no_grad():
        running = [tensor for norm, _, _ in norms for tensor in (norm.running_mean, norm.running_var)]
        batch = [tensor.detach() for _, moments, variance in norms for tensor in (moments[0], variance)]
        move_towards(running, batch, norms[0][0].momentum)


@torch.library.custom_op("fastcnn::move_towards", mutates_args=("running",))
def move_towards(running: list[Tensor], batch: list[Tensor], share: float) -> None:
    """Move tensors a fraction of the way to others; an operator, as a compiler would launch a kernel for each."""
    torch._foreach_lerp_(running, batch, share)


@move_towards.register_fake
def _(running: list[Tensor], batch: list[Tensor], share: float) -> None:
    pass


def _read(images: Tensor | UnreadBatch) -> Tensor:
    return images.read() if isinstance(images, UnreadBatch) else images
