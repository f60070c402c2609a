"""Proof on a borrowed GPU, in three phases that end by themselves: does it run (5 minutes), why (6), is it true (8).

    python -m bench.gpu_proof OUT --phase 1            # scripts/gpu_proof.sh finds Python and what was carried
    python -m bench.gpu_proof OUT --phase 3 --small    # shows on a CPU that all of it runs, in two minutes

A figure is a line of OUT/lines.jsonl, written as it is measured; the same command again measures what is not there yet.
Each step is a process of its own with a time limit: one that fails, hangs or loses the GPU is noted, and the next one
runs. OUT.tar.gz has everything but photos and caches. Exit code: 0, or 1 where something failed, or 75 where all that
is missing did not fit into the time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.proof.lines import AGAIN, NO_TIME, OUT_OF_TIME, Line, Proof, is_late

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "pydantic": "pydantic", "yaml": "pyyaml"}
"""Without these nothing can be shown; what needs others, or a tool, is left out and named."""
MARK = "FASTCNN_PROOF_STEP"
PACKING_SECONDS = 8.0
MOST_BYTES = 15_000_000
# Ten less than promised, for unpacking what was carried.
SECONDS = {1: 290.0, 2: 350.0, 3: 470.0}
SMALL_SECONDS = 1800.0  # of a phase, whose parts have no limits: it takes two minutes, but on a busy CPU


class Step(NamedTuple):
    """Named part of a phase: a function of this project in a process of its own."""

    name: str
    limit: float
    """Seconds after which it is ended, but for the small form."""
    function: str
    """module:name of what takes the Proof."""


RUNS, WHY, TRUTH = "bench.proof.machine_and_steps", "bench.proof.causes", "bench.proof.truth"
PHASES: dict[int, list[Step]] = {
    1: [
        Step("versions", 40, f"{RUNS}:versions_here"),
        Step("rates", 40, f"{RUNS}:rates_here"),
        Step("cuda tests", 120, f"{RUNS}:cuda_tests"),
        Step("step table", 130, f"{RUNS}:step_table"),
        Step("cuda tests of the kernels", 110, f"{RUNS}:kernel_tests"),
    ],
    2: [
        Step("kernels by engine", 110, f"{WHY}:kernel_tables"),
        Step("ncu", 100, f"{WHY}:counters"),
        Step("compute-sanitizer", 120, f"{WHY}:sanitizers"),
        Step("ideas", 150, "bench.proof.ideas:ideas"),
        Step("rivals", 150, f"{WHY}:rivals"),
    ],
    3: [
        Step("photos", 150, f"{TRUTH}:make_photos"),
        Step("whole runs", 240, f"{TRUTH}:whole_runs"),
        Step("deterministic", 60, f"{TRUTH}:deterministic"),
        Step("resumed within an epoch", 60, f"{TRUTH}:resumed"),
        Step("JPEG", 90, f"{TRUTH}:jpegs"),
        Step("parity", 150, f"{TRUTH}:parity"),
        Step("memory that runs out", 90, f"{TRUTH}:memory"),
        Step("group of one", 60, f"{TRUTH}:group_of_one"),
    ],
}
"""Phase -> its steps in turn. What may take the GPU with it comes last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a phase, or a step of it in this process; return the exit code."""
    parser = argparse.ArgumentParser("gpu_proof", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the lines; OUT.tar.gz is what to copy")
    parser.add_argument("--phase", type=int, choices=list(PHASES), required=True)
    parser.add_argument("--small", action="store_true", help="only to show that all of it runs, on a CPU too")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        module, _, name = args.step.partition(":")
        proof = Proof.of_this_process()
        getattr(importlib.import_module(module), name)(proof)
        return proof.exit_code()
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        advice = "where there is a network, scripts/gpu_pack.sh gathers what this machine lacks, torch aside"
        print(f"gpu_proof: error: {', '.join(missing)}: not installed; {advice}", file=sys.stderr)
        return 1
    session = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    seconds = SMALL_SECONDS if args.small else SECONDS[args.phase]
    out = args.out.resolve()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that steps are ended, too
    return run_phase(Proof(out, args.phase, args.small, session, time.time() + seconds), PHASES[args.phase])


def run_phase(proof: Proof, steps: Sequence[Step]) -> int:
    """Run the steps that have not succeeded yet, pack everything and print a summary; return the exit code."""
    proof.out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, str] = {}
    try:
        for step in steps:
            outcomes[step.name] = outcome_of(proof, step)
    except BaseException:
        print(f"\nended early; packed {pack(proof.out)[0]}", file=sys.stderr)
        raise
    text, code = summary(proof, outcomes)
    (proof.out / f"summary-{proof.phase}.txt").write_text("\n".join([*text, ""]), encoding="utf-8")
    (proof.out / "figures.md").write_text(figures_table(proof), encoding="utf-8")
    packed, left_out = pack(proof.out)
    size = packed.stat().st_size
    print("\n".join(["", *text, f"lines    {proof.path}", f"packed   {packed} ({size / 1e6:.2f} MB)"]))
    if left_out:
        print(f"left out of it: {', '.join(left_out)}")
    return 1 if size > MOST_BYTES else code


def outcome_of(proof: Proof, step: Step) -> str:
    """Run a step unless it has succeeded before, and return what came of it, in a word or two."""
    figure, start = f"part: {step.name}", time.monotonic()
    if proof.measured(figure):
        return "done before"
    left = proof.seconds_left() - PACKING_SECONDS
    code = run_step(proof, step, left if proof.small else min(step.limit, left)) if left > 5 else OUT_OF_TIME
    outcome = {0: "measured", OUT_OF_TIME: "skipped"}.get(code, "failed")
    why = {} if code == 0 else {"reason": NO_TIME if code == OUT_OF_TIME else f"exit code {code}"}
    proof.write(figure, outcome, seconds=round(time.monotonic() - start, 1), **why)
    said = "out of time" if code == OUT_OF_TIME else outcome
    print(f"phase {proof.phase}: {step.name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    return said


def run_step(proof: Proof, step: Step, limit: float) -> int:
    """Run a step in processes of its own, a new one for what a lost one has left; return the last exit code.

    A process that ends without an answer is begun anew as long as each one gets further than the one before.
    """
    deadline, size = time.time() + limit, -1
    while True:
        code = _run(proof, step, deadline)
        before, size = size, _num_ended(proof)
        timed_out = time.time() >= deadline - 0.5
        if timed_out or not (code == AGAIN or code < 0) or size == before:
            break
    if timed_out and code < 0:
        for line in {line["figure"]: line for line in proof.own_lines() if line["step"] == step.name}.values():
            if line["outcome"] == "started":  # what hangs, rather than being late, has a limit of its own
                dataclasses.replace(proof, step=step.name).write(line["figure"], "skipped", reason=NO_TIME)
        return OUT_OF_TIME
    return code


def _num_ended(proof: Proof) -> int:
    return sum(line["outcome"] in ("measured", "failed", "started") for line in proof.lines())


def _run(proof: Proof, step: Step, deadline: float) -> int:
    mark = f"{proof.session}/{step.name}"
    command = [sys.executable, "-m", "bench.gpu_proof", str(proof.out), "--phase", str(proof.phase)]
    command += [*(["--small"] if proof.small else []), "--step", step.function]
    environment = {**os.environ, **proof.environment(deadline=deadline - 2, step=step.name), MARK: mark}
    environment |= {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(proof.work / "cache"), "WANDB_MODE": "disabled"}
    log = proof.out / "logs" / f"{proof.phase}-{step.name.replace(' ', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            end_all(mark)
            process.wait()


def end_all(mark: str) -> None:
    """End every process that a step started, those in sessions of their own too (torchrun's ranks, say)."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(3):  # one may be starting another
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)


