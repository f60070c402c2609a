"""The least that a training step must move and compute, counted from the network's shapes: the floor of its time.

`passes` counts library convolutions with perfect pointwise fusion around them, `fused_passes` the kernels of
`network/kernels`: each pass reads its inputs and writes its outputs once, and nothing is kept between passes. Values
that neighbouring programs of a kernel read again, at the edges of tiles, come from the cache and are not counted.
A pass takes the longer of its bytes over the bandwidth and its FLOPs over the matrix rate; passes follow each other.
Launches, latencies and the optimizer's few hundred KB are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INDEX_BYTES = 1  # which of the four won


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
    kernel_size: int = 3,
    dense_neurons: int = 128,
    num_classes: int = 10,
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
        flops = 2.0 * batch * kernel_size**2 * channels * out * side**2
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
    return found + _dense_passes(channels * side**2, dense_neurons, num_classes, batch, element_bytes)


SAVING = ("gelu", "silu", "mish", "elu", "selu", "tanh")  # activations whose slopes the fused kernels keep
PROGRAMS = 132  # an H100's or H200's multiprocessors: how many programs at most share a gradient of weights


def fused_passes(
    filters: Sequence[int],
    *,
    batch: int = 1,
    image_size: int = 128,
    dense_neurons: int = 128,
    num_classes: int = 10,
    element_bytes: int = 2,
    activation: str = "relu",
    batch_norm: bool = True,
    programs: int = PROGRAMS,
) -> list[Pass]:
    """Return the passes of one training step with fused blocks (3x3), a kernel each, forward then backward."""
    found, channels, side = [], 3, image_size
    for number, out in enumerate(filters, 1):
        x = batch * channels * side**2 * (element_bytes if number > 1 else 1)
        windows = batch * (side // 2) ** 2
        pooled, index = windows * out * element_bytes, windows * out / 4
        slopes = pooled if activation in SAVING else 0
        weights = (9 * channels + 1) * out * element_bytes
        flops = 2.0 * batch * 9 * channels * out * side**2
        values = pooled if batch_norm or not slopes else 0  # what the winners' gradient is made of, besides its own
        norm = 4 * channels * 4 if batch_norm and number > 1 else 0
        parts = max(1, min(programs, windows // 64))
        sums = (((9 * channels if number > 1 else 48) + 1) * out * 4 + norm) * parts
        statistics = 3 * out * 4 * min(4 * programs, -(-windows // 32)) if batch_norm else 0
        name = f"block {number} fused"
        found.append(Pass(f"{name}: forward", x + weights + pooled + index + slopes + statistics, flops))
        if batch_norm:
            found.append(Pass(f"{name}: statistics", statistics))
        upstream = pooled + values + slopes + index
        d_winner = pooled if number > 1 else 0
        norm_sums = norm * parts
        found.append(Pass(f"{name}: weight gradient", x + upstream + d_winner + sums - norm_sums, flops))
        if number > 1:
            again = x if batch_norm else 0  # for the sums of the norm before
            moved = d_winner + index + weights + x + again + norm_sums
            found.append(Pass(f"{name}: input gradient", moved, flops))
        unread = 12 * out * 4 * parts if number == 1 else 0  # a fourth neighbour that has no tap
        found.append(Pass(f"{name}: sums over programs", sums - unread + weights))
        channels, side = out, side // 2
    last = batch * channels * side**2 * element_bytes
    if batch_norm:
        found.append(Pass("last norm, both ways", 5 * last))
    return found + _dense_passes(channels * side**2, dense_neurons, num_classes, batch, element_bytes)


def _dense_passes(features: int, dense_neurons: int, num_classes: int, batch: int, element_bytes: int) -> list[Pass]:
    widths, found = [features, dense_neurons, num_classes], []
    for name, into, out in zip(("dense", "output"), widths, widths[1:], strict=False):
        moved = element_bytes * (batch * (into + out) + into * out)
        found.append(Pass(f"{name}: forward, weight and input gradient", 3 * moved, 6.0 * batch * into * out))
    return found


def floor_seconds(found: Sequence[Pass], bytes_per_second: float, flop_per_second: float) -> float:
    """Return the least seconds that the passes take on a machine with these rates."""
    return sum(max(one.bytes / bytes_per_second, one.flops / flop_per_second) for one in found)


def main() -> None:
    """Print both counts for the reference network, a photo of a large batch and of a batch of 32."""
    for batch in (2048, 32):
        for name, found in (("plain", passes((32,) * 5, batch=batch)), ("fused", fused_passes((32,) * 5, batch=batch))):
            moved = sum(one.bytes for one in found) / batch
            flops = sum(one.flops for one in found) / batch
            rate = batch / floor_seconds(found, 4.3e12, 788e12)
            print(
                f"{name}, batch {batch}: {moved / 1e6:.2f} MB and {flops / 1e9:.3f} GFLOP a photo in {len(found)} "
                f"passes; at most {rate:,.0f} images/s at 4.3 TB/s and 788 TFLOP/s"
            )
            if name == "fused":
                for one in found:
                    print(f"  {one.name}: {one.bytes / batch / 1e3:,.1f} KB, {one.flops / batch / 1e6:,.1f} MFLOP")


if __name__ == "__main__":
    main()
