"""Helpers of all kernels: pixel positions of a tile, products of tiles, and workarounds for Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def windows(tile, num_rows, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return photo, row, column and validity of each pooling window of a tile, in pooled coordinates.

    The pooled maps are stacked into one tall map that tiles cover, so that small maps share a tile.
    """
    return _placed(tile, tl.arange(0, ROWS * COLUMNS), num_rows, height, width, ROWS, COLUMNS)


@triton.jit
def pixels(tile, num_rows, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return photo, row, column and validity of each pixel of a tile's windows, in full-size coordinates.

    The upper left pixels of all windows come first, then the upper right, lower left and lower right ones: the four
    of a window are then computed by one thread and meet in its registers.
    """
    number = tl.arange(0, 4 * ROWS * COLUMNS)
    corner = number // (ROWS * COLUMNS)
    photo, row, column, valid = _placed(
        tile, number % (ROWS * COLUMNS), num_rows, height, width, ROWS, COLUMNS
    )  # fmt: skip
    return photo, 2 * row + corner // 2, 2 * column + corner % 2, valid


@triton.jit
def _placed(tile, number, num_rows, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(width, COLUMNS)
    row = tile // across * ROWS + number // COLUMNS
    column = tile % across * COLUMNS + number % COLUMNS
    return row // height, row % height, column, (row < num_rows) & (column < width)


@triton.jit
def narrow(x, kind: tl.constexpr):
    """Return fp32 values in another type, rounded to the nearest."""
    if INTERPRETED and kind == tl.bfloat16:  # the interpreter cuts bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(kind)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a @ b in fp32."""
    if INTERPRETED:  # it multiplies bf16 by its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