def pack(out: Path) -> tuple[Path, list[str]]:
    """Write OUT.tar.gz below 15 MB, the lines first, small files before large ones; return it and what is left out."""
    target = out.with_name(f"{out.name}.tar.gz")
    found = (path for path in out.rglob("*") if path.is_file())
    files = [path for path in found if path.relative_to(out).parts[0] not in ("work", "site")]
    files.sort(key=lambda path: (path.name != "lines.jsonl", path.stat().st_size))
    left_out, total = list[str](), 0
    with tarfile.open(target.with_name(f".{target.name}"), "w:gz") as tar:
        for path in files:
            total += path.stat().st_size
            # By the sizes before compression, which makes them less: what is packed is text and a few pictures.
            if total > MOST_BYTES * (4 if path.suffix in (".jsonl", ".txt", ".csv") else 1):
                left_out.append(path.relative_to(out).as_posix())
            else:
                tar.add(path, Path(out.name) / path.relative_to(out))
    shutil.move(target.with_name(f".{target.name}"), target)
    return target, left_out


def summary(proof: Proof, outcomes: dict[str, str]) -> tuple[list[str], int]:
    """Return lines on what was measured, what failed and what is missing, and the exit code of the phase."""
    figures = {line["figure"]: line for line in proof.own_lines() if line["phase"] == proof.phase}
    found = [line for name, line in figures.items() if not name.startswith("part: ")]
    failed = [line for line in found if line["outcome"] in ("failed", "started")]
    late = [line for line in found if is_late(line)]
    absent = [line for line in found if line["outcome"] == "skipped" and line not in late]
    count = sum(line["outcome"] == "measured" for line in found)
    text = [f"phase {proof.phase} on {proof.card}: {len(found)} figures, {count} measured, {len(failed)} failed"]
    for title, lines in (("failed", failed), (NO_TIME, late), ("not here", absent)):
        text += [f"  {title}: {line['figure']}  {'' if line in late else reason(line)}".rstrip() for line in lines[:20]]
        text += [f"  {title}: {len(lines) - 20} more"] if lines[20:] else []
    text += [f"  step {name}: {outcome}" for name, outcome in outcomes.items()]
    if failed or "failed" in outcomes.values():
        return text, 1
    return text, OUT_OF_TIME if late or "out of time" in outcomes.values() else 0


def reason(line: Line) -> str:
    """Return the last line of why a figure is not there."""
    lines = str(line.get("reason", "")).strip().splitlines()
    return lines[-1][:160] if lines else "ended in the midst"


def figures_table(proof: Proof) -> str:
    """Return all figures, those of tests aside, as a table in Markdown."""
    lines = {line["figure"]: line for line in proof.own_lines() if line.get("values")}
    rows = [f"| {name} | {json.dumps(line['values'], default=str)[:400]} |" for name, line in lines.items()]
    return "\n".join([f"# {proof.card}", "", "| figure | values |", "| --- | --- |", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
