"""Kill test: training runs that get SIGKILL at random moments of every stage must end as an uninterrupted run does.

    python scripts/kill_test.py --kills 50
    python scripts/kill_test.py --kills 20 --moved

Each run is killed up to ten times. After each kill it is resumed with --resume (or by the same command, where there is
no run folder yet). It must end with the weights, metrics and best epoch of the uninterrupted run, to the bit. Prints
the kills by stage; exits with 1 where a run differs. With --moved the signals are SIGHUP, SIGTERM, SIGINT and SIGKILL
in turn, each is followed by moving the photos to another folder, and a process that is left over is a difference, too.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

STAGES = ("scan", "decode", "train", "checkpoint", "export")
# The stage of each kill of a run.
TARGETS = ("scan", "decode", "decode", "train", "checkpoint", "scan", "train", "checkpoint", "export", "export")
OPTIONS = {
    "epochs": 3,
    "image-size": 32,
    "filters": 8,
    "batch-size": 16,
    "schedule": "onecycle",
    "augment": "flip,mixup",
    "ema": 0.9,
    "dropout": 0.2,
    "threads": 1,
    "checkpoint-every": 2,
    "export": "torchscript",
    "wandb": "disabled",
}
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
MARK = "FASTCNN_KILL_TEST"  # environment variable by which processes of a run are found
FLAGS = ("--deterministic", "--no-report")


def main() -> None:
    """Parse the options, kill runs and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="least number of kills, a tenth of it in each stage")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--photos", type=int, default=240, help="photos to train on (default: 240)")
    parser.add_argument("--moved", action="store_true", help="other signals too, and the photos moved after each")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.child is not None:
        train(options.child, rest)
    kills, differences = run(options.kills, options.seed, options.photos, moved=options.moved)
    print(f"{sum(kills.values())} kills, {dict(kills)}; {len(differences)} runs differ")
    for difference in differences:
        print(difference)
    sys.exit(bool(differences))


