"""Is a revision slower than another? Both measured in turn on this machine, with confidence intervals.

    scripts/bench_compare.sh BASE [HEAD] [--json FILE]     # HEAD left out: the working tree as it is

Three rows: images/s of the training step, images/s of decoding, and start-up: seconds from starting `fastcnn train` to
the end of its first training step, caches warm. Each revision's code runs in processes of its own, from a temporary
folder, with the packages installed here. They work in short slices that alternate, A B and then B A, so that the drift
of a shared machine falls on both; every pair gives a ratio. Shown is the pairs' typical ratio of speeds
(Hodges-Lehmann) with the 95% interval of Wilcoxon's test. A revision is slower where that whole interval lies below a
margin.

Exit codes: 0 no slowdown, 4 a slowdown beyond the noise, 2 a revision or an option is wrong, 1 a revision that the
measurement cannot drive.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.compare.speed_ratio import Ratio, speed_ratio
from bench.harness.command import exit_code
from fastcnn.errors import FastCNNError, UsageError
from fastcnn.system import text

ROOT = Path(__file__).resolve().parents[2]
MEASURED = {"step": ("training step, batch 32", 32), "decode": ("decoding, turbo", 1), "start": ("start-up", 0)}
"""Kind of work -> its name in the table and the images in a unit of it (0: seconds are shown, no rate), as
bench/compare/worker.py has them."""

SLICE_SECONDS = 0.1  # short: the machine's load changes from second to second, and more pairs say more than longer ones
ROUND_SECONDS = 10.0
MIN_ROUNDS, MIN_PAIRS, START_PAIRS = 3, 8, 4
NARROW = 0.8  # an interval of this part of the margin, on either side, is narrow enough


class Probe:
    """Process that works with a revision's code when it is told to."""

    def __init__(self, tree: Path, photos: Path, cache: Path, name: str, threads: int, how: str = "serve") -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        # -P and PYTHONPATH: modules come from the revision's folder, and none from bench/ beside the script.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), how, str(photos), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def __call__(self, what: str, count: int) -> float:
        """Do so many units of work and return the seconds."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer, or that there is none, says why
            print(what, count, file=self._process.stdin, flush=True)
        seconds: float = self.answer()["seconds"]
        return seconds

    def answer(self) -> dict[str, Any]:
        """Wait for a line and return it; the first one of a serving process tells the facts about its revision."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise FastCNNError(f"{self.name} cannot be measured by bench/compare/worker.py: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self._process.wait()}"

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=5)  # closes its standard input, at whose end it ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()


Side = Callable[..., Probe]
"""Starts a process of a revision; how="start" runs it to the end of its first step."""
Work = Callable[[str, int], float]
"""(kind of work, units of it) -> seconds."""


def start(side: Side, what: str, count: int) -> float:
    """Start a revision's run and return the seconds to the end of its first step."""
    began = time.perf_counter()
    with contextlib.closing(side(how="start")) as process:
        process.answer()
        return time.perf_counter() - began


