"""What only a GPU can prove, measured: steps by engine against plain loops, kernels, synchronisations, start-up.

    python -m bench.gpu_proof OUT            # on a GPU box; scripts/gpu_proof.sh runs the cuda tests first
    python -m bench.gpu_proof OUT --small    # minutes on a CPU: that the parts work, not what they show

It writes OUT/gpu_proof.json, OUT/throughput.png and prints a short table last. It calls the library, and needs torch,
numpy and matplotlib; a part whose packages are missing is named and skipped.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.baselines.loops import LOOPS
from bench.roofline import floor_seconds, passes
from bench.timing import interleaved, repeated, seconds_a_call, synchronize
from fastcnn import engines, runtime
from fastcnn.errors import first_line
from fastcnn.kernels import pool
from fastcnn.loader import Feed
from fastcnn.model import SmallCNN
from fastcnn.optim import Adam, FlatParameters
from fastcnn.step import Normalise, TrainingStep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSES = 10
FULL: dict[str, Any] = {
    "photos": 10_000,
    "size": 128,
    "batches": [32, 128, 512, 2048],
    "filters": [(32,) * 5, (64,) * 5, (32, 64, 128, 256, 512)],
    "precisions": ["bf16", "fp16", "fp32"],
    "seconds": 0.3,
    "repeats": 5,
}
SMALL: dict[str, Any] = {
    **FULL,
    "photos": 256,
    "size": 32,
    "batches": [32],
    "filters": [(8,) * 5],
    "precisions": ["fp32"],
    "seconds": 0.02,
    "repeats": 2,
}

ENGINES: dict[str, Callable[[engines.Step], engines.Engine]] = {
    **engines.ENGINES,
    "graphed, 8 a replay": lambda step: engines.graphed(step, steps_per_replay=8),
}


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for the step table; the rest is skipped")
    args = parser.parse_args()
    device, sizes = torch.device(args.device), SMALL if args.small else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": "scripts/gpu_proof.sh" + (" --small" if args.small else ""),
        "hardware": runtime.describe(device),
        "versions": runtime.versions(),
        "settings": {**sizes},
    }
    parts: dict[str, Callable[[], Any]] = {
        "machine": lambda: machine_rates(device, small=args.small),
        "steps": lambda: step_table(device, sizes, args.budget),
        "profile": lambda: profile(device, sizes),
        "start": lambda: start_up(args.out, device),
    }
    with runtime.settings(device, threads=None, deterministic=False):
        for name, part in parts.items():
            print(f"-- {name}", flush=True)
            try:
                results[name] = part()
            except ImportError as error:
                print(f"{name}: skipped, {error.name} is not installed", flush=True)
                results[name] = {"skipped": f"{error.name} is not installed"}
            (args.out / "gpu_proof.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if isinstance(results["steps"], list):
        add_floors(results["steps"], results["machine"], sizes["size"])
        (args.out / "gpu_proof.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        try:
            picture(results["steps"], args.out / "throughput.png")
        except ImportError as error:
            print(f"throughput.png: skipped, {error.name} is not installed")
        report(results)


def machine_rates(device: torch.device, *, small: bool) -> dict[str, float]:
    """Return this machine's copy bandwidth (bytes read and written a second) and bf16 matrix rate (FLOP/s)."""
    source = torch.empty((1 << 24) if small else (1 << 32), dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), 512 if small else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = seconds_a_call(lambda: target.copy_(source), device, 0.2, 5)
    product = seconds_a_call(lambda: a @ b, device, 0.2, 5)
    return {"copy_bytes_per_second": 2 * source.numel() / copy, "matrix_flop_per_second": 2 * side**3 / product}


