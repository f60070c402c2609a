"""Bias, activation, 2x2 max pool and batch norm of a block as one differentiable function of its convolution's sums.

Importing this needs triton. On a CPU the kernels run under TRITON_INTERPRET=1, for tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastcnn.network.kernels import launch
from fastcnn.network.kernels.activations import ACTIVATIONS
from fastcnn.network.kernels.launch import Launch
from fastcnn.network.kernels.pool_norm import pool_backward, pool_forward
from fastcnn.network.kernels.tiles import INTERPRETED

MAX_COLUMNS = 64
"""Blocks of channels for which `counters` has room."""


class Norm(NamedTuple):
    """Batch norm in training mode: (C,) fp32 each."""

    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


def new_counters(device: torch.device) -> Tensor:
    """Return the counters by which the programs of a launch wait for each other; launches in turn may share them."""
    return torch.zeros(3 * MAX_COLUMNS, dtype=torch.int32, device=device)


def pool_norm(convolved: Tensor, bias: Tensor, activation: str, norm: Norm | None, counters: Tensor) -> Tensor:
    """Return (N, C, H / 2, W / 2): pooled, biased, activated and normalised; running statistics are updated.

    Args:
        convolved: (N, C, H, W) sums of a convolution without bias, channels_last, fp32, bf16 or fp16, sides even.
        bias: (C,) of the same type.
        activation: a name in `ACTIVATIONS`.
        norm: batch norm that follows, by the statistics of this batch; None: none.
        counters: see `new_counters`.
    """
    weights = (norm.gamma, norm.beta) if norm else (None, None)
    result: Tensor = _PoolNorm.apply(convolved, bias, *weights, (activation, norm, counters))  # type: ignore[no-untyped-call]
    return result


class _PoolNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        convolved: Tensor,
        bias: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        options: tuple[str, Norm | None, Tensor],
    ) -> Tensor:
        activation, norm, counters = options
        convolved = convolved.contiguous(memory_format=torch.channels_last)
        _, channels, height, width = convolved.shape
        z = _map(convolved, height // 2, width // 2)
        argument, index = torch.empty_like(z), torch.empty_like(z, dtype=torch.uint8)
        moments = bias.new_empty((2, channels), dtype=torch.float32) if norm else None
        shape, grid, warps = _shape(z)
        function = ACTIVATIONS[activation]
        arguments = {
            "convolved": convolved,
            "bias": bias,
            "argument": argument,
            "index": index,
            "z": z,
            "partial": bias.new_empty((grid[0], 3, channels), dtype=torch.float32) if norm else None,
            "moments": moments,
            "gamma": gamma,
            "beta": beta,
            "running_mean": norm.running_mean if norm else None,
            "running_var": norm.running_var if norm else None,
            "counters": counters,
            "momentum": norm.momentum if norm else 0.0,
            "eps": norm.eps if norm else 0.0,
            "VALUE": function.value,
            "MONOTONE": function.monotone,
            "NORM": norm is not None,
            **shape,
        }
        _launch(pool_forward, grid, arguments, warps, ("POOL", "NORMALISE") if norm else ("POOL",))
        ctx.save_for_backward(argument, index, moments, gamma, bias, counters)
        ctx.activation = activation
        return z

    @staticmethod
    def backward(ctx: Any, d_z: Tensor) -> tuple[Tensor | None, ...]:
        argument, index, moments, gamma, bias, counters = ctx.saved_tensors
        d_z = d_z.contiguous(memory_format=torch.channels_last)
        _, channels, height, width = argument.shape
        d_convolved = _map(argument, 2 * height, 2 * width)
        d_bias = torch.empty_like(bias)
        d_gamma, d_beta = (None, None) if gamma is None else (torch.empty_like(gamma), torch.empty_like(gamma))
        shape, grid, warps = _shape(argument)
        function = ACTIVATIONS[ctx.activation]
        arguments = {
            "d_z": d_z,
            "argument": argument,
            "index": index,
            "moments": moments,
            "gamma": gamma,
            "d_convolved": d_convolved,
            "d_bias": d_bias,
            "d_gamma": d_gamma,
            "d_beta": d_beta,
            "partial": bias.new_empty((grid[0], 3, channels), dtype=torch.float32),
            "counters": counters,
            "VALUE": function.value,
            "SLOPE": function.slope,
            "NORM": gamma is not None,
            **shape,
        }
        _launch(pool_backward, grid, arguments, warps, ("SPREAD",) if gamma is None else ("REDUCE", "SPREAD"))
        return d_convolved, d_bias, d_gamma, d_beta, None


def _map(like: Tensor, height: int, width: int) -> Tensor:
    """Return an empty (N, C, height, width) in channels_last."""
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _shape(pooled: Tensor) -> tuple[dict[str, int], tuple[int, int], int]:
    """Return the kernel arguments for a pooled map, the grid and the number of warps."""
    count, channels, height, width = pooled.shape
    num_windows, columns = count * height * width, min(64, triton.next_power_of_2(channels))
    if INTERPRETED:  # an operation takes the interpreter as long for many values as for one
        windows = triton.next_power_of_2(-(-num_windows // (2 * launch.PRETENDED_PROGRAMS)))
    else:  # eight values a thread, and no multiprocessor without work
        windows = max(16, min(4096 // columns, triton.next_power_of_2(-(-num_windows // 132))))
    across = -(-channels // columns)
    assert across <= MAX_COLUMNS
    grid = launch.num_programs(pooled.device, -(-num_windows // windows), across), across
    shape = {"num_windows": num_windows, "width": width, "WINDOWS": windows, "CHANNELS": columns, "OUT": channels}
    return shape, grid, max(1, min(16, windows * columns // 256))


def _launch(kernel: Any, grid: tuple[int, int], arguments: dict[str, Any], warps: int, passes: tuple[str, ...]) -> None:
    """Run the passes of a kernel: in one launch where programs can wait for each other."""
    names = {name for name in ("POOL", "NORMALISE", "REDUCE", "SPREAD") if name in kernel.arg_names}
    device = arguments["counters"].device
    # Of 16 warps, a thread has 128 registers in any case; told so, the compiler made more of the gradient and spilled.
    alone = kernel is pool_forward or warps < 16
    together = [passes] if launch.can_meet(device) else [(one,) for one in passes]
    for ones in together:
        chosen = {name: name in ones for name in names}
        Launch(kernel, grid, {**arguments, **chosen}, warps, meets=len(ones) > 1, alone=alone).run()
