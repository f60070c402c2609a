"""Gradients of the fused blocks, as operators of their own: see `block_operators`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcnn.network.kernels import autotune, backward
from fastcnn.network.kernels.activations import ACTIVATIONS
from fastcnn.network.kernels.autotune import Launch, Maps

NOTHING = 0  # length of an output that this block does not have


@torch.library.custom_op("fastcnn::block_backward", mutates_args=())
def block_backward(
    d_pooled: Tensor,
    d_moments: Tensor | None,
    x: Tensor,
    moments_in: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    pooled: Tensor,
    index: Tensor,
    slopes: Tensor,
    moments: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of weight and bias in one piece, and (4, C) of moments_in, gamma and beta."""
    maps = Maps(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3], weight.shape[0])
    num_parameters = (9 * maps.into + 1) * maps.out
    length = num_parameters + (4 * maps.into if moments_in is not None else 0)
    num_programs = autotune.reducers(x.device, maps)
    partial = x.new_empty((num_programs, length), dtype=torch.float32)
    d_x = torch.empty_like(x)
    d_parameters = weight.new_empty(num_parameters)
    d_norm = x.new_empty((4, maps.into) if moments_in is not None else NOTHING, dtype=torch.float32)
    upstream = _upstream(d_pooled, d_moments, (pooled, index, slopes, moments), activation, maps)
    gradients = {"weight": weight, "d_x": d_x, "OUT": maps.out, "PRECISION": upstream["PRECISION"]}
    common = {"x": x, "moments_in": moments_in, "gamma": gamma, "partial": partial, "length": length, "index": index}
    common |= {"d_winner": torch.empty_like(pooled), "INTO": maps.into}
    autotune.run(
        "weight_gradient",
        maps,
        x.dtype,
        lambda tile: Launch(
            backward.weight_gradient,
            (3, num_programs, -(-maps.out // tile.channels) * (maps.into // tile.chunk)),
            {**upstream, **common, "beta": beta, **tile.covering(maps, num_programs), "CHUNK": tile.chunk},
            tile.warps,
            tile.stages,
        ),
    )
    autotune.run(
        "input_gradient",
        maps,
        x.dtype,
        lambda tile: Launch(
            backward.input_gradient,
            (num_programs, -(-maps.into // tile.channels)),
            {**common, **gradients, **tile.covering(maps, num_programs), "CHUNK": tile.chunk},
            tile.warps,
            tile.stages,
        ),
    )
    reduced: dict[str, Any] = {
        "partial": partial,
        "d_parameters": d_parameters,
        "d_norm": d_norm if moments_in is not None else None,
    }
    reduced |= {"num_programs": num_programs, "length": length, "num_parameters": num_parameters}
    Launch(backward.finish_block, (-(-length // 256), 1), {**reduced, "SIZE": 256, "PROGRAMS": 16}).run()
    return d_x, d_parameters, d_norm


@block_backward.register_fake
def _(d_pooled: Tensor, d_moments: Tensor | None, x: Tensor, moments_in: Tensor | None, gamma: Tensor | None,
      beta: Tensor | None, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    norm = (4, x.shape[3]) if moments_in is not None else NOTHING
    return (
        torch.empty_like(x),
        weight.new_empty(weight.numel() + len(weight)),
        x.new_empty(norm, dtype=torch.float32),
    )


@torch.library.custom_op("fastcnn::first_block_backward", mutates_args=())
def first_block_backward(
    d_pooled: Tensor,
    d_moments: Tensor | None,
    images: Tensor,
    photos: Tensor | None,
    moves: Tensor | None,
    colours: Tensor,
    pooled: Tensor,
    index: Tensor,
    slopes: Tensor,
    moments: Tensor,
    activation: str,
) -> Tensor:
    """Return the gradients of weight and bias in one piece."""
    maps = Maps(pooled.shape[0], pooled.shape[1], pooled.shape[2], 3, pooled.shape[3])
    num_programs, length = autotune.reducers(pooled.device, maps), 49 * maps.out
    partial = pooled.new_empty((num_programs, length), dtype=torch.float32)
    d_parameters = pooled.new_empty(28 * maps.out)
    shared = _upstream(d_pooled, d_moments, (pooled, index, slopes, moments), activation, maps)
    shared |= {"images": images, "photos": photos, "moves": moves, "colours": colours}
    shared |= {"partial": partial, "length": length}
    autotune.run(
        "first_weight_gradient",
        maps,
        pooled.dtype,
        lambda tile: Launch(
            backward.first_weight_gradient,
            (num_programs, -(-maps.out // tile.channels)),
            {**shared, **tile.covering(maps, num_programs)},
            tile.warps,
            tile.stages,
        ),
    )
    arguments = {"partial": partial, "colours": colours, "d_parameters": d_parameters, "num_programs": num_programs}
    arguments |= {"length": length, "OUT": maps.out, "SIZE": 128, "PROGRAMS": 16}
    Launch(backward.finish_first, (-(-28 * maps.out // 128), 1), arguments).run()
    return d_parameters


@first_block_backward.register_fake
def _(d_pooled: Tensor, *rest: object) -> Tensor:
    return d_pooled.new_empty(28 * d_pooled.shape[3])


def _upstream(
    d_pooled: Tensor,
    d_moments: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    activation: str,
    maps: Maps,
) -> dict[str, Any]:
    """Return the kernel arguments from which every gradient of a block begins: its outputs and their gradients."""
    pooled, index, slopes, moments = outputs
    function = ACTIVATIONS[activation]
    return {
        "d_pooled": d_pooled.contiguous(),
        "d_moments": None if d_moments is None else d_moments.contiguous(),  # of a sum, it is one number expanded
        "moments": moments,
        "pooled": pooled,
        "slopes": slopes,
        "index": index,
        "num_values": maps.photos * maps.height * maps.width,
        "OUT": maps.out,
        "SLOPE": function.slope,
        "SAVED": function.saved,
        "PRECISION": autotune.precision(pooled.dtype),
    }
