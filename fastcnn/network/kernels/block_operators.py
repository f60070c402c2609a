"""Fused blocks as operators: batch norm of the block before, 3x3 convolution, activation, 2x2 max pool, statistics.

`block` reads what another block has pooled and normalises it while loading; `first_block` reads uint8 photos. Both
write the pooled values and two bits for each that say where it came from, never a map of full size; their gradients
are operators too, so torch.compile and CUDA graphs take them as they are. Sums are fp32 and repeat to the bit.

Importing this needs triton. On a CPU the kernels run under TRITON_INTERPRET=1, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcnn.network.kernels import autotune, forward
from fastcnn.network.kernels.activations import ACTIVATIONS
from fastcnn.network.kernels.autotune import Launch, Maps, Tile
from fastcnn.network.kernels.block_gradients import NOTHING, block_backward, first_block_backward

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastcnn::block", mutates_args=())
def block(
    x: Tensor,
    moments_in: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return pooled values, indices of the window maxima, slopes, moments and unbiased variances.

    Args:
        x: (N, H, W, C) fp32, bf16 or fp16, contiguous, sides even, C a multiple of 16.
        moments_in: (2, C) fp32 mean and 1 / deviation by which x is normalised while it is loaded; None leaves it.
        gamma, beta: (C,) fp32 of the same norm.
        weight: (K, C, 3, 3) in channels_last, of the type of x; K a multiple of 16.
        bias: (K,).
        activation: a name in `ACTIVATIONS`.
        statistics: whether to take the moments of what is pooled.
        eps: what is added to the variances in them.

    Returns (N, H / 2, W / 2, K) pooled; (..., K / 4) uint8, two bits each; slopes as pooled where the activation's
    are saved; (2, K) and (K,) fp32. Outputs that a block does not have are of length 0.
    """
    maps = Maps(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3], weight.shape[0])
    assert x.is_contiguous()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    out = _outputs(x, maps, activation, statistics)
    arguments = {"x": x, "moments": moments_in, "gamma": gamma, "beta": beta, "weight": weight, "bias": bias}
    _forward(forward.block_forward, maps, arguments, out, activation, statistics, eps)
    return out


