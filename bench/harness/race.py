"""Race between a contender and its baselines, timed in turn (A B A B), and the sizes of each form of the suite."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.harness.timing import Clocked, RivalFailed, clocked, ratios

NETWORKS = [(32,) * 5, (64,) * 5, (32, 64, 128, 256, 512)]

FULL: dict[str, Any] = {
    "rounds": 7,
    "image_size": 128,
    "num_photos": 2000,
    "decode_photos": 1000,
    "networks": NETWORKS,
    "batches": [32, 128, 512, 2048],
    "epochs": 10,
    "accuracy_epochs": 10,
    "accuracy_seeds": 8,
    "train_rounds": 3,
    "computing": [0, 1, 2, 4],
    "try_compile": True,
    "baselines": ["seed", "tuned", "cached"],
    "growth_photos": [1000, 5000, 20_000, 50_000],
    "growth_batches": [32, 128, 512, 2048],
    "infer_rounds": {1: 200, 64: 30},
    "slice_seconds": 0.5,
}
LITTLE = {
    "networks": NETWORKS[:1],
    "epochs": 2,
    "accuracy_epochs": 3,
    "accuracy_seeds": 3,
    "train_rounds": 1,
    "computing": [0, 2],
    "try_compile": False,
}
QUICK = FULL | LITTLE | {"rounds": 5, "num_photos": 1000, "batches": [32]}
QUICK |= {"growth_photos": [1000, 3000], "growth_batches": [32, 256]}
# An epoch of fewer photos is over in milliseconds on a GPU, most of them not the step's.
GPU = QUICK | {"num_photos": 12_500, "batches": [32, 2048], "epochs": 3, "slice_seconds": 0.2}
SMOKE = QUICK | {"rounds": 2, "image_size": 32, "num_photos": 200, "decode_photos": 100, "networks": [(8,) * 5]}
SMOKE |= {
    "batches": [8],
    "accuracy_epochs": 1,
    "accuracy_seeds": 2,
    "growth_photos": [60, 120],
    "growth_batches": [8, 16],
    "infer_rounds": {1: 2, 64: 2},
}
SCALES = {"full": FULL, "quick": QUICK, "gpu": GPU, "smoke": SMOKE}
"""Sizes of each form. The last shows to tests that the parts work."""


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
        baselines: name -> what does the same work and says its seconds; one that fails is left out and noted.
        images: photos that each of them handles in a call.
        """
        rounds = rounds or self.scale["rounds"]
        theirs: dict[str, list[float]] = {baseline: [] for baseline in baselines}
        failed: dict[str, str] = {}

        def setup() -> None:
            for baseline in list(theirs):
                try:
                    theirs[baseline].append(baselines[baseline]())
                except RivalFailed as error:
                    failed[baseline] = str(error)
                    del theirs[baseline]

        self.benchmark.name = name
        self.benchmark.pedantic(clocked(contender, self.device), setup=setup, rounds=rounds, warmup_rounds=int(warm_up))
        ours: list[float] = self.benchmark.stats.stats.data
        theirs = {baseline: seconds[-rounds:] for baseline, seconds in theirs.items()}
        typical = {baseline: statistics.median(seconds) for baseline, seconds in theirs.items()}
        self.note(
            images_per_second=images / statistics.median(ours),
            over={baseline: ratios(ours, seconds) for baseline, seconds in theirs.items()},
            baseline_images_per_second={baseline: images / seconds for baseline, seconds in typical.items()},
            baseline_seconds=typical,
            **({"failed_baselines": failed} if failed else {}),
            **info,
        )
        facts = self.benchmark.extra_info
        shown = "".join(f"  {ratio['median']:.2f}x {baseline}" for baseline, ratio in facts["over"].items())
        shown += "".join(f"  {baseline} failed: {reason}" for baseline, reason in failed.items())
        print(f"{self.benchmark.group}: {name}: {facts['images_per_second']:,.0f} images/s{shown}", flush=True)
        return ours

    def note(self, **info: object) -> None:
        """Put more into the results file."""
        self.benchmark.extra_info.update(info)
