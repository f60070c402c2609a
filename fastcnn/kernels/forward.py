"""Triton kernels of a block's forward: convolution, activation, 2x2 max pool and the statistics of what comes out.

A program takes tiles of pooled pixels. The four sums of a pooling window stay in registers; the winner, which of the
four it was and, of an activation that is not monotone, its slope there are all that is written. A window and its 3x3
neighbourhoods cover 4x4 pixels: each is read once and multiplied by the taps that reach it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.kernels.tiles import dot, narrow, pixels


@triton.jit
def first_forward(
    images,  # (M, 2 height, 2 width, 3) uint8
    photos,  # (N,) which of them; None takes all
    moves,  # (N, 3) int32: 1 or -1 (mirrored), columns and rows that each was moved by; None moves none
    colours,  # (3, 3) fp32: see first_weights
    weight,
    bias,
    pooled,
    index,
    slopes,
    partial,
    num_rows,
    height,
    width,
    num_tiles,
    per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    MONOTONE: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The block that reads photos: normalised, flipped and shifted as they are loaded."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count, mean, spread = 0.0, tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        a = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
        b, c, d = a, a, a
        for y in tl.static_range(4):
            z = photo_row(images, photos, moves, colours, photo, 2 * row + y - 1, column, valid, height, width)
            z = z.to(weight.dtype.element_ty)
            a = first_tap(a, z, weight, colours, channel, y, 0, OUT, PRECISION)
            b = first_tap(b, z, weight, colours, channel, y, 1, OUT, PRECISION)
            c = first_tap(c, z, weight, colours, channel, y - 1, 0, OUT, PRECISION)
            d = first_tap(d, z, weight, colours, channel, y - 1, 1, OUT, PRECISION)
        place = (photo * height + row) * width + column
        out = pool(
            a, b, c, d, bias, pooled, index, slopes, place, valid, channel, OUT, VALUE, SLOPE, MONOTONE
        )  # fmt: skip
        if STATISTICS:
            count, mean, spread = gathered(out, valid, count, mean, spread)
    if STATISTICS:
        store_statistics(partial, count, mean, spread, channel, OUT)


@triton.jit
def block_forward(
    x,  # (N, 2 height, 2 width, INTO)
    moments,  # (2, INTO) mean and 1 / deviation of what the batch norm of x is to make 0 and 1; None has no norm
    gamma,
    beta,
    weight,  # (OUT, INTO, 3, 3) with INTO innermost
    bias,
    pooled,  # (N, height, width, OUT)
    index,  # (N, height, width, OUT / 4) uint8: two bits each
    slopes,  # as pooled, unless MONOTONE
    partial,  # (programs, 3, OUT) count, mean and sum of squares around it
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
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    MONOTONE: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block that reads what another has pooled, and applies that one's batch norm as it loads."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count, mean, spread = 0.0, tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        a = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
        b, c, d = a, a, a
        for chunk in range(0, INTO, CHUNK):
            into = chunk + tl.arange(0, CHUNK)
            taps = weight + channel[None, :] * (9 * INTO) + into[:, None]
            known = (channel < OUT)[None, :]
            for y in tl.static_range(4):
                for w in tl.static_range(4):
                    z = normalised(
                        x, moments, gamma, beta, photo, 2 * row + y - 1, 2 * column + w - 1, valid, into,
                        2 * height, 2 * width, INTO,
                    )  # fmt: skip
                    a = tap(a, z, taps, known, y, w, INTO, PRECISION)
                    b = tap(b, z, taps, known, y, w - 1, INTO, PRECISION)
                    c = tap(c, z, taps, known, y - 1, w, INTO, PRECISION)
                    d = tap(d, z, taps, known, y - 1, w - 1, INTO, PRECISION)
        place = (photo * height + row) * width + column
        out = pool(
            a, b, c, d, bias, pooled, index, slopes, place, valid, channel, OUT, VALUE, SLOPE, MONOTONE
        )  # fmt: skip
        if STATISTICS:
            count, mean, spread = gathered(out, valid, count, mean, spread)
    if STATISTICS:
        store_statistics(partial, count, mean, spread, channel, OUT)


@triton.jit
def tap(total, z, taps, known, KY: tl.constexpr, KX: tl.constexpr, INTO: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + z times the weights of a tap, where there is such a tap."""
    if KY >= 0 and KY < 3 and KX >= 0 and KX < 3:
        total = dot(z, tl.load(taps + (KY * 3 + KX) * INTO, known, 0.0), total, PRECISION)
    return total


