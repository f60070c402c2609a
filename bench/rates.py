"""Every rate that the plan in docs/scale.md is made of: its value, how sure it is, and where it is from.

No GPU has been available to the project. Whatever concerns one is counted from the network's shapes, published by
somebody else, or assumed; what is measured was measured on two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.report.record import Record, read

PUBLISHED = Path(__file__).parent / "results" / "published" / "amd-epyc-2-cores.json"
PHOTO_BYTES = 128 * 128 * 3
NUM_PARAMETERS = 105_162  # SmallCNN(10); a test counts them
GRADIENT_BYTES = 4 * (NUM_PARAMETERS + 1)
STATISTICS_BYTES = 4 * 3 * 32
"""A block's: count, mean and squares around it, 32 channels."""

Kind = Literal["measured", "counted", "published", "assumed"]


@dataclass(frozen=True)
class Rate:
    """A number, the range that it may well lie in, and its source."""

    value: float
    low: float
    high: float
    unit: str
    kind: Kind
    source: str


def rates() -> dict[str, Rate]:
    """Return every rate by its name."""
    return _measured(read(PUBLISHED)) | ELSEWHERE


def values() -> dict[str, float]:
    """Return the value of every rate by its name."""
    return {name: rate.value for name, rate in rates().items()}


def _measured(record: Record) -> dict[str, Rate]:
    """Return what the published file of the benchmarks holds, on two cores."""
    row = {(one["group"], one["name"]): one for one in record.rows}
    run = row["train", "cold start to the end"]["extra_info"]
    cold, warm, num_photos = run["stages"]["cold"], run["stages"]["warm"], run["num_photos"]
    grown = row["growth", "50,000 photos, batch 32, 1 epoch"]["extra_info"]
    points = (record.growth or {})["points"]
    step = row["step", "eager, bf16, 32,32,32,32,32, batch 32"]
    images = step["extra_info"]["images_per_second"] * step["median_seconds"]
    turbo = row["decode", "turbo, 2 threads"]["extra_info"]["images_per_second"] / 2
    evaluation = 4 * cold["eval"] / cold["train"]  # four photos are trained on for each that is held out
    beyond = (points[-1]["more_bytes"] - points[-1]["more_bytes_by_size"]) / (
        points[-1]["num_photos"] - points[0]["num_photos"]
    )

    def rate(value: float, unit: str, what: str, low: float | None = None, high: float | None = None) -> Rate:
        return Rate(value, low or value, high or value, unit, "measured", f"`{record.command}`: {what}")

    return {
        "start": rate(cold["start"] + cold["import"] + cold["report"], "s", "start, import and report of a run"),
        "scan": rate(1 / grown["photo_seconds"]["scan"], "photos/s", "50,000 files, local disk", high=272_000),
        "cpu_decode": rate(
            turbo, "photos/s a core", "turbo, generated photos; low: clothing-10's, docs/notes.md", 885, 1650
        ),
        "cpu_step": rate(
            images / step["median_seconds"],
            "images/s, 2 cores",
            "eager step, bf16, batch 32, n = 7",
            images / step["max_seconds"],
            images / step["min_seconds"],
        ),
        "evaluate": rate(evaluation, "of a training photo's time", "evaluation a photo, 10 epochs", 0.33, 0.64),
        "check": rate(
            num_photos * PHOTO_BYTES / warm["decode"] / 2,
            "B/s a core",
            "opening a cache: CRC-32 of every row",
            high=1.6e9,
        ),
        "upload": rate(
            1 / grown["photo_seconds"]["upload"] * PHOTO_BYTES, "B/s", "the whole set into memory, one rank", high=16e9
        ),
        "checkpoint": rate(cold["checkpoint"] / run["epochs"], "s an epoch", "both checkpoints"),
        "index": rate(beyond, "B a photo", "peak memory beyond pixels, each rank"),
    }


def _assumed(value: float, unit: str, source: str, low: float, high: float) -> Rate:
    return Rate(value, low, high, unit, "assumed", source)


def _published(value: float, unit: str, source: str, low: float | None = None, high: float | None = None) -> Rate:
    return Rate(value, low or value, high or value, unit, "published", source)


