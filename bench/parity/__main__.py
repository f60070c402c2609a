"""Parity: does training by the fast path give what seed.py gives? The same recipe, network, initial weights, photos,
split, normalisation and seeds, over several seeds.

    fastcnn parity DATA --seeds 16 --epochs 8 --margin 2.5          # the verdict
    fastcnn parity DATA --seeds 4 --ingredients                     # one change at a time, each with its difference

Three measures are compared, in pairs over the seeds: the accuracy on the held-out photos after the last epoch, and
the epochs' losses, held-out and training. "equivalent": each one's 90% interval lies within its margin (two one-sided
tests at 5%). "different" (exit code 4): one's interval lies wholly beyond it, or that of a single epoch's loss, or
photos have other labels. Anything else is "undecided", and the line says how many seeds, or photos, would do. Each
run's figures are written when it ends, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.command import exit_code, typed
from bench.harness.machine import slug
from bench.parity import arms, curves
from bench.parity.arms import FAST, INGREDIENTS, PLAIN, SHARED, Arm, Experiment, Found
from bench.parity.equivalence import ALPHA, MOST, compare, overall
from bench.report import tables
from bench.report.record import Record, Row, own_record, read, row_of_runs, without_paths
from fastcnn.errors import CheckError, FastCNNError, UsageError
from fastcnn.runs.failures import RunInterrupted
from fastcnn.system.device import describe_hardware, pick_device

ROOT = Path(__file__).resolve().parents[2]
DIFFERENT = CheckError.exit_code
LOSSES = ("held_out_losses", "train_losses")
TINY = 1e-12  # a loss of 0 has no logarithm
STRICT = " (an error because of --strict)"

Runs = dict[str, dict[int, Found]]
"""Arm -> seed -> what it gave."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train both sides with every seed, write and print; return the exit code."""
    args = _parser().parse_args(argv)
    args.command = typed("fastcnn parity", argv)
    interrupted = "interrupted; the same command goes on from the last run that ended"
    return exit_code("fastcnn parity", lambda: run(args), interrupted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fastcnn parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="photos by class, as for fastcnn train")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="seeds 0 to N-1, 2 or more [%(default)s]")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="[%(default)s]")
    parser.add_argument("--margin", type=float, default=2.0, metavar="POINTS", help="of accuracy [%(default)s]")
    parser.add_argument(
        "--loss-margin", type=float, default=10.0, metavar="PERCENT", help="of seed.py's losses [%(default)s]"
    )
    parser.add_argument("--image-size", type=int, default=128, metavar="N", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="[%(default)s]")
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="[%(default)s]")
    parser.add_argument("--schedule", choices=("onecycle", "constant"), default="onecycle", help="[%(default)s]")
    parser.add_argument(
        "--val-fraction", type=float, default=0.2, metavar="X", help="held out where DATA has no val or test [0.2]"
    )
    parser.add_argument("--ingredients", action="store_true", help="the table of single changes instead")
    parser.add_argument("--threads", type=int, metavar="N", help="arithmetic threads; left out, torch's choice")
    parser.add_argument("--out", type=Path, metavar="DIR", help="left out, bench/results/<machine>")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the options say and return the exit code. Raises FastCNNError for what the user can mend."""
    _check(args)
    contenders: dict[str, Arm] = {PLAIN: arms.plain, **(INGREDIENTS if args.ingredients else {FAST: arms.fast})}
    how = {name: getattr(args, name) for name in (*SHARED, "threads")}
    note = functools.partial(print, flush=True)
    with arms.prepared(args.data, val_fraction=args.val_fraction, note=note, **how) as experiment:
        path = results_file(args, experiment)
        runs, skipped = resumed(path, args, experiment), dict[str, str]()
        for seed, (name, arm) in itertools.product(range(args.seeds), contenders.items()):
            if seed in runs.setdefault(name, {}) or name in skipped:
                continue
            try:
                runs[name][seed] = arm(experiment, seed)
            except FastCNNError as error:
                if name in (PLAIN, FAST) or isinstance(error, RunInterrupted):
                    raise
                skipped[name] = without_paths(str(error)).removesuffix(STRICT)
                note(f"{name}: not measured: {skipped[name]}")
                continue
            note(shown(name, seed, runs[name][seed]))
            record_of(args, experiment, runs, skipped).save(path)
        record = record_of(args, experiment, runs, skipped)
        record.save(path)
    curves.draw(record, path.with_suffix(".png"))
    table = tables.TABLES["ingredients"]
    print(tables.markdown(table.head, table.lines(record)) if args.ingredients else sentence(record))
    print(f"results  {path}\npicture  {path.with_suffix('.png')}")
    return DIFFERENT if record.settings["verdict"] == "different" and not args.ingredients else 0


def _check(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("scipy") is None:
        raise FastCNNError("scipy: not installed. pip install scipy, or scripts/bench.sh, which installs it")
    for name, ok, expected in (
        ("seeds", args.seeds >= 2, "2 or more: one seed says nothing of the spread"),
        ("epochs", args.epochs >= 1, "1 or more"),
        ("margin", 0 < args.margin < 100, "points above 0 and below 100"),
        ("loss_margin", args.loss_margin > 0, "percent above 0"),
        ("image_size", 32 <= args.image_size <= 4096, "32 to 4096"),
        ("batch_size", args.batch_size >= 2, "2 or more"),
        ("lr", args.lr > 0, "a number above 0"),
        ("val_fraction", 0 < args.val_fraction < 1, "a share between 0 and 1"),
        ("threads", args.threads is None or args.threads >= 1, "1 or more"),
    ):
        if not ok:
            raise UsageError(f"--{name.replace('_', '-')}: expected {expected}, got {getattr(args, name)}")


def shown(name: str, seed: int, found: Found) -> str:
    """Return a run's line."""
    losses = f"losses {found['train_losses'][-1]:.4f} training, {found['held_out_losses'][-1]:.4f} held out"
    return f"seed {seed}  {name:10}  accuracy {found['accuracy']:.4f}  {losses}  {found['seconds']:.0f} s"


