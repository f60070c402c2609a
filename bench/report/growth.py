"""How runs grow with their photos: seconds a photo, and memory against what the photos' sizes give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GROWING = ("scan", "decode", "upload", "train", "eval")
SECONDS_WITHIN, MEMORY_WITHIN = 0.20, 0.25


def photo_seconds(stages: dict[str, float], num_photos: int) -> dict[str, float]:
    """Return the seconds a photo of each stage that does more the more photos there are, and their sum.

    Starting, importing, building kernels and saving checkpoints cost the same for any number of photos.
    """
    found = {stage: stages[stage] / num_photos for stage in GROWING}
    return {**found, "total": sum(found.values())}


def growth(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return how runs over more and more photos compare with the smallest of them; None for fewer than two.

    Each run has num_photos, photo_seconds, peak_memory_bytes and bytes_per_photo. Memory is what a run took beyond the
    smallest one, which holds the interpreter, torch and the step; the sizes give bytes_per_photo for each photo more.
    """
    runs = sorted(runs, key=lambda run: run["num_photos"])
    if len(runs) < 2:
        return None
    first, points = runs[0], []
    for run in runs:
        more = run["num_photos"] - first["num_photos"]
        point = {
            "num_photos": run["num_photos"],
            "photo_seconds": run["photo_seconds"]["total"],
            "over_fewest": run["photo_seconds"]["total"] / first["photo_seconds"]["total"],
            "peak_memory_bytes": run["peak_memory_bytes"],
        }
        if more:
            point["more_bytes"] = run["peak_memory_bytes"] - first["peak_memory_bytes"]
            point["more_bytes_by_size"] = more * run["bytes_per_photo"]
            point["memory_over_sizes"] = point["more_bytes"] / point["more_bytes_by_size"]
        points.append(point)
    return {
        "points": points,
        # Less is not growth: what all runs need alike is spread over more photos.
        "seconds_hold": all(point["over_fewest"] - 1 <= SECONDS_WITHIN for point in points),
        "memory_holds": all(point["memory_over_sizes"] - 1 <= MEMORY_WITHIN for point in points[1:]),
    }