@triton.jit
def normalised(x, moments, gamma, beta, photo, row, column, valid, channel, height, width, NUM: tl.constexpr):
    """Return (pixels, channels) of x, batch norm applied; 0 outside: the convolution pads after the norm."""
    inside = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = (photo * height + row) * width + column
    z = tl.load(x + place[:, None] * NUM + channel[None, :], inside[:, None], 0.0)
    if moments is not None:
        mean, scale = tl.load(moments + channel), tl.load(moments + NUM + channel) * tl.load(gamma + channel)
        values = (z.to(tl.float32) - mean[None, :]) * scale[None, :] + tl.load(beta + channel)[None, :]
        z = narrow(tl.where(inside[:, None], values, 0.0), z.dtype)
    return z


@triton.jit
def photo_row(images, photos, moves, colours, photo, row, column, valid, height, width):
    """Return (pixels, 16): four neighbours in a row, from one left of the window on, of 3 colours and a 1 each.

    Colours are whole numbers, the mean's nearest already subtracted: exact in 16 bits too. What of the normalisation
    is left over is in the weights: its scale with each colour, and its rest with the 1, which is 0 outside the photo.
    """
    side = tl.arange(0, 16)
    colour = side % 4
    x = 2 * column[:, None] - 1 + side[None, :] // 4
    y = row[:, None]
    inside = valid[:, None] & (y >= 0) & (y < 2 * height) & (x >= 0) & (x < 2 * width)
    source = photo
    if photos is not None:
        source = tl.load(photos + photo, valid, 0)
    if moves is not None:
        mirror = tl.load(moves + 3 * photo, valid, 1)[:, None]
        x = mirror * x + tl.load(moves + 3 * photo + 1, valid, 0)[:, None]
        y = y + tl.load(moves + 3 * photo + 2, valid, 0)[:, None]
        x = tl.minimum(tl.maximum(x, 0), 2 * width - 1)
        y = tl.minimum(tl.maximum(y, 0), 2 * height - 1)
    start = source.to(tl.int64)[:, None] * (12 * height * width)
    place = start + (y * (2 * width) + x) * 3 + colour[None, :]
    values = tl.load(images + place, inside & (colour < 3)[None, :], 0).to(tl.float32)
    middle = tl.load(colours + colour, colour < 3, -1.0)  # so that the fourth is 1
    return tl.where(inside, values - middle[None, :], 0.0)


@triton.jit
def first_tap(
    total, z, weight, colours, channel, KY: tl.constexpr, PX: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr
):
    """Return total + z times a row of taps, for windows' left (PX 0) or right pixels, where there is such a row."""
    if KY >= 0 and KY < 3:
        total = dot(z, first_weights(weight, colours, channel, KY, PX, OUT), total, PRECISION)
    return total


@triton.jit
def first_weights(weight, colours, channel, KY: tl.constexpr, PX: tl.constexpr, OUT: tl.constexpr):
    """Return (16, channels) weights of a row of taps with the normalisation in them.

    colours: of each colour the whole number that was subtracted, the scale, and what is left to add.
    """
    side = tl.arange(0, 16)
    colour, tap_x = side % 4, side // 4 - PX
    known = ((tap_x >= 0) & (tap_x < 3))[:, None] & (channel < OUT)[None, :]
    taps = weight + channel[None, :] * 27 + KY * 9 + tap_x[:, None] * 3
    scale = tl.load(colours + 3 + colour, colour < 3, 0.0)
    own = tl.load(taps + colour[:, None], known & (colour < 3)[:, None], 0.0).to(tl.float32) * scale[:, None]
    rest = tl.load(taps, known, 0.0).to(tl.float32) * tl.load(colours + 6)
    rest += tl.load(taps + 1, known, 0.0).to(tl.float32) * tl.load(colours + 7)
    rest += tl.load(taps + 2, known, 0.0).to(tl.float32) * tl.load(colours + 8)
    return narrow(tl.where((colour < 3)[:, None], own, rest), weight.dtype.element_ty)