HERE = "`python -m bench.rank_costs`, the project's two cores, busy, median of 3 to 6 runs"
ELSEWHERE = {
    "row_read": Rate(1.5e9, 1.5e9, 16e9, "B/s a rank", "measured", f"{HERE}: rows in memory, one thread; high: many"),
    "append": Rate(2e9, 1e9, 2e9, "B/s", "measured", f"{HERE}: rows appended to a cache, CRC-32 each, to memory"),
    "journal": Rate(101e3, 74e3, 109e3, "photos/s", "measured", f"{HERE}: a cache's journal read"),
    "gloo_small": Rate(700e-6, 460e-6, 2200e-6, "s", "measured", f"{HERE}: all-reduce of 384 B, 2 processes"),
    "gloo_gradient": Rate(955e-6, 870e-6, 2900e-6, "s", "measured", f"{HERE}: of the flat gradient, 2 processes"),
    "launch": _assumed(
        90e-6, "s a step", "estimate: fused and captured 70 to 90 us, compiled 200 to 250", 70e-6, 250e-6
    ),
    "bandwidth": _assumed(4.3e12, "B/s", "H200, 0.9 of the data sheet's 4.8 TB/s", 3.3e12, 4.8e12),
    "matrix": _assumed(788e12, "FLOP/s", "H200, bf16, 0.8 of the data sheet's 989 TFLOP/s", 400e12, 989e12),
    "share": _assumed(0.5, "of the floor", "the CPU's step reaches 0.53 of its own", 0.2, 0.9),
    "jitter": _assumed(0.03, "of a step's time", "standard deviation of a rank's step", 0.01, 0.1),
    "gpu_decode": _published(
        7e3, "photos/s a GPU", "an A100's on ImageNet, NVIDIA's blog (quoted in DALI #5362)", 2e3, 14e3
    ),
    "cores": _assumed(12, "cores a GPU", "AWS p5.48xlarge: 192 threads, 8 GPUs", 8, 16),
    "start_gpu": _assumed(15, "s", "CUDA, capture, kernels compiled earlier", 5, 60),
    "join": _assumed(0.02, "s a rank", "processes started and met, after 3 s", 0.005, 0.1),
    "collective": _assumed(10e-6, "s", "a collective's own launch", 5e-6, 20e-6),
    "hop_node": _assumed(1.5e-6, "s a hop", "NVLink", 1e-6, 3e-6),
    "hop_net": _published(5e-6, "s a hop", "two nodes, 8 bytes, 19 to 20 us in all (nccl-tests #150)", 3e-6, 10e-6),
    "link_node": _assumed(100e9, "B/s a GPU", "NVLink, messages below 1 MB (450 GB/s one way)", 50e9, 450e9),
    "link_net": _published(46e9, "B/s a GPU", "a 400 Gb/s adapter a GPU (nccl-tests #290)", 12e9, 48e9),
    "memory": _published(141e9, "B a GPU", "H200 data sheet; 0.8 of it for photos"),
    "host_memory": _published(2.2e12, "B a node", "AWS p5.48xlarge: 2,048 GiB; 0.8 of it for pages"),
    "disk": _published(30.7e12, "B a node", "AWS p5.48xlarge: 8 x 3.84 TB NVMe"),
    "disk_read": _assumed(20e9, "B/s a node", "8 NVMe drives", 10e9, 40e9),
    "disk_write": _assumed(10e9, "B/s a node", "8 NVMe drives", 5e9, 20e9),
    "storage_node": _assumed(5e9, "B/s a node", "shared or object storage over the network", 1e9, 12e9),
    "storage_all": _assumed(100e9, "B/s in all", "the same, what it gives all nodes together", 20e9, 400e9),
    "jpeg": _published(117e3, "B a photo", "ImageNet: 150 GB of 1.3 million (NVIDIA's blog)", 50e3, 400e3),
    "price": _published(5.4, "USD a GPU-hour", "AWS capacity blocks, H200, as listed at the end of 2024", 2.5, 11),
    "keep": _published(0.023, "USD a GB-month", "object storage, list price", 0.01, 0.03),
}
