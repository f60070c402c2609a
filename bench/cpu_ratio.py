"""The step on a CPU against a plain loop: two processes in turn, on the same random photos.

    python -m bench.cpu_ratio [--repeats 5] [--out FILE]

The plain loop is fp32, NCHW, eager, in a process of its own with default settings. Ours is the engine that `auto`
chooses, with the run's own settings. It also gives the FLOP/s that this makes, as a share of the machine's bf16 matrix
rate, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FILTERS, SIZE, BATCH, PHOTOS, WARM_UP, STEPS = (32,) * 5, 128, 32, 1024, 20, 60


def main() -> None:
    """Run both in turn and print medians, their ratio and the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--one", choices=["ours", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(ours() if args.one == "ours" else plain()))
        return
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(args.repeats):
        for name, found in rows.items():
            command = [sys.executable, "-m", "bench.cpu_ratio", "--one", name]
            root = Path(__file__).resolve().parents[1]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name:6} {found[-1]['images_per_second']:8.0f} images/s", flush=True)
    ratios = [a["images_per_second"] / b["images_per_second"] for a, b in zip(*rows.values(), strict=True)]
    shares = [row["share_of_matrix_rate"] for row in rows["ours"]]
    if args.out:
        args.out.write_text(json.dumps(summary(rows, ratios, shares), indent=1) + "\n", encoding="utf-8")
    print(f"ratio, pair by pair: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"share of the matrix rate: median {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")


def summary(rows: dict[str, list[dict[str, float]]], ratios: list[float], shares: list[float]) -> dict[str, object]:
    """Return what is kept of a measurement."""
    import torch

    from fastcnn import runtime

    return {
        "command": "python -m bench.cpu_ratio",
        "hardware": runtime.describe(torch.device("cpu")),
        "versions": runtime.versions(),
        "n": len(ratios),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "share_of_matrix_rate": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        "runs": rows,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Return the README's rows of a summary."""

    def shown(figure: dict[str, float]) -> str:
        return f"{figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f}), n = {found['n']}"

    made_with = (
        f"torch {found['versions']['torch']}, Python {found['versions']['python']}, {found['hardware']['cores']} cores"
    )
    command = f"`{found['command']}`"
    return [
        f"| what ({made_with}) | command | figure |",
        "| --- | --- | --- |",
        f"| the chosen engine's step over a plain fp32 NCHW eager loop's | {command} | {shown(found['ratio'])} |",
        f"| FLOP/s over the bf16 matrix rate | {command} | {shown(found['share_of_matrix_rate'])} |",
    ]


def ours() -> dict[str, float]:
    """Return images/s of the chosen engine, and its FLOP/s over the matrix rate."""
    import torch

    from bench.gpu_proof import make_step, random_feed, wrapped
    from bench.roofline import passes
    from bench.timing import seconds_a_call
    from fastcnn import engines, runtime

    device = torch.device("cpu")
    with runtime.settings(device, threads=None, deterministic=False):
        precision = runtime.pick_precision("auto", device, deterministic=False, strict=False)
        step = make_step(random_feed(device, PHOTOS, SIZE), FILTERS, BATCH, precision)
        engine, _, _ = engines.choose(step, 10_000, "")
        run = wrapped(step, engine)
        rate = timed_rate(run)
        a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
        matrix = 2 * 2048**3 / seconds_a_call(lambda: a @ b, device, 0.3, 5)
    flops = sum(one.flops for one in passes(FILTERS, image_size=SIZE))  # an image, forward and backward: 0.358 G
    return {"images_per_second": rate, "share_of_matrix_rate": rate * flops / matrix}


def plain() -> dict[str, float]:
    """Return images/s of the plain loop."""
    import torch

    from bench.baselines import loops

    pixels = torch.randn(PHOTOS, 3, SIZE, SIZE)
    labels = torch.arange(PHOTOS) % 10
    call = loops.plain(pixels, labels, FILTERS, BATCH, "fp32")

    def run(count: int) -> None:
        for _ in range(count):
            call()

    return {"images_per_second": timed_rate(run)}


def timed_rate(run: object) -> float:
    """Return images/s over `STEPS` steps after `WARM_UP`."""
    assert callable(run)
    run(WARM_UP)
    start = time.perf_counter()
    run(STEPS)
    return STEPS * BATCH / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
