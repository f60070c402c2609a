"""Triton kernels of a block's backward. The gradient of the full-size map is never written.

One value in four of it is not zero, and the index says which: tiles of it are made in registers from the pooled
gradient. Sums over pixels are taken in two stages, each in a fixed order: every program writes its own, and one more
kernel adds them up. So they repeat to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.network.kernels.forward import normalised, photo_row
from fastcnn.network.kernels.tiles import dot, narrow, pixels, windows


@triton.jit
def first_weight_gradient(
    images,
    photos,
    moves,
    colours,
    d_pooled,
    d_moments,
    moments,
    pooled,
    slopes,
    index,
    partial,  # (programs, length) fp32
    length,
    num_values,
    num_rows,
    height,
    width,
    num_tiles,
    per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    SLOPE: tl.constexpr,
    SAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write (3, 16, OUT) products of image rows and gradients and (OUT,) sums of gradients, for each program."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a = tl.zeros((16, CHANNELS), tl.float32)
    b, c = a, a
    total = tl.zeros((CHANNELS,), tl.float32)
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        g, which, _, _ = gradient(
            tile, d_pooled, d_moments, moments, pooled, slopes, index, channel, num_values,
            num_rows, height, width, ROWS, COLUMNS, OUT, SLOPE, SAVED,
        )  # fmt: skip
        total += tl.sum(g, 0)
        g = unpooled(g, which, pooled.dtype.element_ty)
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        z = photo_row(images, photos, moves, colours, photo, row - 1, column, valid, height, width)
        a = dot(tl.trans(z.to(g.dtype)), g, a, PRECISION)
        z = photo_row(images, photos, moves, colours, photo, row, column, valid, height, width)
        b = dot(tl.trans(z.to(g.dtype)), g, b, PRECISION)
        z = photo_row(images, photos, moves, colours, photo, row + 1, column, valid, height, width)
        c = dot(tl.trans(z.to(g.dtype)), g, c, PRECISION)
    start, known = partial + tl.program_id(0) * length + channel, channel < OUT
    places = start[None, :] + tl.arange(0, 16)[:, None] * OUT
    tl.store(places, a, known[None, :])
    tl.store(places + 16 * OUT, b, known[None, :])
    tl.store(places + 32 * OUT, c, known[None, :])
    tl.store(start + 48 * OUT, total, known)


@triton.jit
def finish_first(
    partial, colours, d_parameters, num_programs, length, OUT: tl.constexpr, SIZE: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Write (28 OUT,) gradients of the weights, in memory order, and of the biases."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_weight, is_bias = place < 27 * OUT, (place >= 27 * OUT) & (place < 28 * OUT)
    channel, tap = place // 27, place % 27
    y, x, colour = tap // 9, tap // 3 % 3, tap % 3
    start = (y * 16 + x * 4) * OUT + channel
    own = column_sums(partial, start + colour * OUT, is_weight, num_programs, length, PROGRAMS)
    one = column_sums(partial, start + 3 * OUT, is_weight, num_programs, length, PROGRAMS)
    found = own * tl.load(colours + 3 + colour) + one * tl.load(colours + 6 + colour)
    found += column_sums(partial, 48 * OUT + place - 27 * OUT, is_bias, num_programs, length, PROGRAMS)
    tl.store(d_parameters + place, narrow(found, d_parameters.dtype.element_ty), is_weight | is_bias)


@triton.jit
def weight_gradient(
    x,
    moments_in,
    gamma,
    beta,
    d_pooled,
    d_moments,
    moments,
    pooled,
    slopes,
    index,
    d_winner,  # (N, height, width, OUT) gradient of what won, before the activation: for input_gradient
    partial,
    length,
    num_values,
    num_rows,
    height,
    width,
    num_tiles,
    per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    INTO: tl.constexpr,
    OUT: tl.constexpr,
    SLOPE: tl.constexpr,
    SAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write (OUT, 3, 3, INTO) products of inputs and gradients, and (OUT,) sums of gradients, of a part of the tiles.

    A program takes one row of taps; the three of a part are neighbours, so that what they read is in the cache.
    """
    across, part = tl.cdiv(OUT, CHANNELS), tl.program_id(1)
    channel = tl.program_id(2) % across * CHANNELS + tl.arange(0, CHANNELS)
    into = tl.program_id(2) // across * CHUNK + tl.arange(0, CHUNK)
    tap_row, known = tl.program_id(0), channel < OUT
    leads = (tap_row == 0) & (tl.program_id(2) // across == 0)
    a = tl.zeros((CHUNK, CHANNELS), tl.float32)
    b, c = a, a
    total = tl.zeros((CHANNELS,), tl.float32)
    for tile in range(part * per_program, tl.minimum((part + 1) * per_program, num_tiles)):
        values, which, place, valid = gradient(
            tile, d_pooled, d_moments, moments, pooled, slopes, index, channel, num_values,
            num_rows, height, width, ROWS, COLUMNS, OUT, SLOPE, SAVED,
        )  # fmt: skip
        total += tl.sum(values, 0)
        there = (valid & leads)[:, None] & known[None, :]
        tl.store(d_winner + place[:, None] * OUT + channel[None, :], narrow(values, d_winner.dtype.element_ty), there)
        values = unpooled(values, which, x.dtype.element_ty)
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        row += tap_row - 1
        z = normalised(x, moments_in, gamma, beta, photo, row, column - 1, valid, into, 2 * height, 2 * width, INTO)
        a = dot(tl.trans(z), values, a, PRECISION)
        z = normalised(x, moments_in, gamma, beta, photo, row, column, valid, into, 2 * height, 2 * width, INTO)
        b = dot(tl.trans(z), values, b, PRECISION)
        z = normalised(x, moments_in, gamma, beta, photo, row, column + 1, valid, into, 2 * height, 2 * width, INTO)
        c = dot(tl.trans(z), values, c, PRECISION)
    start, there = partial + part * length, known[None, :]
    places = start + (channel[None, :] * 9 + tap_row * 3) * INTO + into[:, None]
    tl.store(places, a, there)
    tl.store(places + INTO, b, there)
    tl.store(places + 2 * INTO, c, there)
    tl.store(start + 9 * INTO * OUT + channel, total, known & leads)


@triton.jit
def input_gradient(
    x,
    moments_in,
    gamma,
    weight,
    d_x,
    d_winner,
    index,
    partial,
    length,
    num_rows,
    height,
    width,
    num_tiles,
    per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    INTO: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of x, and each program's partial gradients of its batch norm, for `finish_block`."""
    into = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = into < INTO
    # Sums of dz and of dz * (x - mean), where z = (x - mean) * deviation' * gamma + beta.
    sums = tl.zeros((CHANNELS,), tl.float32)
    products, mean, deviation, gain = sums, sums, sums + 1, sums + 1
    if moments_in is not None:
        mean, deviation = tl.load(moments_in + into, known, 0.0), tl.load(moments_in + INTO + into, known, 0.0)
        gain = tl.load(gamma + into, known, 0.0)
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        dz = tl.zeros((4 * ROWS * COLUMNS, CHANNELS), tl.float32)
        for step in range(0, 9 * OUT, CHUNK):
            tap, channel = step // OUT, step % OUT + tl.arange(0, CHUNK)
            y, w = row + 1 - tap // 3, column + 1 - tap % 3  # whose tap this pixel was
            there = valid & (y >= 0) & (y < 2 * height) & (w >= 0) & (w < 2 * width)
            place, corner = (photo * height + y // 2) * width + w // 2, y % 2 * 2 + w % 2
            g = tl.load(d_winner + place[:, None] * OUT + channel[None, :], there[:, None], 0.0)
            won = winners(index, place, there, channel, OUT) == corner[:, None]
            taps = weight + channel[:, None] * (9 * INTO) + tap * INTO + into[None, :]
            dz = dot(tl.where(won, g, 0.0).to(g.dtype), tl.load(taps, known[None, :], 0.0), dz, PRECISION)
        place = ((photo * (2 * height) + row) * (2 * width) + column)[:, None] * INTO + into[None, :]
        there = valid[:, None] & known[None, :]
        if moments_in is not None:
            dz = tl.where(there, dz, 0.0)
            sums += tl.sum(dz, 0)
            products += tl.sum(dz * (tl.load(x + place, there, 0.0).to(tl.float32) - mean[None, :]), 0)
            dz *= (deviation * gain)[None, :]
        tl.store(d_x + place, narrow(dz, d_x.dtype.element_ty), there)
    if moments_in is not None:
        start = partial + tl.program_id(0) * length + (9 * INTO * OUT + OUT) + into
        tl.store(start, -deviation * gain * sums, known)
        tl.store(start + INTO, gain * products, known)
        tl.store(start + 2 * INTO, deviation * products, known)
        tl.store(start + 3 * INTO, sums, known)


@triton.jit
def finish_block(
    partial,
    d_parameters,
    d_norm,
    num_programs,
    length,
    num_parameters,
    SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Write the gradients of weights and biases, in memory order, and (4, INTO) of the norm that was applied to x.

    The norm's rows are the gradients of mean, 1 / deviation, gamma and beta.
    """
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    found = column_sums(partial, place, place < length, num_programs, length, PROGRAMS)
    tl.store(d_parameters + place, narrow(found, d_parameters.dtype.element_ty), place < num_parameters)
    if d_norm is not None:
        tl.store(d_norm + (place - num_parameters), found, (place >= num_parameters) & (place < length))


@triton.jit
def gradient(
    tile,
    d_pooled,
    d_moments,
    moments,
    pooled,
    slopes,
    index,
    channel,
    num_values,
    num_rows,
    height,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
    SLOPE: tl.constexpr,
    SAVED: tl.constexpr,
):
    """Return (windows, channels) gradient before the activation, indices of the maxima, and (windows,) offsets.

    d_moments: (2, OUT) of the mean and the 1 / deviation that were taken over `num_values` pooled values; None is 0.
    """
    photo, row, column, valid = windows(tile, num_rows, height, width, ROWS, COLUMNS)
    place, known = (photo * height + row) * width + column, channel < OUT
    there = valid[:, None] & known[None, :]
    values = place[:, None] * OUT + channel[None, :]
    g = tl.load(d_pooled + values, there, 0.0).to(tl.float32)
    if d_moments is not None or not SAVED:
        y = tl.load(pooled + values, there, 0.0).to(tl.float32)
    if d_moments is not None:
        mean, deviation = tl.load(moments + channel, known, 0.0), tl.load(moments + OUT + channel, known, 0.0)
        d_mean, d_deviation = tl.load(d_moments + channel, known, 0.0), tl.load(d_moments + OUT + channel, known, 0.0)
        by_distance = d_deviation * deviation * deviation * deviation
        g += (d_mean[None, :] - by_distance[None, :] * (y - mean[None, :])) * (1.0 / num_values)
    if SAVED:
        g *= tl.load(slopes + values, there, 0.0).to(tl.float32)
    else:
        g *= SLOPE(y)
    return tl.where(there, g, 0.0), winners(index, place, valid, channel, OUT), place, valid


@triton.jit
def winners(index, place, there, channel, OUT: tl.constexpr):
    """Return (places, channels) index of each window's maximum: two bits each, four channels to a byte."""
    known = there[:, None] & (channel < OUT)[None, :]
    four = tl.load(index + place[:, None] * (OUT // 4) + channel[None, :] // 4, known, 0).to(tl.int32)
    return (four >> (2 * (channel % 4))[None, :]) & 3


@triton.jit
def unpooled(g, which, kind: tl.constexpr):
    """Return (4 windows, channels) gradient at the pixels of windows, in the order of `pixels`."""
    corner = tl.arange(0, 4)[:, None, None]
    spread = tl.where(which[None, :, :] == corner, g[None, :, :], 0.0)
    return narrow(tl.reshape(spread, (4 * g.shape[0], g.shape[1])), kind)


@triton.jit
def column_sums(partial, place, there, num_programs, length, PROGRAMS: tl.constexpr):
    """Return the sums over programs of their values at `place`, in a fixed order."""
    total = tl.zeros(place.shape, tl.float32)
    for start in range(0, num_programs, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)
        mask = (program < num_programs)[:, None] & there[None, :]
        total += tl.sum(tl.load(partial + program[:, None] * length + place[None, :], mask, 0.0), 0)
    return total
