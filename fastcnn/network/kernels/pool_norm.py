"""Triton kernels around a library's convolution: 2x2 max pool, bias, activation and batch norm, and their gradient.

The convolution has no bias: it is added to the maximum of a window, a quarter of the additions. Forward, a program
pools its windows and gathers their statistics; when all programs have done so, it normalises the same windows. Backward
is likewise one pass for the sums of the norm's gradient and one that writes the gradient of the full-size map. On a GPU
both passes are one launch, whose programs wait for each other in between. Sums are taken in a fixed order and repeat to
the bit. Batch norm: S. Ioffe and C. Szegedy, arXiv:1502.03167.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.network.kernels.synchronisation import arrives_last, await_inputs, meet
from fastcnn.network.kernels.tiles import narrow


@triton.jit
def pool_forward(
    convolved,  # (N, 2 height, 2 width, OUT) sums of the convolution without bias
    bias,  # (OUT,)
    argument,  # (N, height, width, OUT) what the activation is applied to
    index,  # as argument, uint8: which of the four pixels of a window it is from
    z,  # as argument: the result
    partial,  # (programs, 3, OUT) fp32: count, mean and sum of squares around it
    moments,  # (2, OUT) fp32: mean and 1 / deviation of the batch
    gamma,  # (OUT,) fp32, as beta and the running statistics
    beta,
    running_mean,
    running_var,
    counters,  # (channel blocks, 3) int32
    num_windows,
    width,
    momentum,
    eps,
    WINDOWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    VALUE: tl.constexpr,
    MONOTONE: tl.constexpr,
    NORM: tl.constexpr,
    POOL: tl.constexpr,  # the first pass
    NORMALISE: tl.constexpr,  # the second
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < OUT
    if POOL:
        shift = tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
        count = tl.zeros((WINDOWS, 1), tl.float32)
        mean = tl.zeros((WINDOWS, CHANNELS), tl.float32)
        spread = tl.zeros((WINDOWS, CHANNELS), tl.float32)
        for start in range(program * WINDOWS, num_windows, programs * WINDOWS):
            window, place, there = places(start, num_windows, channel, known, WINDOWS, OUT)
            corner = convolved + first_pixels(window, width, channel, OUT)
            best, which = tl.load(corner, there, 0.0).to(tl.float32), tl.zeros((WINDOWS, CHANNELS), tl.int32)
            if not MONOTONE:
                best += shift
            score = best if MONOTONE else VALUE(best)
            for number in tl.static_range(1, 4):
                pixel = number // 2 * 2 * width + number % 2
                one = tl.load(corner + pixel * OUT, there, 0.0).to(tl.float32)
                if not MONOTONE:
                    one += shift
                its_score = one if MONOTONE else VALUE(one)
                better = (its_score > score) | (its_score != its_score)  # the first of equal ones, and NaN over all
                best, score = tl.where(better, one, best), tl.where(better, its_score, score)
                which = tl.where(better, number, which)
            if MONOTONE:
                best += shift
            best = narrow(best, argument.dtype.element_ty)
            tl.store(argument + place, best, there)
            tl.store(index + place, which.to(tl.uint8), there)
            y = VALUE(best.to(tl.float32))
            if NORM:
                count += (window < num_windows).to(tl.float32)[:, None]
                apart = tl.where(there, y - mean, 0.0)
                mean += apart / tl.maximum(count, 1.0)
                spread += apart * (y - mean)
            else:
                tl.store(z + place, narrow(y, z.dtype.element_ty), there)
        if NORM:
            own, deviations = merged_rows(count, mean, spread, WINDOWS)
            row = partial + program * (3 * OUT) + channel
            tl.store(row, tl.zeros((CHANNELS,), tl.float32) + tl.sum(count), known)
            tl.store(row + OUT, own, known)
            tl.store(row + 2 * OUT, deviations, known)
    if POOL and NORMALISE:
        meet(counters + 3 * tl.program_id(1), programs)
    if NORMALISE:
        mean, variance, count = batch_moments(partial, programs, channel, known, OUT, CHANNELS)
        deviation = 1 / tl.sqrt(variance + eps)
        if program == 0:
            tl.store(moments + channel, mean, known)
            tl.store(moments + OUT + channel, deviation, known)
            before = tl.load(running_mean + channel, known, 0.0)
            tl.store(running_mean + channel, before + momentum * (mean - before), known)
            before = tl.load(running_var + channel, known, 0.0)
            unbiased = variance * (count / tl.maximum(count - 1, 1.0))
            tl.store(running_var + channel, before + momentum * (unbiased - before), known)
        scale, offset = deviation * tl.load(gamma + channel, known, 0.0), tl.load(beta + channel, known, 0.0)
        for start in range(program * WINDOWS, num_windows, programs * WINDOWS):
            _, place, there = places(start, num_windows, channel, known, WINDOWS, OUT)
            y = VALUE(tl.load(argument + place, there, 0.0).to(tl.float32))
            tl.store(
                z + place, narrow((y - mean[None, :]) * scale[None, :] + offset[None, :], z.dtype.element_ty), there
            )


@triton.jit
def pool_backward(
    d_z,  # (N, height, width, OUT)
    argument,
    index,
    moments,
    gamma,
    d_convolved,  # (N, 2 height, 2 width, OUT)
    d_bias,  # (OUT,)
    d_gamma,  # (OUT,) fp32, as d_beta
    d_beta,
    partial,  # (programs, 3, OUT) fp32: sums of d_z, of d_z * (y - mean), and of the bias's gradient
    counters,
    num_windows,
    width,
    WINDOWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    NORM: tl.constexpr,
    REDUCE: tl.constexpr,  # the first pass: there with NORM alone
    SPREAD: tl.constexpr,  # the second
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < OUT
    row = partial + program * (3 * OUT) + channel
    counter = counters + 3 * tl.program_id(1)
    if NORM:
        mean = tl.load(moments + channel, known, 0.0)[None, :]
    if REDUCE:
        total = tl.zeros((WINDOWS, CHANNELS), tl.float32)
        product = tl.zeros((WINDOWS, CHANNELS), tl.float32)
        for start in range(program * WINDOWS, num_windows, programs * WINDOWS):
            _, place, there = places(start, num_windows, channel, known, WINDOWS, OUT)
            g = tl.load(d_z + place, there, 0.0).to(tl.float32)
            total += g
            product += g * (VALUE(tl.load(argument + place, there, 0.0).to(tl.float32)) - mean)
        tl.store(row, tl.sum(total, 0), known)
        tl.store(row + OUT, tl.sum(product, 0), known)
    if REDUCE and SPREAD:
        meet(counter, programs)
    if SPREAD:
        if NORM:
            deviation = tl.load(moments + OUT + channel, known, 0.0)
            total = column_sums(partial, programs, channel, known, OUT, CHANNELS)
            product = column_sums(partial + OUT, programs, channel, known, OUT, CHANNELS) * deviation
            if program == 0:
                tl.store(d_beta + channel, total, known)
                tl.store(d_gamma + channel, product, known)
            scale = (deviation * tl.load(gamma + channel, known, 0.0))[None, :]
            middle = (total / num_windows)[None, :]
            slant = (product * deviation / num_windows)[None, :]
        biased = tl.zeros((WINDOWS, CHANNELS), tl.float32)
        for start in range(program * WINDOWS, num_windows, programs * WINDOWS):
            window, place, there = places(start, num_windows, channel, known, WINDOWS, OUT)
            g = tl.load(d_z + place, there, 0.0).to(tl.float32)
            best = tl.load(argument + place, there, 0.0).to(tl.float32)
            if NORM:
                g = scale * (g - middle - (VALUE(best) - mean) * slant)
            g = tl.where(there, g * SLOPE(best), 0.0)
            biased += g
            g = narrow(g, d_convolved.dtype.element_ty)
            which = tl.load(index + place, there, 0)
            corner = d_convolved + first_pixels(window, width, channel, OUT)
            for number in tl.static_range(4):
                pixel = number // 2 * 2 * width + number % 2
                tl.store(corner + pixel * OUT, tl.where(which == number, g, 0.0), there)
        tl.store(row + 2 * OUT, tl.sum(biased, 0), known)
        if arrives_last(counter + 2, programs):
            total = column_sums(partial + 2 * OUT, programs, channel, known, OUT, CHANNELS)
            tl.store(d_bias + channel, narrow(total, d_bias.dtype.element_ty), known)


@triton.jit
def places(start, num_windows, channel, known, WINDOWS: tl.constexpr, OUT: tl.constexpr):
    """Return the numbers of windows (WINDOWS,), and where their values are in a pooled map and which of them exist."""
    window = start + tl.arange(0, WINDOWS)
    place = window.to(tl.int64)[:, None] * OUT + channel[None, :]
    return window, place, (window < num_windows)[:, None] & known[None, :]


@triton.jit
def first_pixels(window, width, channel, OUT: tl.constexpr):
    """Return where the upper left pixels of windows are in a full-size map, twice `width` wide."""
    pixel = window // width * (4 * width) + window % width * 2
    return pixel.to(tl.int64)[:, None] * OUT + channel[None, :]


@triton.jit
def merged_rows(count, mean, spread, WINDOWS: tl.constexpr):
    """Return mean and sum of squared deviations of all rows together (Chan, Golub and LeVeque, 1983).

    Means are summed as differences to the first: exact where all are equal. Sums of squares around 0 would leave
    nothing of a variance that is small beside the mean.
    """
    first = (tl.arange(0, WINDOWS) == 0)[:, None]
    about = tl.sum(tl.where(first, mean, 0.0), 0)
    own = about + tl.sum(count * (mean - about[None, :]), 0) / tl.sum(count)
    apart = mean - own[None, :]
    return own, tl.sum(spread + count * apart * apart, 0)


@triton.jit
def batch_moments(partial, programs, channel, known, OUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Return mean, biased variance and number of the values that all programs have seen."""
    count, total = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    about = tl.load(partial + OUT + channel, known, 0.0, cache_modifier=".cg")
    for start in range(0, programs, 32):
        row, there = rows(partial, start, programs, channel, known, OUT)
        many = tl.load(row, there, 0.0, cache_modifier=".cg")
        count += tl.sum(many, 0)
        total += tl.sum(many * (tl.load(row + OUT, there, 0.0, cache_modifier=".cg") - about[None, :]), 0)
    count = tl.maximum(count, 1.0)  # of channels that do not exist
    mean, spread = about + total / count, tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, programs, 32):
        row, there = rows(partial, start, programs, channel, known, OUT)
        apart = tl.load(row + OUT, there, 0.0, cache_modifier=".cg") - mean[None, :]
        many = tl.load(row, there, 0.0, cache_modifier=".cg")
        spread += tl.sum(tl.load(row + 2 * OUT, there, 0.0, cache_modifier=".cg") + many * apart * apart, 0)
    return mean, spread / count, count


@triton.jit
def column_sums(partial, programs, channel, known, OUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the sums (CHANNELS,) of what all programs have written, in a fixed order."""
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, programs, 32):
        row, there = rows(partial, start, programs, channel, known, OUT)
        total += tl.sum(tl.load(row, there, 0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def rows(partial, start, programs, channel, known, OUT: tl.constexpr):
    """Return where 32 programs have written, and which of them exist. Read past the first cache: others wrote it."""
    program = start + tl.arange(0, 32)
    row = partial + program[:, None] * (3 * OUT) + channel[None, :]
    return row, (program < programs)[:, None] & known[None, :]
