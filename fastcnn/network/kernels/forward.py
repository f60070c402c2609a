"""Triton kernels of a block's forward: convolution, activation, 2x2 max pool and statistics of the pooled values.

A program computes tiles of pooling windows. The four sums of a window stay in registers of one thread; only the
maximum, its index among the four and, for an activation that is not monotone, the slope there are written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.network.kernels.tiles import dot, narrow, pixels, windows


@triton.jit
def first_forward(
    images,  # (M, 2 height, 2 width, 3) uint8
    photos,  # (N,) indices into images; None: all
    moves,  # (N, 3) int32: see photo_row; None: none
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
    SAVED: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First block: reads uint8 images, which are normalised, mirrored and shifted while loading."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.zeros((CHANNELS,), tl.float32)
    mean, spread = count, count
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        sums = tl.zeros((4 * ROWS * COLUMNS, CHANNELS), tl.float32)
        for y in range(3):
            z = photo_row(images, photos, moves, colours, photo, row + y - 1, column, valid, height, width)
            taps = first_weights(weight, colours, channel, y, OUT)
            sums = dot(z.to(weight.dtype.element_ty), taps, sums, PRECISION)
        photo, row, column, valid = windows(tile, num_rows, height, width, ROWS, COLUMNS)
        place = (photo * height + row) * width + column
        out = pool(sums, bias, pooled, index, slopes, place, valid, channel, OUT, VALUE, SLOPE, MONOTONE, SAVED)
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
    slopes,  # as pooled, where SAVED
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
    SAVED: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Later block: reads pooled values of the block before it and applies that block's batch norm while loading."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.zeros((CHANNELS,), tl.float32)
    mean, spread = count, count
    first = tl.program_id(0) * per_program
    for tile in range(first, tl.minimum(first + per_program, num_tiles)):
        photo, row, column, valid = pixels(tile, num_rows, height, width, ROWS, COLUMNS)
        sums = tl.zeros((4 * ROWS * COLUMNS, CHANNELS), tl.float32)
        for step in range(0, 9 * INTO, CHUNK):
            tap, into = step // INTO, step % INTO + tl.arange(0, CHUNK)
            z = normalised(
                x, moments, gamma, beta, photo, row + tap // 3 - 1, column + tap % 3 - 1, valid, into,
                2 * height, 2 * width, INTO,
            )  # fmt: skip
            taps = weight + channel[None, :] * (9 * INTO) + tap * INTO + into[:, None]
            sums = dot(z, tl.load(taps, (channel < OUT)[None, :], 0.0), sums, PRECISION)
        photo, row, column, valid = windows(tile, num_rows, height, width, ROWS, COLUMNS)
        place = (photo * height + row) * width + column
        out = pool(sums, bias, pooled, index, slopes, place, valid, channel, OUT, VALUE, SLOPE, MONOTONE, SAVED)
        if STATISTICS:
            count, mean, spread = gathered(out, valid, count, mean, spread)
    if STATISTICS:
        store_statistics(partial, count, mean, spread, channel, OUT)


@triton.jit
def normalised(x, moments, gamma, beta, photo, row, column, valid, channel, height, width, NUM: tl.constexpr):
    """Return (pixels, channels) normalised values of x; 0 outside, as the convolution pads after the norm."""
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
    """Return (pixels, 16) neighbours under a row of taps: three of them with 3 colours and a 1 each, a fourth unused.

    Colours are integers after subtraction of the rounded mean, exact in 16 bits too. The weights hold the rest of the
    normalisation: its scale with each colour, its offset with the 1, which is 0 outside the image.

    moves: as in `UnreadBatch`.
    """
    side = tl.arange(0, 16)
    colour = side % 4
    x = column[:, None] - 1 + side[None, :] // 4
    inside = (valid & (row >= 0) & (row < 2 * height))[:, None] & (x >= 0) & (x < 2 * width)
    source = photo
    if photos is not None:
        source = tl.load(photos + photo, valid, 0)
    if moves is not None:
        x = tl.load(moves + 3 * photo, valid, 1)[:, None] * x + tl.load(moves + 3 * photo + 1, valid, 0)[:, None]
        x = tl.minimum(tl.maximum(x, 0), 2 * width - 1)
        row = row + tl.load(moves + 3 * photo + 2, valid, 0)
        row = tl.minimum(tl.maximum(row, 0), 2 * height - 1)
    start = (source.to(tl.int64) * (2 * height) + row) * (2 * width)
    place = (start[:, None] + x) * 3 + colour[None, :]
    values = tl.load(images + place, inside & (side % 4 < 3)[None, :], 0).to(tl.float32)
    middle = tl.load(colours + colour, colour < 3, -1.0)  # so that the fourth is 1
    return tl.where(inside, values - middle[None, :], 0.0)


@triton.jit
def first_weights(weight, colours, channel, y, OUT: tl.constexpr):
    """Return (16, channels) weights of a row of taps, with the normalisation folded in.

    colours: of each colour the whole number that was subtracted, the scale, and what is left to add.
    """
    side = tl.arange(0, 16)
    colour, x = side % 4, side // 4
    known = (x < 3)[:, None] & (channel < OUT)[None, :]
    taps = weight + channel[None, :] * 27 + y * 9 + x[:, None] * 3
    scale = tl.load(colours + 3 + colour, colour < 3, 0.0)
    own = tl.load(taps + colour[:, None], known & (colour < 3)[:, None], 0.0).to(tl.float32) * scale[:, None]
    rest = tl.load(taps, known, 0.0).to(tl.float32) * tl.load(colours + 6)
    rest += tl.load(taps + 1, known, 0.0).to(tl.float32) * tl.load(colours + 7)
    rest += tl.load(taps + 2, known, 0.0).to(tl.float32) * tl.load(colours + 8)
    return narrow(tl.where((colour < 3)[:, None], own, rest), weight.dtype.element_ty)


@triton.jit
def pool(
    sums,
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
    SAVED: tl.constexpr,
):
    """Write the maxima of windows, their indices and slopes; return the maxima as they were written, in fp32.

    The first of equal ones wins, and NaN wins over all, as in torch.
    """
    known = channel < OUT
    sums += tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
    corners = tl.reshape(sums, (2, 2, sums.shape[0] // 4, sums.shape[1]))
    left, right = tl.split(tl.permute(corners, (2, 3, 0, 1)))
    a, c = tl.split(left)
    b, d = tl.split(right)
    best, which = a, tl.zeros(a.shape, tl.int32)
    argument = best
    if not MONOTONE:
        best = VALUE(best)
    best, argument, which = challenge(best, argument, which, b, 1, VALUE, MONOTONE)
    best, argument, which = challenge(best, argument, which, c, 2, VALUE, MONOTONE)
    best, argument, which = challenge(best, argument, which, d, 3, VALUE, MONOTONE)
    if MONOTONE:
        argument = best
        best = VALUE(best)
    best = narrow(best, pooled.dtype.element_ty)
    there = valid[:, None] & known[None, :]
    values = place[:, None] * OUT + channel[None, :]
    tl.store(pooled + values, best, there)
    if SAVED:
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
    """Return count, mean and sum of squared deviations after adding a tile (Chan, Golub and LeVeque, 1983).

    Sums of squares around 0 would leave nothing of the variance where it is small beside the mean.
    """
    there = valid[:, None]
    more = tl.sum(valid.to(tl.float32), 0)
    own = tl.sum(tl.where(there, out, 0.0), 0) / more
    own += tl.sum(tl.where(there, out - own[None, :], 0.0), 0) / more  # exact where all are equal
    off = tl.where(there, out - own[None, :], 0.0)
    total = count + more
    apart = own - mean
    spread += tl.sum(off * off, 0) + apart * apart * (count * more / total)
    return total, mean + apart * (more / total), spread


@triton.jit
def store_statistics(partial, count, mean, spread, channel, OUT: tl.constexpr):
    """Write the statistics of a program."""
    start, known = partial + tl.program_id(0) * (3 * OUT) + channel, channel < OUT
    tl.store(start, count, known)
    tl.store(start + OUT, mean, known)
    tl.store(start + 2 * OUT, spread, known)


@triton.jit
def finish_statistics(
    partial, moments, variance, num_programs, eps, OUT: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Write (2, OUT) mean and 1 / deviation and (OUT,) unbiased variance, summed in a fixed order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = (channel < OUT)[None, :]
    count, total = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    about = tl.load(partial + OUT + channel, channel < OUT, 0.0)  # what all means are near to
    for start in range(0, num_programs, PROGRAMS):
        one, there = program_statistics(partial, start, num_programs, channel, known, OUT, PROGRAMS)
        many = tl.load(one, there, 0.0)
        count += tl.sum(many, 0)
        total += tl.sum(many * (tl.load(one + OUT, there, 0.0) - about[None, :]), 0)
    mean, spread = about + total / count, tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, num_programs, PROGRAMS):
        one, there = program_statistics(partial, start, num_programs, channel, known, OUT, PROGRAMS)
        apart = tl.load(one + OUT, there, 0.0) - mean[None, :]
        spread += tl.sum(tl.load(one + 2 * OUT, there, 0.0) + tl.load(one, there, 0.0) * apart * apart, 0)
    tl.store(moments + channel, mean, channel < OUT)
    tl.store(moments + OUT + channel, 1 / tl.sqrt(spread / count + eps), channel < OUT)
    tl.store(variance + channel, spread / tl.maximum(count - 1, 1.0), channel < OUT)


@triton.jit
def program_statistics(partial, start, num_programs, channel, known, OUT: tl.constexpr, PROGRAMS: tl.constexpr):
    """Return the offsets of the statistics of some programs, and whether these programs exist."""
    program = start + tl.arange(0, PROGRAMS)
    return partial + program[:, None] * (3 * OUT) + channel[None, :], (program < num_programs)[:, None] & known
