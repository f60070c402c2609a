"""The least that a training step must move and compute, counted from the network's shapes: the floor of its time.

`passes` counts library convolutions and, around them, the passes of the kernels in `network/kernels`: each reads its
inputs and writes its outputs once, and nothing is kept between passes.
A pass takes the longer of its bytes over the bandwidth and its FLOPs over the matrix rate; passes follow each other.
Launches, latencies and the optimizer's few hundred KB are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INDEX_BYTES = 1  # which of the four won
NEURONS, NUM_CLASSES = 128, 10  # of the dense layers


@dataclass(frozen=True)
class Pass:
    """One pass over memory, for a whole batch."""

    name: str
    bytes: float
    flops: float = 0.0


def passes(
    filters: Sequence[int],
    *,
    batch: int = 1,
    image_size: int = 128,
    element_bytes: int = 2,
) -> list[Pass]:
    """Return the passes of one training step, forward then backward."""
    found = [Pass("gather and normalise", batch * 3 * image_size**2 * (1 + element_bytes))]
    channels, side = 3, image_size
    for number, out in enumerate(filters, 1):
        x = batch * channels * side**2 * element_bytes
        y = batch * out * side**2 * element_bytes
        pooled = batch * out * (side // 2) ** 2 * element_bytes
        index = batch * out * (side // 2) ** 2 * INDEX_BYTES
        flops = 2.0 * batch * 3**2 * channels * out * side**2
        found += [
            Pass(f"block {number}: convolution", x + y, flops),
            Pass(f"block {number}: activation, pooling, statistics", y + pooled + index),
            Pass(f"block {number}: normalise", 2 * pooled),
            Pass(f"block {number}: gradient sums of the batch norm", 2 * pooled),
            Pass(f"block {number}: gradient through norm, activation, pooling", 2 * pooled + index + y),
            Pass(f"block {number}: weight gradient", x + y, flops),
        ]
        if number > 1:
            found.append(Pass(f"block {number}: input gradient", x + y, flops))
        channels, side = out, side // 2
    for name, into, out in (("dense", channels * side**2, NEURONS), ("output", NEURONS, NUM_CLASSES)):
        moved = element_bytes * (batch * (into + out) + into * out)
        found.append(Pass(f"{name}: forward, weight and input gradient", 3 * moved, 6.0 * batch * into * out))
    return found


def floor_seconds(found: Sequence[Pass], bytes_per_second: float, flop_per_second: float) -> float:
    """Return the least seconds that the passes take on a machine with these rates."""
    return sum(max(one.bytes / bytes_per_second, one.flops / flop_per_second) for one in found)


def main() -> None:
    """Print the count for the reference network, an image of a large batch and of a batch of 32."""
    for batch in (2048, 32):
        found = passes((32,) * 5, batch=batch)
        moved, flops = (sum(getattr(one, name) for one in found) / batch for name in ("bytes", "flops"))
        rate = batch / floor_seconds(found, 4.3e12, 788e12)
        print(
            f"batch {batch}: {moved / 1e6:.2f} MB and {flops / 1e9:.3f} GFLOP an image in {len(found)} "
            f"passes; at most {rate:,.0f} images/s at 4.3 TB/s and 788 TFLOP/s"
        )


if __name__ == "__main__":
    main()
