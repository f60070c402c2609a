"""Runs of contenders as commands, watched from outside: accuracy over wall and processor time, a JSON line a run."""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.accuracy.contenders import Contender
from bench.accuracy.experiment import Experiment, Run, write_held_out
from bench.harness import json_lines
from bench.harness.whole_runs import ROOT, fastest_settings
from bench.report.record import without_paths
from fastcnn.config import Config
from fastcnn.data.split import draw_split
from fastcnn.errors import FastCNNError

EPOCH_LINES = ("epoch ", '{"epoch"')  # how the line that ends an epoch begins: fastcnn's, and a baseline's
SETTLING_EPOCHS = 1  # of a run that only fills the caches, where the command goes on with a warm one


class CommandFailed(FastCNNError):
    """A contender's command ended with an error; the message is its last line."""


@dataclass(kw_only=True)
class Measured:
    """Runs so far, and what there is none of."""

    runs: list[Run]
    skipped: list[dict[str, str]] = field(default_factory=list)
    """name and reason."""
    failed: list[str] = field(default_factory=list)


def measure(
    experiment: Experiment,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    path: Path,
    *,
    seconds: float = float("inf"),
    note: Callable[[str], None] = print,
) -> Measured:
    """Train every contender with every seed, in turn, cold and warm, but for what the file holds; return all runs.

    path: the file, which gets a line as each run ends.
    seconds: what begins later is left out.
    """
    start, key = time.perf_counter(), experiment.key
    measured = Measured(runs=[run for run in json_lines.read(path) if key.items() <= run.items()])
    if measured.runs:
        note(f"going on: {path} holds {len(measured.runs)} runs; delete it to begin anew")
    present = []
    for contender in contenders:
        if contender.missing:
            measured.skipped.append({"name": contender.name, "reason": contender.missing})
            note(f"{contender.name}: left out: {contender.missing}")
        else:
            present.append(contender)
    for seed in seeds:
        for contender in present:
            if contender.label in measured.failed:
                continue
            if time.perf_counter() - start > seconds:
                measured.skipped.append({"name": f"{contender.label}, seed {seed}", "reason": "out of time"})
                continue
            try:
                for run in _cold_and_warm(experiment, contender, seed, measured.runs):
                    measured.runs.append(run)
                    json_lines.append(path, run)
                    note(
                        f"seed {seed}  {contender.label:16} {run['cache']:4}  accuracy {run['accuracy']:.4f}  "
                        f"{run['seconds']:.1f} s, {run['processor_seconds']:.1f} processor-seconds"
                    )
            except CommandFailed as error:
                measured.failed.append(contender.label)
                note(f"{contender.label}: failed: {error}")
    return measured


def _cold_and_warm(experiment: Experiment, contender: Contender, seed: int, done: Sequence[Run]) -> Iterator[Run]:
    """Yield the runs of a contender and a seed that are not done: with nothing in its caches, and once more.

    A script that compiles nothing keeps nothing, and runs once.
    """
    mine = [run for run in done if run["contender"] == contender.label]
    caches = {run["cache"] for run in mine if run["seed"] == seed}
    with tempfile.TemporaryDirectory(prefix="fastcnn-accuracy-") as folder:
        split = Path(folder) / "split.csv"
        splits = draw_split(experiment.index, Config().val_fraction, seed)
        held_out = write_held_out(split, experiment.index, splits)
        counts = {"num_train": len(splits) - held_out, "num_held_out": held_out}

        def run(cache: str) -> Run:
            run_dir = Path(folder) / cache
            words = experiment.command(contender, split, seed, run_dir) + settings
            words += [f"--epochs={SETTLING_EPOCHS}"] if cache == "settling" else []
            homes = {"XDG_CACHE_HOME": "photos", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
            caches = {name: str(Path(folder) / "cache" / home) for name, home in homes.items()}
            found = watched(words, experiment.environment(contender) | caches, run_dir if contender.is_recipe else None)
            named = {"contender": contender.label, "seed": seed, "cache": cache, "settings": settings}
            return {**experiment.key, **named, **counts, **found}

        settings = mine[0]["settings"] if mine else _fastest(experiment, contender, split)
        if "cold" not in caches:
            yield run("cold")
        if "warm" in caches or not _keeps_something(contender, settings):
            return
        if "cold" in caches:  # by an earlier command, whose caches are gone
            run("settling")
        yield run("warm")


def _keeps_something(contender: Contender, settings: Sequence[str]) -> bool:
    return contender.is_recipe or "--compile=on" in [*settings, *(f"--{option}" for option in contender.options)]


def _fastest(experiment: Experiment, contender: Contender, split: Path) -> list[str]:
    if contender.is_recipe:
        return []
    words = experiment.command(contender, split, 0, split.parent)
    try:
        environment = experiment.environment(contender)
        return fastest_settings(contender.script, words, environment, compiling=experiment.try_compile)
    except AssertionError as error:
        raise CommandFailed(_last_line(str(error))) from None


def watched(words: Sequence[str], environment: dict[str, str], run_dir: Path | None) -> Run:
    """Run a command and return seconds, accuracies and epochs, as in `Run`. Raises CommandFailed.

    environment: its variables.
    run_dir: of fastcnn's; None for a script that prints its figures as JSON.
    """
    marks, line, start, before = [], "", time.perf_counter(), _seconds_of_children()
    how: dict[str, Any] = {"text": True, "errors": "replace", "cwd": ROOT, "env": environment}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, **how) as process,
    ):
        assert process.stdout
        try:
            for line in process.stdout:
                if line.startswith(EPOCH_LINES):
                    marks.append((time.perf_counter() - start, processor_seconds(process.pid)))
            code = process.wait()
        finally:
            process.terminate()  # where this one is interrupted
        whole = {"seconds": time.perf_counter() - start, "processor_seconds": _seconds_of_children() - before}
        if code:
            errors.seek(0)
            raise CommandFailed(_last_line(errors.read()) or f"exit code {code}")
    figures = _of_fastcnn(run_dir) if run_dir else _of_script(line)
    accuracies = figures.pop("accuracies")
    epochs = [
        {"seconds": wall, "processor_seconds": processor, "accuracy": accuracy}
        for (wall, processor), accuracy in zip(marks, accuracies, strict=True)
    ]
    return {**whole, **figures, "accuracy": accuracies[-1], "epochs": epochs}


def _of_fastcnn(run_dir: Path) -> Run:
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        accuracies = [float(row["val/accuracy"]) for row in csv.DictReader(file)]
    how = {name: result[name] for name in ("engine", "precision", "decoder")}
    return {"accuracies": accuracies, "train_seconds": result["seconds"]["train"], **how}


def _of_script(last_line: str) -> Run:
    epochs = json.loads(last_line)["epochs"]
    return {
        "accuracies": [row["val_accuracy"] for row in epochs],
        "train_seconds": sum(row["train_seconds"] for row in epochs),
    }


def _seconds_of_children() -> float:
    """Return the processor time of all processes that were waited for, and of those that they waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def processor_seconds(pid: int) -> float | None:
    """Return the processor time of a process and of all that descend from it so far; None where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    parents, ticks = dict[int, int](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        ticks[process] = sum(map(int, fields[11:15]))  # its own, and of children that it has waited for
    mine, more = {pid}, {pid}
    while more:
        more = {process for process, parent in parents.items() if parent in more}
        mine |= more
    return sum(ticks.get(process, 0) for process in mine) / os.sysconf("SC_CLK_TCK")


def _last_line(text: str) -> str:
    return without_paths((text.strip().splitlines() or [""])[-1])