def results_file(args: argparse.Namespace, experiment: Experiment) -> Path:
    """Return where the results of these options go."""
    folder = args.out or ROOT / "bench" / "results" / slug(describe_hardware(pick_device("auto")))
    name = re.sub(r"[^\w.-]+", "-", experiment.data.name)
    return Path(folder) / f"parity-{name}-{args.image_size}{'-ingredients' if args.ingredients else ''}.json"


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """Return the settings that a run's figures depend on, besides seed and code."""
    return {
        "data": experiment.data.name,
        "num_train": len(experiment.train),
        "num_held_out": len(experiment.held_out),
        "photos": experiment.photos_key,
        **{name: getattr(experiment, name) for name in SHARED},
    }


def resumed(path: Path, args: argparse.Namespace, experiment: Experiment) -> Runs:
    """Return the runs that a results file holds already.

    Runs of both sides are taken from the other table's file too, where it is of the same experiment. Raises
    FastCNNError where the file itself is of another.
    """
    stem, runs = path.stem.removesuffix("-ingredients"), Runs()
    for file in (path.with_name(f"{stem}-ingredients.json"), path.with_name(f"{stem}.json")):
        if not file.exists():
            continue
        try:
            record = read(file)
        except ValueError as error:
            raise FastCNNError(str(error)) from None
        changed = [name for name, value in settings_of(experiment).items() if record.settings.get(name) != value]
        if changed and file == path:
            raise FastCNNError(
                f"{path} holds runs with another {', '.join(changed)}: choose another --out, or delete it to begin anew"
            )
        for row in record.rows if not changed else []:
            if file == path or row["name"] in (PLAIN, FAST):
                found = {int(seed): one for seed, one in row["extra_info"]["runs"].items()}
                runs.setdefault(row["name"], {}).update(found)
    if runs:
        print(f"going on: {sum(map(len, runs.values()))} runs are done already", flush=True)
    return runs


def record_of(args: argparse.Namespace, experiment: Experiment, runs: Runs, skipped: dict[str, str]) -> Record:
    """Return the results file of the runs so far."""
    names = [name for name in (PLAIN, *INGREDIENTS) if runs.get(name)]
    rows = [row_of(args, name, runs, experiment.largest_class) for name in names]
    verdicts = {row["name"]: row["extra_info"].get("verdict", "undecided") for row in rows}
    return own_record(
        rows,
        command=args.command,
        settings={
            **settings_of(experiment),
            "seeds": args.seeds,
            "margin": args.margin,
            "loss_margin": args.loss_margin,
            "verdict": verdicts.get(FAST, "undecided"),
        },
        seconds=sum(found["seconds"] for mine in runs.values() for found in mine.values()),
        skipped=[{"name": name, "reason": reason} for name, reason in skipped.items()],
    )