@triton.jit
def pool(
    a,
    b,
    c,
    d,
    bias,
    pooled,
    index,
    slopes,
    place,
    valid,
    channel,
    OUT: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    MONOTONE: tl.constexpr,
):
    """Write windows' winners, which they were and their slopes; return the winners as they were written, in fp32.

    The first of equal ones wins, and NaN wins over all, as in torch.
    """
    known = channel < OUT
    add = tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
    best, which = a + add, tl.zeros(a.shape, tl.int32)
    argument = best
    if not MONOTONE:
        best = VALUE(best)
    best, argument, which = challenge(best, argument, which, b + add, 1, VALUE, MONOTONE)
    best, argument, which = challenge(best, argument, which, c + add, 2, VALUE, MONOTONE)
    best, argument, which = challenge(best, argument, which, d + add, 3, VALUE, MONOTONE)
    if MONOTONE:
        best = VALUE(best)
    best = narrow(best, pooled.dtype.element_ty)
    there = valid[:, None] & known[None, :]
    values = place[:, None] * OUT + channel[None, :]
    tl.store(pooled + values, best, there)
    if not MONOTONE:
        tl.store(slopes + values, narrow(SLOPE(argument), slopes.dtype.element_ty), there)
    four = tl.reshape(which, (which.shape[0], which.shape[1] // 4, 4)) << (2 * tl.arange(0, 4))[None, None, :]
    quarter = tl.program_id(1) * (which.shape[1] // 4) + tl.arange(0, which.shape[1] // 4)
    there = valid[:, None] & (quarter < OUT // 4)[None, :]
    tl.store(index + place[:, None] * (OUT // 4) + quarter[None, :], tl.sum(four, 2).to(tl.uint8), there)
    return best.to(tl.float32)


@triton.jit
def challenge(best, argument, which, x, NUMBER: tl.constexpr, VALUE: tl.constexpr, MONOTONE: tl.constexpr):
    """Return the better of two candidates."""
    y = x
    if not MONOTONE:
        y = VALUE(x)
    better = (y > best) | (y != y)
    if not MONOTONE:
        argument = tl.where(better, x, argument)
    return tl.where(better, y, best), argument, tl.where(better, NUMBER, which)


@triton.jit
def gathered(out, valid, count, mean, spread):
    """Return number, mean and sum of squares around it, a tile's values added (Chan, Golub and LeVeque, 1983).

    Sums of squares around 0 would leave nothing of the variance where it is small beside the mean.
    """
    there = valid[:, None]
    more = tl.sum(valid.to(tl.float32), 0)
    own = tl.sum(tl.where(there, out, 0.0), 0) / more
    off = tl.where(there, out - own[None, :], 0.0)
    total = count + more
    apart = own - mean
    spread += tl.sum(off * off, 0) + apart * apart * (count * more / total)
    return total, mean + apart * (more / total), spread


@triton.jit
def store_statistics(partial, count, mean, spread, channel, OUT: tl.constexpr):
    """Write a program's statistics."""
    start, known = partial + tl.program_id(0) * (3 * OUT) + channel, channel < OUT
    tl.store(start, mean * 0 + count, known)
    tl.store(start + OUT, mean, known)
    tl.store(start + 2 * OUT, spread, known)


@triton.jit
def finish_statistics(
    partial, moments, variance, num_programs, eps, OUT: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Write (2, OUT) mean and 1 / deviation, and (OUT,) the unbiased variance, in one fixed order of additions."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = (channel < OUT)[None, :]
    count, total = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, num_programs, PROGRAMS):
        one, there = program_statistics(partial, start, num_programs, channel, known, OUT, PROGRAMS)
        many = tl.load(one, there, 0.0)
        count += tl.sum(many, 0)
        total += tl.sum(many * tl.load(one + OUT, there, 0.0), 0)
    mean, spread = total / count, tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, num_programs, PROGRAMS):
        one, there = program_statistics(partial, start, num_programs, channel, known, OUT, PROGRAMS)
        apart = tl.load(one + OUT, there, 0.0) - mean[None, :]
        spread += tl.sum(tl.load(one + 2 * OUT, there, 0.0) + tl.load(one, there, 0.0) * apart * apart, 0)
    tl.store(moments + channel, mean, channel < OUT)
    tl.store(moments + OUT + channel, 1 / tl.sqrt(spread / count + eps), channel < OUT)
    tl.store(variance + channel, spread / tl.maximum(count - 1, 1.0), channel < OUT)


@triton.jit
def program_statistics(partial, start, num_programs, channel, known, OUT: tl.constexpr, PROGRAMS: tl.constexpr):
    """Return where the statistics of some programs begin, and whether they are there."""
    program = start + tl.arange(0, PROGRAMS)
    return partial + program[:, None] * (3 * OUT) + channel[None, :], (program < num_programs)[:, None] & known