def measure(sides: Sequence[Side], args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every slice, by kind of work: all of the base's, and all of the head's in the same order.

    It goes on until the intervals are narrow enough, or the time is up: a busy machine takes longer. The processes are
    started anew every round: how memory happens to lie makes one a little faster than the other.
    """
    seconds: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in args.only or MEASURED}
    starts = [functools.partial(start, side) for side in sides]
    units, turn, wide = {"start": 1}, 0, list(seconds)
    if "start" in wide:
        for run in starts:
            run("start", 1)  # decodes the photos, builds the kernels
    end = time.monotonic() + 60 * args.minutes
    while wide and (turn < MIN_ROUNDS or time.monotonic() < end):
        wanted = list(seconds) if turn < MIN_ROUNDS else wide
        if "start" in wanted:
            alternate(starts, "start", 1, seconds["start"], turn, least=START_PAIRS, lasting=0)
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(contextlib.closing(side())) for side in sides]
            facts = [probe.answer() for probe in probes]
            for what in (what for what in wanted if what != "start"):
                if what not in units:
                    units[what] = units_a_slice(probes[0], what)
                for probe in probes:
                    probe(what, units[what])
                alternate(probes, what, units[what], seconds[what], turn, least=MIN_PAIRS, lasting=ROUND_SECONDS)
        turn += 1
        intervals: dict[str, Ratio] = {what: speed_ratio(*taken) for what, taken in seconds.items()}
        wide = [what for what, found in intervals.items() if found.half_width > args.margin * NARROW]
        shown = [f"{what} {found.low:.2f} to {found.high:.2f}" for what, found in intervals.items()]
        print(f"round {turn}: head / base: {', '.join(shown)}", file=sys.stderr)
    return {"facts": facts, "units": units, "seconds": seconds, "rounds": turn}


def alternate(
    sides: Sequence[Work],
    what: str,
    units: int,
    seconds: tuple[list[float], list[float]],
    first: int,
    *,
    least: int,
    lasting: float,
) -> None:
    """Add a round's pairs of slices to `seconds`, A B, B A, A B ...: `least` of them, and as many as time allows."""
    end, pair = time.monotonic() + lasting, first
    while pair < first + least or time.monotonic() < end:
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[which].append(sides[which](what, units))
        pair += 1


def units_a_slice(probe: Probe, what: str) -> int:
    """Return how many units of work fill a slice."""
    count = 1
    while (took := probe(what, count)) < SLICE_SECONDS / 2:
        count = math.ceil(count * min(4.0, SLICE_SECONDS / took))
    return max(1, round(count * SLICE_SECONDS / took))


def summary(found: dict[str, Any], names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a measurement that are shown and kept."""
    rows = []
    for what, (base, head) in found["seconds"].items():
        title, images = MEASURED[what]
        units, ratio = found["units"][what], speed_ratio(base, head)
        typical = {"base": statistics.median(base) / units, "head": statistics.median(head) / units}
        row = {"what": what, "title": title, "seconds_a_unit": typical, **asdict(ratio)}
        if images:
            row["images_per_second"] = {side: images / seconds for side, seconds in typical.items()}
        rows.append({**row, "verdict": ratio.verdict(args.margin), "seconds": {"base": base, "head": head}})
    base, head = ({"name": name, **facts} for name, facts in zip(names, found["facts"], strict=True))
    settings = {"margin": args.margin, "threads": args.threads, "rounds": found["rounds"]}
    return {"base": base, "head": head, **settings, "rows": rows}


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines that are shown."""
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    lines = [
        f"{side}: {result[side]['name']}: {result[side]['engine']} engine, {result[side]['precision']}, "
        f"{result[side]['device']}, {threads}, torch {result[side]['torch']}"
        for side in ("base", "head")
    ]
    cells, columns = [], ["", "base", "head", "speed, head / base", "95% interval", "pairs", "verdict"]
    for row in result["rows"]:
        shown = [
            f"{row['images_per_second'][side]:,.0f} images/s" if "images_per_second" in row else f"{seconds:.2f} s"
            for side, seconds in row["seconds_a_unit"].items()
        ]
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        cells.append([row["title"], *shown, f"{row['ratio']:.3f}", interval, str(row["n"]), row["verdict"]])
    lines += text.table(columns, cells, right=columns[1:6]).splitlines()
    lines += [
        f"{row['title']}: the machine was too busy to tell less than {row['high'] / row['low'] - 1:.0%} apart"
        for row in result["rows"]
        if row["verdict"] == "no clear difference"
    ]
    slower = [row["title"] for row in result["rows"] if row["verdict"] == "slower"]
    margin = f"{result['margin']:.0%}"
    lines.append(
        f"slower by more than {margin}: {', '.join(slower)}" if slower else f"nothing is slower by more than {margin}"
    )
    return lines


def options() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench_compare.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a revision")
    parser.add_argument("head", nargs="?", help="another; left out: the working tree as it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file, too")
    parser.add_argument("--margin", type=float, default=0.05, help="how much slower is slower (%(default)s)")
    parser.add_argument("--minutes", type=float, default=3, help="at most, where the machine is busy (%(default)s)")
    parser.add_argument("--threads", type=int, help="left out: every core, or 1 where the machine is busy")
    parser.add_argument("--only", action="append", choices=list(MEASURED), help="measure this alone")
    return parser


def idle_threads() -> int:
    """Return the threads to measure with: one where others keep the machine busy.

    Threads that wait for each other many times a step, on cores that others hold, make its time vary tenfold: at a load
    of 10 on two cores, two minutes of pairs left an interval of 0.6 to 1.3 (docs/notes.md).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 2
    return 1 if busy else cores


def extracted(revision: str | None, folder: Path) -> tuple[Path, str]:
    """Return a folder with a revision's files and the revision's name; None is the working tree as it is."""
    if revision is None:
        return ROOT, "the working tree"

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False).stdout

    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    if not commit:
        raise UsageError(f"no revision '{revision}' here: a branch, a tag or a commit, see git log")
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as files:
        files.extractall(folder, filter="data")
    if not (folder / "fastcnn").is_dir():
        raise FastCNNError(f"no fastcnn in '{revision}' ({commit[:10]}): it cannot be compared")
    return folder, commit[:10] if commit.startswith(revision) else f"{revision} ({commit[:10]})"


def run(args: argparse.Namespace) -> int:
    """Measure both revisions, show and return the exit code."""
    args.threads = args.threads or idle_threads()
    with tempfile.TemporaryDirectory(prefix="fastcnn-compare-") as name:
        folder = Path(name).resolve()
        found = [extracted(args.base, folder / "base"), extracted(args.head, folder / "head")]
        photos = folder / "photos"
        script = [sys.executable, str(ROOT / "scripts" / "make_dataset.py"), str(photos)]
        # One process: a signal that ends this one would leave workers that write into the folder as it is removed.
        script += ["--classes", "10", "--photos", "200", "--workers", "1"]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        sides = [
            functools.partial(Probe, tree, photos, folder / f"cache-{number}", name, args.threads)
            for number, (tree, name) in enumerate(found)
        ]
        result = summary(measure(sides, args), [name for _, name in found], args)
    print("\n".join(table(result)))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 4 if any(row["verdict"] == "slower" for row in result["rows"]) else 0


def main() -> int:
    """Compare two revisions and return the exit code."""
    args = options().parse_args()
    for signum in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))  # clears up on the way out
    return exit_code("bench_compare", lambda: run(args), "stopped: nothing was left behind")


if __name__ == "__main__":
    sys.exit(main())
