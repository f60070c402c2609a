"""All benchmarks in one command, with a results file, pictures and a report.

    python -m bench                        # the full form: hours on two cores
    python -m bench --quick                # under eight minutes on two cores
    python -m bench --only step decode     # some groups
    python -m bench --photos FOLDER        # over your own photos instead of generated ones
    python -m bench --only accuracy        # accuracy over time: hours, and goes on where it stopped
    python -m bench --only accuracy --photos FOLDER --seeds 100-107 --contenders seed.py seed fast:3,precision=fp32

Results go to bench/results/<machine>/, or to --out. To show them in the README:
cp bench/results/<machine>/<date>.json bench/results/published/<machine>.json && python scripts/readme_tables.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.page import report, summary
from bench.report.plots import PICTURES, draw
from bench.report.record import Record, record
from fastcnn.errors import FastCNNError, nearest

ROOT = Path(__file__).resolve().parents[1]
# The most important groups run first: when time runs out, the rest is left out. Others run before growth.
FIRST, LAST = ("train", "step", "decode", "loader", "augment", "infer"), ("growth",)
ACCURACY = "accuracy"  # hours in which whole networks are trained: by name alone
LINES = "rows.jsonl"
QUICK_BUDGET = 420.0  # seconds
NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print; return the exit code."""
    args = _parser().parse_args(argv)
    known = [*groups(), ACCURACY]
    for name in args.only or []:
        if name not in known:
            return _fail(f"no benchmarks '{name}'{nearest(name, known)}; there are {', '.join(known)}", 2)
    alone = args.only == [ACCURACY]
    if ACCURACY in (args.only or []) and not alone:
        return _fail(f"{ACCURACY} runs alone: --only {ACCURACY}", 2)
    if (args.seeds or args.contenders) and not alone:
        return _fail(f"--seeds and --contenders are of {ACCURACY}: --only {ACCURACY}", 2)
    if args.photos and not args.photos.is_dir():
        return _fail(f"--photos {args.photos}: no such folder", 2)
    needed = {"scipy": "scipy"} if alone else NEEDED
    missing = " ".join(package for module, package in needed.items() if importlib.util.find_spec(module) is None)
    if missing:
        return _fail(f"{missing}: not installed. pip install {missing}, or scripts/bench.sh, which installs it", 1)
    if alone:
        return _accuracy(args)
    try:
        found, seconds = _measure(args)
    except KeyboardInterrupt:
        return _fail("interrupted: nothing was written", 130)
    if found is None:
        return _fail("every benchmark failed or was left out: python -m pytest bench -ra says why", 1)
    _write(record(found, command=_command(args), settings=_settings(args, found), seconds=seconds), args.out)
    return 1 if found["failed"] else 0


def _fail(message: str, code: int) -> int:
    print(f"bench: error: {message}", file=sys.stderr)
    return code


def groups() -> list[str]:
    """Return the groups of benchmarks, in the order in which they run."""
    found = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench" / "suites").glob("bench_*.py"))
    others = [name for name in found if name not in FIRST + LAST]
    return [*(name for name in FIRST if name in found), *others, *(name for name in LAST if name in found)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="GROUP", help=f"{', '.join(groups())}; or {ACCURACY}"
    )
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photos by class; left out, generated ones")
    parser.add_argument("--seeds", metavar="FIRST-LAST", help=f"{ACCURACY}: left out, 0-7; with --quick, 0-2")
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME[:EPOCHS][,OPTION=VALUE...]",
        help=f"{ACCURACY}: left out, seed.py, tuned.py, cached.py, all recipes, and peers",
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="what begins later is left out, and listed")
    parser.add_argument("--device", help="cpu, cuda; left out, the GPU where there is one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="left out, bench/results/<machine>")
    parser.add_argument("--scale", choices=["full", "quick", "gpu", "smoke"], help=argparse.SUPPRESS)
    return parser


def _scale(args: argparse.Namespace) -> str:
    if args.scale or not args.quick:
        return str(args.scale or "full")
    import torch  # seconds: not for --help

    on_gpu = args.device.startswith("cuda") if args.device else torch.cuda.is_available()
    return "gpu" if on_gpu else "quick"


def _budget(args: argparse.Namespace) -> float:
    if args.budget is not None:
        return float(args.budget)
    return QUICK_BUDGET if _scale(args) in ("quick", "gpu") else float("inf")


def _command(args: argparse.Namespace) -> str:
    """Return the command as one would type it, without the paths in it."""
    parts = ["python -m bench"]
    parts += [f"--scale {args.scale}"] if args.scale else ["--quick"] if args.quick else []
    parts += [f"--only {' '.join(args.only)}"] if args.only else []
    parts += ["--photos DIR"] if args.photos else []
    parts += [f"--seeds {args.seeds}"] if args.seeds else []
    parts += [f"--contenders {' '.join(args.contenders)}"] if args.contenders else []
    parts += [f"--budget {args.budget:g}"] if args.budget is not None else []
    parts += [f"--device {args.device}"] if args.device else []
    return " ".join(parts)


def _settings(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    photos = "own" if args.photos else "generated by scripts/make_dataset.py"
    return {**found["settings"], "photos": photos, "groups": args.only or groups()}


def _measure(args: argparse.Namespace) -> tuple[dict[str, Any] | None, float]:
    """Run the benchmarks in a process of their own; return what pytest-benchmark wrote, and the seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastcnn-bench-") as folder:
        written = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pytest", "-qq", "-s", "--no-header", "--tb=short", "-rN", "--benchmark-quiet"]
        command += ["-W", "default"]  # an error in the tests; here a peer's would only hide its figures
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", f"--benchmark-json={written}"]
        # Photos and caches are gigabytes in the full form: each benchmark's go when it ends.
        command += [f"--basetemp={folder}/tmp", "-o", "tmp_path_retention_policy=none", f"--scale={_scale(args)}"]
        # What is measured when the machine goes, or the time, is kept.
        command += [f"--lines={(args.out / LINES).resolve()}"] if args.out else []
        command += [f"--photos={args.photos.resolve()}"] if args.photos else []
        command += [f"--device={args.device}"] if args.device else []
        command += [f"--budget={_budget(args)}"]
        command += [
            str(ROOT / "bench" / "suites" / f"bench_{name}.py") for name in groups() if name in (args.only or groups())
        ]
        subprocess.run(command, cwd=ROOT, check=False)
        found = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else None
    return found, time.perf_counter() - start


def _accuracy(args: argparse.Namespace) -> int:
    """Measure accuracy over time and return the exit code."""
    from bench.accuracy import suite  # imports torch

    try:
        results = suite.measure(args, scale=_scale(args), budget=_budget(args), command=_command(args))
    except KeyboardInterrupt:
        return _fail("interrupted: the same command goes on after the last run that ended", 130)
    except FastCNNError as error:
        return _fail(str(error), error.exit_code)
    _write(results, args.out)
    return 1 if results.failed else 0


def _write(results: Record, out: Path | None) -> None:
    folder = out or ROOT / "bench" / "results" / results.machine
    path = results.write(folder)
    try:
        drawn = draw(results, folder)
    except ImportError as error:  # a GPU box may lack matplotlib
        drawn = dict.fromkeys(PICTURES, f"{error.name} is not installed")
    (folder / "report.md").write_text(report(results, path, drawn), encoding="utf-8")
    print(f"\n{summary(results)}\nresults   {path}\nreport    {folder / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
