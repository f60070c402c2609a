"""Race: ours and its baselines, timed in turn (A B A B)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.harness.timing import Clocked, clocked, ratios

NETWORKS = [(32,) * 5, (64,) * 5, (32, 64, 128, 256, 512)]


SCALES: dict[str, dict[str, Any]] = {
    "full": {
        "rounds": 7,
        "image_size": 128,
        "num_photos": 2000,
        "decode_photos": 1000,
        "networks": NETWORKS,
        "batches": [32, 128, 512, 2048],
        "epochs": 10,
        "train_rounds": 3,
        "try_compile": True,
        "peers": True,
        "growth_photos": [1000, 5000, 20_000, 50_000],
        "growth_batches": [32, 128, 512, 2048],
        "infer_rounds": {1: 200, 64: 30},
    },
    "quick": {
        "rounds": 5,
        "image_size": 128,
        "num_photos": 1000,
        "decode_photos": 1000,
        "networks": NETWORKS[:1],
        "batches": [32],
        "epochs": 2,
        "train_rounds": 1,
        "try_compile": False,
        "peers": False,
        "growth_photos": [1000, 3000],
        "growth_batches": [32, 256],
        "infer_rounds": {1: 200, 64: 30},
    },
    # For the tests: that the parts work, not what they show.
    "smoke": {
        "rounds": 2,
        "image_size": 32,
        "num_photos": 200,
        "decode_photos": 100,
        "networks": [(8,) * 5],
        "batches": [8],
        "epochs": 2,
        "train_rounds": 1,
        "try_compile": False,
        "peers": False,
        "growth_photos": [60, 120],
        "growth_batches": [8, 16],
        "infer_rounds": {1: 2, 64: 2},
    },
}


class Race:
    """Times a contender with pytest-benchmark, and before each of its rounds every baseline once."""

    def __init__(self, benchmark: Any, device: torch.device, scale: dict[str, Any]) -> None:
        self.benchmark, self.device, self.scale = benchmark, device, scale

    def __call__(
        self,
        name: str,
        contender: Callable[[], object],
        baselines: Mapping[str, Clocked],
        *,
        images: int,
        rounds: int | None = None,
        warm_up: bool = True,
        **info: object,
    ) -> list[float]:
        """Return the contender's seconds, a round each; what else is known goes into the results file.

        name: what stands in the report.
        contender: what is timed; a benchmark checks its result afterwards.
        baselines: name -> what does the same work and says its seconds.
        images: photos that each of them handles in a call.
        """
        rounds = rounds or self.scale["rounds"]
        theirs: dict[str, list[float]] = {baseline: [] for baseline in baselines}

        def setup() -> None:
            for baseline, run in baselines.items():
                theirs[baseline].append(run())

        self.benchmark.name = name
        self.benchmark.pedantic(clocked(contender, self.device), setup=setup, rounds=rounds, warmup_rounds=int(warm_up))
        ours: list[float] = self.benchmark.stats.stats.data
        self.note(
            images_per_second=images / statistics.median(ours),
            over={baseline: ratios(ours, seconds[-rounds:]) for baseline, seconds in theirs.items()},
            baseline_images_per_second={
                baseline: images / statistics.median(seconds[-rounds:]) for baseline, seconds in theirs.items()
            },
            baseline_seconds={baseline: statistics.median(seconds[-rounds:]) for baseline, seconds in theirs.items()},
            **info,
        )
        facts = self.benchmark.extra_info
        shown = "".join(f"  {ratio['median']:.2f}x {baseline}" for baseline, ratio in facts["over"].items())
        print(f"{self.benchmark.group}: {name}: {facts['images_per_second']:,.0f} images/s{shown}", flush=True)
        return ours

    def note(self, **info: object) -> None:
        """Put more into the results file."""
        self.benchmark.extra_info.update(info)
