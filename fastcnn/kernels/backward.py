"""Triton kernels of a block's backward. The gradient of the full-size map is never written.

One value in four of it is not zero, and the index says which: a tile of it is made in registers each time one is
needed, from the pooled gradient. Sums over pixels are taken in two stages, each in a fixed order: every program writes
its own, and one more kernel adds them up. So they repeat to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.kernels.forward import normalised, photo_row
from fastcnn.kernels.tiles import dot, narrow, pixels


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
    MONOTONE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write each program's (3, 2, 16, OUT) products of photo rows and gradients, and (OUT,) sums of gradients."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a0 = tl.zeros((16, CHANNELS), tl.float32)
    a1, b0, b1, c0, c1 = a0, a0, a0, a0, a0
    total = tl.zeros((CHANNELS,), tl.float32)
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        g, which = gradient(
            d_pooled, d_moments, moments, pooled, slopes, index, photo, row, column, valid, channel,
            height, width, num_values, OUT, SLOPE, MONOTONE,
        )  # fmt: skip
        total += tl.sum(g, 0)
        kind = d_pooled.dtype.element_ty
        parts = unpooled(g, which, kind)
        for y in tl.static_range(4):
            z = photo_row(images, photos, moves, colours, photo, 2 * row + y - 1, column, valid, height, width)
            z = tl.trans(z.to(kind))
            a0, a1 = product(a0, z, parts, y, 0, PRECISION), product(a1, z, parts, y, 1, PRECISION)
            b0, b1 = product(b0, z, parts, y - 1, 0, PRECISION), product(b1, z, parts, y - 1, 1, PRECISION)
            c0, c1 = product(c0, z, parts, y - 2, 0, PRECISION), product(c1, z, parts, y - 2, 1, PRECISION)
    start, known = partial + tl.program_id(0) * length + channel, channel < OUT
    places = start[None, :] + tl.arange(0, 16)[:, None] * OUT
    tl.store(places, a0, known[None, :])
    tl.store(places + 16 * OUT, a1, known[None, :])
    tl.store(places + 32 * OUT, b0, known[None, :])
    tl.store(places + 48 * OUT, b1, known[None, :])
    tl.store(places + 64 * OUT, c0, known[None, :])
    tl.store(places + 80 * OUT, c1, known[None, :])
    tl.store(start + 96 * OUT, total, known)


@triton.jit
def finish_first(
    partial, colours, d_parameters, num_programs, length, OUT: tl.constexpr, SIZE: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Write (28 OUT,) gradients of the weights, as they lie in memory, and of the biases."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_weight, is_bias = place < 27 * OUT, (place >= 27 * OUT) & (place < 28 * OUT)
    channel, tap = place // 27, place % 27
    y, x, colour = tap // 9, tap // 3 % 3, tap % 3
    left = ((y * 2) * 16 + x * 4) * OUT + channel  # windows' left pixels: the tap is x to the right of the tile's edge
    right = ((y * 2 + 1) * 16 + (x + 1) * 4) * OUT + channel
    own = column_sums(partial, left + colour * OUT, is_weight, num_programs, length, PROGRAMS)
    own += column_sums(partial, right + colour * OUT, is_weight, num_programs, length, PROGRAMS)
    one = column_sums(partial, left + 3 * OUT, is_weight, num_programs, length, PROGRAMS)
    one += column_sums(partial, right + 3 * OUT, is_weight, num_programs, length, PROGRAMS)
    found = own * tl.load(colours + 3 + colour) + one * tl.load(colours + 6 + colour)
    found += column_sums(partial, 96 * OUT + place - 27 * OUT, is_bias, num_programs, length, PROGRAMS)
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
    MONOTONE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write each program's (OUT, 3, 3, INTO) products of inputs and gradients, and (OUT,) sums of gradients."""
    across = tl.cdiv(OUT, CHANNELS)
    channel = tl.program_id(1) % across * CHANNELS + tl.arange(0, CHANNELS)
    into = tl.program_id(1) // across * CHUNK + tl.arange(0, CHUNK)
    a = tl.zeros((CHUNK, CHANNELS), tl.float32)
    b, c, d, e, f, g, h, i = a, a, a, a, a, a, a, a
    total = tl.zeros((CHANNELS,), tl.float32)
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        values, which = gradient(
            d_pooled, d_moments, moments, pooled, slopes, index, photo, row, column, valid, channel,
            height, width, num_values, OUT, SLOPE, MONOTONE,
        )  # fmt: skip
        total += tl.sum(values, 0)
        parts = unpooled(values, which, x.dtype.element_ty)
        for y in tl.static_range(4):
            for w in tl.static_range(4):
                z = normalised(
                    x, moments_in, gamma, beta, photo, 2 * row + y - 1, 2 * column + w - 1, valid, into,
                    2 * height, 2 * width, INTO,
                )  # fmt: skip
                z = tl.trans(z)
                a = product(a, z, parts, y, w, PRECISION)
                b = product(b, z, parts, y, w - 1, PRECISION)
                c = product(c, z, parts, y, w - 2, PRECISION)
                d = product(d, z, parts, y - 1, w, PRECISION)
                e = product(e, z, parts, y - 1, w - 1, PRECISION)
                f = product(f, z, parts, y - 1, w - 2, PRECISION)
                g = product(g, z, parts, y - 2, w, PRECISION)
                h = product(h, z, parts, y - 2, w - 1, PRECISION)
                i = product(i, z, parts, y - 2, w - 2, PRECISION)
    start, known = partial + tl.program_id(0) * length, channel < OUT
    places, there = start + channel[None, :] * (9 * INTO) + into[:, None], known[None, :]
    tl.store(places, a, there)
    tl.store(places + INTO, b, there)
    tl.store(places + 2 * INTO, c, there)
    tl.store(places + 3 * INTO, d, there)
    tl.store(places + 4 * INTO, e, there)
    tl.store(places + 5 * INTO, f, there)
    tl.store(places + 6 * INTO, g, there)
    tl.store(places + 7 * INTO, h, there)
    tl.store(places + 8 * INTO, i, there)
    tl.store(start + 9 * INTO * OUT + channel, total, known & (tl.program_id(1) // across == 0))


@triton.jit
def input_gradient(
    x,
    moments_in,
    gamma,
    weight,
    d_x,
    d_pooled,
    d_moments,
    moments,
    pooled,
    slopes,
    index,
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
    MONOTONE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of x, and each program's part of those of its batch norm: what `finish_block` says."""
    into = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = into < INTO
    # Of z = (x - mean) * deviation' * gamma + beta: sums of dz and of dz * (x - mean).
    sums, products = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    mean, scale = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32) + 1
    deviation, gain = scale, scale
    if moments_in is not None:
        mean, deviation = tl.load(moments_in + into, known, 0.0), tl.load(moments_in + INTO + into, known, 0.0)
        gain = tl.load(gamma + into, known, 0.0)
        scale = deviation * gain
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        a = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
        b, c, d = a, a, a
        for chunk in range(0, OUT, CHUNK):
            channel = chunk + tl.arange(0, CHUNK)
            taps = weight + channel[:, None] * (9 * INTO) + into[None, :]
            # Windows above, level and below, and of each the pixels within reach: 4x4 in all.
            for up in tl.static_range(3):
                for side in tl.static_range(3):
                    g, which = gradient(
                        d_pooled, d_moments, moments, pooled, slopes, index, photo, row + up - 1, column + side - 1,
                        valid, channel, height, width, num_values, OUT, SLOPE, MONOTONE,
                    )  # fmt: skip
                    for pixel in tl.static_range(4):
                        y, w = 2 * up - 1 + pixel // 2, 2 * side - 1 + pixel % 2
                        if y >= 0 and y < 4 and w >= 0 and w < 4:
                            part = narrow(tl.where(which == pixel, g, 0.0), weight.dtype.element_ty)
                            a = tap_back(a, part, taps, known, 2 - y, 2 - w, INTO, PRECISION)
                            b = tap_back(b, part, taps, known, 2 - y, 3 - w, INTO, PRECISION)
                            c = tap_back(c, part, taps, known, 3 - y, 2 - w, INTO, PRECISION)
                            d = tap_back(d, part, taps, known, 3 - y, 3 - w, INTO, PRECISION)
        place = (photo * (2 * height) + 2 * row) * (2 * width) + 2 * column
        there = valid[:, None] & known[None, :]
        for pixel in tl.static_range(4):
            dz = a if pixel == 0 else b if pixel == 1 else c if pixel == 2 else d
            dz = tl.where(there, dz, 0.0)
            at = (place + pixel // 2 * (2 * width) + pixel % 2)[:, None] * INTO + into[None, :]
            if moments_in is not None:
                sums += tl.sum(dz, 0)
                off = tl.load(x + at, there, 0.0).to(tl.float32) - mean[None, :]
                products += tl.sum(dz * off, 0)
            tl.store(d_x + at, narrow(dz * scale[None, :], d_x.dtype.element_ty), there)
    if moments_in is not None:
        start = partial + tl.program_id(0) * length + (9 * INTO * OUT + OUT) + into
        tl.store(start, -scale * sums, known)
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
    """Write gradients of weights and biases as they lie in memory, and (4, INTO) of the norm that was applied to x.

    Those of the norm: its mean, 1 / deviation, gamma and beta.
    """
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    found = column_sums(partial, place, place < length, num_programs, length, PROGRAMS)
    tl.store(d_parameters + place, narrow(found, d_parameters.dtype.element_ty), place < num_parameters)
    if d_norm is not None:
        tl.store(d_norm + (place - num_parameters), found, (place >= num_parameters) & (place < length))


@triton.jit
def gradient(
    d_pooled,
    d_moments,
    moments,
    pooled,
    slopes,
    index,
    photo,
    row,
    column,
    valid,
    channel,
    height,
    width,
    num_values,
    OUT: tl.constexpr,
    SLOPE: tl.constexpr,
    MONOTONE: tl.constexpr,
):
    """Return (pixels, channels) gradient of windows' winners before the activation, and which of the four they were.

    d_moments: (2, OUT) of the mean and the 1 / deviation that were taken over `num_values` pooled values; None is 0.
    """
    inside = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place, known = (photo * height + row) * width + column, channel < OUT
    there = inside[:, None] & known[None, :]
    values = place[:, None] * OUT + channel[None, :]
    g = tl.load(d_pooled + values, there, 0.0).to(tl.float32)
    if d_moments is not None or MONOTONE:
        y = tl.load(pooled + values, there, 0.0).to(tl.float32)
    if d_moments is not None:
        mean, deviation = tl.load(moments + channel, known, 0.0), tl.load(moments + OUT + channel, known, 0.0)
        d_mean, d_deviation = tl.load(d_moments + channel, known, 0.0), tl.load(d_moments + OUT + channel, known, 0.0)
        by_distance = d_deviation * deviation * deviation * deviation
        g += (d_mean[None, :] - by_distance[None, :] * (y - mean[None, :])) * (1.0 / num_values)
    if MONOTONE:
        g *= SLOPE(y)
    else:
        g *= tl.load(slopes + values, there, 0.0).to(tl.float32)
    four = tl.load(index + place[:, None] * (OUT // 4) + channel[None, :] // 4, there, 0).to(tl.int32)
    return tl.where(there, g, 0.0), (four >> (2 * (channel % 4))[None, :]) & 3


@triton.jit
def unpooled(g, which, kind: tl.constexpr):
    """Return four tiles: the gradient at each pixel of the windows."""
    return (
        narrow(tl.where(which == 0, g, 0.0), kind),
        narrow(tl.where(which == 1, g, 0.0), kind),
        narrow(tl.where(which == 2, g, 0.0), kind),
        narrow(tl.where(which == 3, g, 0.0), kind),
    )


@triton.jit
def product(total, z, parts, PY: tl.constexpr, PX: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + z times the gradient at a pixel of the windows, where there is such a pixel."""
    if PY >= 0 and PY < 2 and PX >= 0 and PX < 2:
        total = dot(z, parts[PY * 2 + PX], total, PRECISION)
    return total


@triton.jit
def tap_back(total, part, taps, known, KY: tl.constexpr, KX: tl.constexpr, INTO: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + a gradient times the weights of a tap, where there is such a tap."""
    if KY >= 0 and KY < 3 and KX >= 0 and KX < 3:
        total = dot(part, tl.load(taps + (KY * 3 + KX) * INTO, known[None, :], 0.0), total, PRECISION)
    return total


@triton.jit
def column_sums(partial, place, there, num_programs, length, PROGRAMS: tl.constexpr):
    """Return the sums over programs of what stands at `place` of each, in a fixed order of additions."""
    total = tl.zeros(place.shape, tl.float32)
    for start in range(0, num_programs, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)
        mask = (program < num_programs)[:, None] & there[None, :]
        total += tl.sum(tl.load(partial + program[:, None] * length + place[None, :], mask, 0.0), 0)
    return total