def step_table(device: torch.device, sizes: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """Return a row a combination: engine or loop, batch, filters, precision; seconds a step, images/s."""
    rows: list[dict[str, Any]] = []
    end = time.perf_counter() + budget
    for precision, filters, batch in itertools.product(sizes["precisions"], sizes["filters"], sizes["batches"]):
        if time.perf_counter() > end:
            print(f"out of time before {precision}, {filters}, batch {batch}", flush=True)
            rows.append({"skipped": "out of time", "precision": precision, "filters": filters, "batch": batch})
            continue
        runners, built = build_runners(device, sizes, precision, filters, batch)
        times = interleaved(runners, device, sizes["seconds"], sizes["repeats"])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rows.append(
                {
                    "engine": name,
                    "precision": precision,
                    "filters": list(filters),
                    "batch": batch,
                    "step_seconds": median,
                    "spread": [min(seconds), max(seconds)],
                    "images_per_second": batch / median,
                    "build_seconds": built[name],
                    "n": len(seconds),
                }
            )
            print(
                f"{precision} {filters} batch {batch:5} {name:19} {median * 1e6:10,.0f} us  "
                f"{batch / median:12,.0f} images/s",
                flush=True,
            )
    return rows


def add_floors(rows: list[dict[str, Any]], machine: dict[str, float], size: int) -> None:
    """Add each 16-bit row's share of the counted floor at this machine's own rates."""
    for row in rows:
        if row["precision"] in ("bf16", "fp16") and "step_seconds" in row:
            counted = passes(row["filters"], batch=row["batch"], image_size=size)
            floor = floor_seconds(counted, machine["copy_bytes_per_second"], machine["matrix_flop_per_second"])
            row["share_of_floor"] = floor / row["step_seconds"]


def build_runners(
    device: torch.device, sizes: dict[str, Any], precision: str, filters: tuple[int, ...], batch: int
) -> tuple[dict[str, Callable[[int], None]], dict[str, float]]:
    """Return, by name, what runs a number of steps, and how long it took to be ready. What fails is named."""
    feed = random_feed(device, max(sizes["photos"], 2 * batch), sizes["size"])
    runners: dict[str, Callable[[int], None]] = {}
    built: dict[str, float] = {}
    for name, make in ENGINES.items():
        start = time.perf_counter()
        step = make_step(feed, filters, batch, precision)
        try:
            engine = make(step)
        except engines.NoEngine as error:
            print(f"{name}: skipped, {error}", flush=True)
            continue
        runners[name], built[name] = wrapped(step, engine), time.perf_counter() - start
    pixels = Normalise(MEAN, STD, sizes["size"], device=device)(feed.images).contiguous()
    for name, loop in LOOPS.items():
        start = time.perf_counter()
        try:
            call = loop(pixels, feed.labels, filters, batch, precision)
            call()
        except Exception as error:  # the peer's compiler, say
            print(f"{name}: skipped, {first_line(error)}", flush=True)
            continue
        runners[name], built[name] = repeated(call), time.perf_counter() - start
    return runners, built


def random_feed(device: torch.device, count: int, size: int) -> Feed:
    """Return a feed of random pixels: a step's time does not depend on what the photos show."""
    return Feed(
        images=torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device),
        labels=torch.randint(0, NUM_CLASSES, (count,), device=device),
        permutation=torch.randperm(count, device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )


def make_step(feed: Feed, filters: tuple[int, ...], batch: int, precision: str) -> TrainingStep:
    """Return a training step of the reference network."""
    device, dtype = feed.images.device, runtime.DTYPES[precision]
    torch.manual_seed(0)
    if device.type == "cpu":
        pool.load()
    model = SmallCNN(NUM_CLASSES, filters=filters, image_size=feed.images.shape[1]).to(device)
    parameters = FlatParameters(model, dtype)
    parameters.compute.train()
    rates = torch.full((1_000_000,), 1e-4)
    normalise = Normalise(MEAN, STD, feed.images.shape[1], dtype, device)
    return TrainingStep(parameters, Adam(parameters, 1e-4), feed, normalise, batch_size=batch, rates=rates)


def wrapped(step: TrainingStep, engine: engines.Engine) -> Callable[[int], None]:
    """Return what runs a number of steps, over as many epochs as they take."""

    def run(count: int) -> None:
        while count:
            step.feed.cursor.zero_()
            portion = min(count, step.num_steps)
            engine.run(portion)
            count -= portion

    return run


def profile(device: torch.device, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return, for each engine at batch 32, kernels a step, the GPU's idle share, and synchronisations in 50 steps."""
    feed = random_feed(device, max(sizes["photos"], 64), sizes["size"])
    found: dict[str, Any] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for name in engines.ENGINES:
        step = make_step(feed, sizes["filters"][0], 32, sizes["precisions"][0])
        try:
            engine = engines.ENGINES[name](step)
        except engines.NoEngine as error:
            found[name] = {"skipped": str(error)}
            continue
        num_steps = min(50, step.num_steps)
        run = wrapped(step, engine)
        run(num_steps)
        synchronize(device)
        with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as trace:
            warnings.simplefilter("ignore")
            run(num_steps)
        found[name] = count_events(list(trace.events() or []), num_steps)
    return found


def count_events(events: list[Any], num_steps: int) -> dict[str, float]:
    """Return kernels a step, the share of time between the first and last kernel that no kernel ran, and syncs."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if str(event.device_type).endswith("CUDA") and "mem" not in event.name.lower()
    )
    busy = sum(end - start for start, end in kernels)
    span = kernels[-1][1] - kernels[0][0] if kernels else 0
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
    return {
        "kernels_per_step": len(kernels) / num_steps,
        "idle_share": 1 - busy / span if span else 0.0,
        "synchronisations": sum(event.name in waits for event in events),
        "host_to_device_copies": sum("HtoD" in event.name for event in events),
        "operators_per_step": sum(event.name.startswith("aten::") for event in events) / num_steps,
    }


FIT = """
import json, sys
from fastcnn import Config, fit
data, device, engine, cache_dir = sys.argv[1:]
run = fit(Config(data=data, epochs=1, device=device, engine=engine, cache_dir=cache_dir, report=False))
print(json.dumps(run.summary["seconds"]))
"""


def start_up(out: Path, device: torch.device) -> dict[str, Any]:
    """Return seconds by stage of a first run (cold cache) and a second one (warm), each in a process of its own."""
    import yaml  # noqa: F401  (what fit needs beyond this file, asked for before photos are made)

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
    photos = out / "photos"
    found: dict[str, Any] = {}
    importlib.import_module("make_dataset").make(photos, classes=4, photos=200, seed=0)
    for engine, name in itertools.product(
        ["eager", "graphed"] if device.type == "cuda" else ["eager"], ["cold", "warm"]
    ):
        cache = out / f"cache-{engine}"
        command = [sys.executable, "-W", "ignore", "-c", FIT, str(photos), device.type, engine, str(cache)]
        root = str(Path(__file__).resolve().parents[1])
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=out, env={**os.environ, "PYTHONPATH": root}
        )
        if done.returncode:
            found[f"{engine}, {name}"] = {"failed": done.stderr.strip().splitlines()[-1]}
            continue
        seconds = json.loads(done.stdout.strip().splitlines()[-1])
        before = sum(seconds[stage] for stage in ("scan", "decode", "upload", "compile"))
        found[f"{engine}, {name}"] = {"before_first_step": before, **seconds}
    return found


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw images/s over batch size, a panel for each network and precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "engine" in row]
    panels = sorted({(row["precision"], tuple(row["filters"])) for row in rows})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (precision, filters) in zip(axes.flat, panels, strict=False):
        mine = [row for row in rows if row["precision"] == precision and tuple(row["filters"]) == filters]
        for name in dict.fromkeys(row["engine"] for row in mine):
            points = [(row["batch"], row["images_per_second"]) for row in mine if row["engine"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images/s", title=f"{precision}, {filters}")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(results: dict[str, Any]) -> None:
    """Print the best engine of each combination against the loops."""
    print(
        f"\n{'network':28} {'batch':>6} {'best engine':19} {'images/s':>12} "
        f"{'/ plain':>8} {'/ max-autotune':>15} {'of floor':>9}"
    )
    rows = [row for row in results["steps"] if "engine" in row]
    for key in dict.fromkeys((row["precision"], tuple(row["filters"]), row["batch"]) for row in rows):
        mine = {r["engine"]: r for r in rows if (r["precision"], tuple(r["filters"]), r["batch"]) == key}
        best = max((mine[name] for name in ENGINES if name in mine), key=lambda row: row["images_per_second"])
        ratios = [
            f"{best['images_per_second'] / mine[loop]['images_per_second']:.2f}" if loop in mine else "-"
            for loop in LOOPS
        ]
        network = f"{key[0]} {','.join(map(str, key[1]))}"
        print(
            f"{network:28} {key[2]:>6} {best['engine']:19} {best['images_per_second']:>12,.0f} "
            f"{ratios[0]:>8} {ratios[1]:>15} {format(best.get('share_of_floor', float('nan')), '.2f'):>9}"
        )


if __name__ == "__main__":
    main()