@torch.library.custom_op("fastcnn::first_block", mutates_args=())
def first_block(
    images: Tensor,
    photos: Tensor | None,
    moves: Tensor | None,
    colours: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of `block` for uint8 images, which are normalised, mirrored and shifted while loading.

    Args:
        images: (M, H, W, 3) uint8, contiguous, sides even.
        photos: (N,) int64 indices into `images`; None: all, in order.
        moves: (N, 3) int32 as in `UnreadBatch`; None: none. The edge is repeated.
        colours: (3, 3) fp32: rows of integers to subtract, of scales, and of offsets to add.
        weight, bias, activation, statistics, eps: see `block`.
    """
    count = len(images) if photos is None else len(photos)
    maps = Maps(count, images.shape[1] // 2, images.shape[2] // 2, 3, weight.shape[0])
    assert images.is_contiguous()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    out = _outputs(weight, maps, activation, statistics)
    arguments = {
        "images": images,
        "photos": photos,
        "moves": moves,
        "colours": colours,
        "weight": weight,
        "bias": bias,
    }
    _forward(forward.first_forward, maps, arguments, out, activation, statistics, eps)
    return out


def _outputs(like: Tensor, maps: Maps, activation: str, statistics: bool) -> Outputs:
    """Return empty outputs of a block: pooled, index, slopes, moments, variance."""
    shape = maps.photos, maps.height, maps.width, maps.out
    return (
        like.new_empty(shape),
        like.new_empty((*shape[:3], maps.out // 4), dtype=torch.uint8),
        like.new_empty(shape if ACTIVATIONS[activation].saved else NOTHING),
        like.new_empty((2, maps.out) if statistics else NOTHING, dtype=torch.float32),
        like.new_empty(maps.out if statistics else NOTHING, dtype=torch.float32),
    )


def _forward(
    kernel: Any,
    maps: Maps,
    inputs: dict[str, Any],
    out: Outputs,
    activation: str,
    statistics: bool,
    eps: float,
) -> None:
    pooled, index, slopes, moments, variance = out
    function = ACTIVATIONS[activation]
    constants = {
        "OUT": maps.out,
        "VALUE": function.value,
        "SLOPE": function.slope,
        "MONOTONE": function.monotone,
        "SAVED": function.saved,
        "STATISTICS": statistics,
        "PRECISION": autotune.precision(pooled.dtype),
    }
    most = autotune.most_programs(pooled.device)
    partial = pooled.new_empty((most, 3, maps.out) if statistics else NOTHING, dtype=torch.float32)
    outputs = {"pooled": pooled, "index": index, "slopes": slopes, "partial": partial}
    first = kernel is forward.first_forward

    def prepare(tile: Tile) -> Launch:
        sizes: dict[str, Any] = tile.covering(maps, most)
        chunks = {} if first else {"CHUNK": tile.chunk, "INTO": maps.into}
        grid = tile.num_programs(maps, most), -(-maps.out // tile.channels)
        return Launch(kernel, grid, {**inputs, **outputs, **constants, **sizes, **chunks}, tile.warps, tile.stages)

    launch = autotune.run("first_forward" if first else "block_forward", maps, pooled.dtype, prepare)
    if statistics:
        Launch(
            forward.finish_statistics,
            (-(-maps.out // 16), 1),
            {
                "partial": partial,
                "moments": moments,
                "variance": variance,
                "num_programs": launch.grid[0],
                "eps": eps,
                "OUT": maps.out,
                "CHANNELS": 16,
                "PROGRAMS": 64,
            },
        ).run()


@block.register_fake
def _(
    x: Tensor,
    moments_in: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    statistics: bool,
    eps: float,
) -> Outputs:
    maps = Maps(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3], weight.shape[0])
    return _outputs(x, maps, activation, statistics)


@first_block.register_fake
def _(
    images: Tensor,
    photos: Tensor | None,
    moves: Tensor | None,
    colours: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    statistics: bool,
    eps: float,
) -> Outputs:
    count = len(images) if photos is None else len(photos)
    maps = Maps(count, images.shape[1] // 2, images.shape[2] // 2, 3, weight.shape[0])
    return _outputs(weight, maps, activation, statistics)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the tensors of the gradient. Pooled values and moments alone are differentiable."""
    *tensors, activation, _, _ = inputs
    pooled, index, slopes, moments, variance = output
    ctx.mark_non_differentiable(index, slopes, variance)
    ctx.set_materialize_grads(False)  # zeros of the size of each output, else
    ctx.save_for_backward(*tensors, pooled, index, slopes, moments)
    ctx.activation = activation


def _block_gradients(ctx: Any, d_pooled: Tensor, _: None, __: None, d_moments: Tensor | None, ___: None) -> Any:
    x, moments_in, gamma, beta, weight, _bias, *output = ctx.saved_tensors
    d_x, d_parameters, d_norm = block_backward(
        d_pooled, d_moments, x, moments_in, gamma, beta, weight, *output, ctx.activation
    )
    norm = (None, None, None) if moments_in is None else (d_norm[:2], d_norm[2], d_norm[3])
    return d_x, *norm, *_unpacked(d_parameters, weight), None, None, None


def _first_gradients(ctx: Any, d_pooled: Tensor, _: None, __: None, d_moments: Tensor | None, ___: None) -> Any:
    images, photos, moves, colours, weight, _bias, *output = ctx.saved_tensors
    d_parameters = first_block_backward(
        d_pooled, d_moments, images, photos, moves, colours, *output, ctx.activation
    )  # fmt: skip
    return None, None, None, None, *_unpacked(d_parameters, weight), None, None, None


def _unpacked(d_parameters: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a channels_last weight and of a bias, as views."""
    out, into, height, width = weight.shape
    d_weight, d_bias = d_parameters.split([weight.numel(), out])
    return d_weight.view(out, height, width, into).permute(0, 3, 1, 2), d_bias


block.register_autograd(_block_gradients, setup_context=_keep)
first_block.register_autograd(_first_gradients, setup_context=_keep)