def run(num_kills: int, seed: int, num_photos: int, *, moved: bool = False) -> tuple[Counter[str], list[str]]:
    """Return the number of kills in each stage, and the differences from the uninterrupted run."""
    from make_dataset import make  # type: ignore[import-not-found]

    from fastcnn.runs.resume import is_finished

    rng, kills, differences = random.Random(seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make(work / "photos", classes=4, photos=num_photos, seed=0)
        whole = work / "whole"
        longest = finish(work, whole, work / "whole-cache")
        expected = outcome(whole)
        for number in itertools.count():
            if sum(kills.values()) >= num_kills and min(kills[stage] for stage in STAGES) >= num_kills // 10:
                break
            cut, cache = work / f"cut-{number}", work / f"cache-{number}"
            for target in TARGETS:
                signum = SIGNALS[sum(kills.values()) % len(SIGNALS)] if moved else signal.SIGKILL
                stage = kill(work, cut, cache, target, longest[target], rng, signum)
                print(f"run {number + 1}: {signum.name} in {stage or 'no stage'}", flush=True)
                if stage:
                    kills[stage] += 1
                if moved:
                    differences += [f"run {number + 1}: process {pid} is left over" for pid in left_over(work)]
                    move_photos(work, rng)
                if is_finished(cut):  # before it was hit
                    break
            else:
                finish(work, cut, cache)
            found = outcome(cut)
            differences += [f"run {number + 1}: {name}" for name in expected if expected[name] != found.get(name)]
    return kills, differences


def photos_of(work: Path) -> Path:
    """Return the folder of photos, whatever it is called now."""
    return next(work.glob("photos*"))


def move_photos(work: Path, rng: random.Random) -> None:
    """Give the folder of photos another name."""
    photos_of(work).rename(work / f"photos-{rng.getrandbits(60)}")


def left_over(work: Path, patience: float = 10.0) -> list[int]:
    """Return the processes of runs in `work` that still live after some seconds (Linux)."""
    mark, end = f"{MARK}={work}".encode(), time.monotonic() + patience
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def command(work: Path, run_dir: Path, cache: Path) -> list[str]:
    """Return the arguments that begin the run, or resume it if its folder is there."""
    if (run_dir / "config.yaml").is_file():
        return ["train", str(photos_of(work)), "--resume", str(run_dir)]
    options = [*FLAGS, *(f"--{name}={value}" for name, value in OPTIONS.items())]
    return ["train", str(photos_of(work)), "--run-dir", str(run_dir), "--cache-dir", str(cache), *options]


@contextlib.contextmanager
def started(work: Path, arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """Yield a running command, and the names of the stages that it enters, as they come."""
    reading, writing = os.pipe()
    words = [sys.executable, __file__, "--child", str(writing), *arguments]
    with (
        subprocess.Popen(
            words,
            pass_fds=[writing],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, MARK: str(work)},
        ) as child,
        os.fdopen(reading) as stages,
    ):
        os.close(writing)
        yield child, (line.strip() for line in stages)


def finish(work: Path, run_dir: Path, cache: Path) -> dict[str, float]:
    """Let a run end; return the longest time, in seconds, that it spent in each stage at once."""
    longest: dict[str, float] = {}
    with started(work, command(work, run_dir, cache)) as (child, stages):
        last, since = "", time.perf_counter()
        for stage in stages:
            now = time.perf_counter()
            longest[last] = max(longest.get(last, 0.0), now - since)
            last, since = stage, now
        output = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise SystemExit(f"{' '.join(command(work, run_dir, cache))} ended with {child.returncode}: {output}")
    return longest


def kill(
    work: Path, run_dir: Path, cache: Path, target: str, seconds: float, rng: random.Random, signum: signal.Signals
) -> str:
    """Begin or resume a run and kill it within a stage; return the stage that was hit, "" if the run ended first."""
    entries = rng.randint(1, 3) if target in ("train", "checkpoint") else 1
    with started(work, command(work, run_dir, cache)) as (child, stages):
        last = ""
        for stage in stages:
            last = stage
            entries -= stage == target
            if not entries:
                time.sleep(rng.uniform(0, seconds / 2))
                break
        child.send_signal(signum)
        for stage in stages:  # entered meanwhile, or after a signal that lets a run save its state
            last = stage if signum == signal.SIGKILL else last
        return last if child.wait() and last in STAGES else ""


def outcome(run_dir: Path) -> dict[str, object]:
    """Return everything that a run leaves, apart from times."""
    import torch

    from fastcnn.storage import checkpoint

    found: dict[str, object] = {}
    for name in ("last.pt", "best.pt"):
        state = checkpoint.load(run_dir / name)
        for key in ("model", "optimizer"):
            found[f"{name}: {key}"] = [(k, v.numpy().tobytes()) for k, v in state[key].items()]
        for key in ("average", "sums", "rng"):
            found[f"{name}: {key}"] = state[key].numpy().tobytes()
        for key in ("epoch", "step", "cursor", "skipped"):
            found[f"{name}: {key}"] = state[key]
        found[f"{name}: best"] = state["best"]["epoch"]
    with (run_dir / "metrics.csv").open(newline="") as file:
        clock = ("seconds", "images_per_second")
        found["metrics.csv"] = [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(file)]
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    for key in ("finished", "best_epoch", "val_accuracy", "val_loss", "num_train", "num_val"):
        found[f"result.json: {key}"] = result[key]
    if (run_dir / "model.torchscript").is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's own
            exported = torch.jit.load(str(run_dir / "model.torchscript"))
        found["model.torchscript"] = [(k, v.numpy().tobytes()) for k, v in exported.state_dict().items()]
    return found


def train(descriptor: int, arguments: list[str]) -> None:
    """Run a command of `fastcnn` that writes the names of its stages to a pipe, and writes the cache often."""
    for signum in SIGNALS[:3]:  # a shell has its background jobs ignore SIGINT, and nohup SIGHUP
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    from fastcnn.cli import main as run_command
    from fastcnn.data import cache_files
    from fastcnn.system import stopwatch

    measured = stopwatch.Stopwatch.stage
    stages = ["-"]

    @contextlib.contextmanager
    def reported(self: stopwatch.Stopwatch, name: str) -> Iterator[None]:
        stages.append(name)
        os.write(descriptor, f"{name}\n".encode())
        try:
            with measured(self, name):
                yield
        finally:
            stages.pop()
            os.write(descriptor, f"{stages[-1]}\n".encode())

    stopwatch.Stopwatch.stage = reported  # type: ignore[method-assign]
    cache_files.CHUNK = 16
    sys.exit(run_command(arguments))


if __name__ == "__main__":
    main()
