"""Helpers of all kernels: rounding and products of tiles, with workarounds for Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


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