def row_of(args: argparse.Namespace, name: str, runs: Runs, largest_class: float) -> Row:
    """Return an arm's row: its runs, and over seed.py each measure's comparison and the verdict of all three.

    largest_class: the accuracy (0 to 1) of guessing that one always.
    """
    mine = {seed: found for seed, found in sorted(runs[name].items()) if seed < args.seeds}
    seconds = [found["seconds"] for found in mine.values()]
    accuracies = [found["accuracy"] for found in mine.values()]
    info: dict[str, Any] = {
        "runs": {str(seed): runs[name][seed] for seed in sorted(runs[name])},
        "mean_accuracy": statistics.fmean(accuracies),
        "standard_deviation": statistics.stdev(accuracies) if accuracies[1:] else 0.0,
    }
    pairs = [(found, runs[PLAIN][seed]) for seed, found in mine.items() if seed in runs[PLAIN]]
    margins = {"accuracy": args.margin, **dict.fromkeys(LOSSES, args.loss_margin)}
    if name != PLAIN and len(pairs) > 1:
        info["measures"] = {
            measure: dataclasses.asdict(compare(differences(measure, pairs), margins[measure] / 100))
            for measure in ("accuracy", *LOSSES)
        }
        info["epochs"] = {measure: by_epoch(measure, pairs, args.loss_margin / 100) for measure in LOSSES}
        info["verdict"] = overall([one["verdict"] for one in info["measures"].values()])
        if any(one["verdict"] == "different" for found in info["epochs"].values() for one in found):
            info["verdict"] = "different"
        theirs = statistics.fmean(found["accuracy"] for _, found in pairs)
        if info["verdict"] == "equivalent" and theirs < largest_class + args.margin / 100:
            info["verdict"] = "undecided"  # what has learned nothing cannot be worse at it
        info["wrong_labels"] = max(found.get("wrong_labels", 0) for found in mine.values())
        if info["wrong_labels"]:
            info["verdict"] = "different"
    return row_of_runs("ingredients" if args.ingredients else "parity", name, seconds, info)


def differences(measure: str, pairs: Sequence[tuple[Found, Found]]) -> list[float]:
    """Return each pair's difference in a measure: of accuracies as it is, of losses the mean of the epochs' log ratios.

    So 0.01 is a loss that is 1% higher, and a late epoch's small loss counts as much as the first one's.
    """
    if measure == "accuracy":
        return [ours["accuracy"] - theirs["accuracy"] for ours, theirs in pairs]
    return [statistics.fmean(map(_log_ratio, ours[measure], theirs[measure])) for ours, theirs in pairs]


def by_epoch(measure: str, pairs: Sequence[tuple[Found, Found]], margin: float) -> list[dict[str, Any]]:
    """Return each epoch's comparison of losses, in log ratios. The tests share their 5%, as Bonferroni has it: one in
    twenty sound experiments at the margin may have an epoch beyond it, not one epoch in twenty."""
    ratios = [map(_log_ratio, ours[measure], theirs[measure]) for ours, theirs in pairs]
    by_epoch = list(zip(*ratios, strict=True))
    return [dataclasses.asdict(compare(epoch, margin, ALPHA / len(by_epoch))) for epoch in by_epoch]


def _log_ratio(a: float, b: float) -> float:
    return math.log(max(a, TINY) / max(b, TINY))


def sentence(record: Record) -> str:
    """Return the verdict in a line."""
    theirs, ours = record.rows
    info, settings = ours["extra_info"], record.settings
    measures, verdict = info["measures"], info["verdict"]
    within = "" if verdict != "equivalent" else f" within {settings['margin']:g} points"
    line = (
        f"{verdict}{within}: accuracy {tables.spread(ours)} to {tables.spread(theirs)} of seed.py, "
        f"{tables.points(measures['accuracy'])} points; held-out loss {tables.points(measures['held_out_losses'])}%, "
        f"training loss {tables.points(measures['train_losses'])}%; "
        f"{ours['n']} seeds, {settings['num_held_out']:,} held-out photos"
    )
    if verdict == "different":
        names = [tables.MEASURES[name] for name, one in measures.items() if one["verdict"] == "different"]
        names += [
            f"{tables.MEASURES[name]} of epoch {i} ({100 * one['mean']:+.0f}%)"
            for name, found in info["epochs"].items()
            for i, one in enumerate(found, 1)
            if one["verdict"] == "different" and tables.MEASURES[name] not in names
        ]
        line += f"; beyond the margin: {', '.join(names)}" if names else ""
        line += f"; {info['wrong_labels']:,} photos have another label" if info["wrong_labels"] else ""
    return line + (f"; {would_do(record)}" if verdict == "undecided" else "")


def would_do(record: Record) -> str:
    """Return how many seeds, or photos, would decide. Photos: if all of the spread is that of too few held out."""
    row = record.rows[-1]
    open_ = {name: one for name, one in row["extra_info"]["measures"].items() if one["verdict"] == "undecided"}
    if not open_:
        return "seed.py itself has hardly learned anything: more epochs or photos would do"
    what = " and ".join(tables.MEASURES[name] for name in open_)
    if any(one["needed"] is None for one in open_.values()):
        return f"{what}: more than {MOST:,} seeds would be needed; take a wider margin or more held-out photos"
    seeds = max(one["needed"] for one in open_.values())
    if seeds <= row["n"]:
        return f"{what}: so near the margin that only many more seeds, {4 * row['n']} say, or another margin would do"
    photos = math.ceil(record.settings["num_held_out"] * seeds / row["n"])
    return f"{what}: about {seeds:,} seeds would do, or {photos:,} held-out photos at best"


if __name__ == "__main__":
    sys.exit(main())
