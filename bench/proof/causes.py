"""Phase 2, why: kernels of each engine by the profiler, hardware counters, races, rivals. `ideas` has the ideas.

python -m bench.proof.causes ENGINE BATCH STEPS     # plain steps for a tool that watches them: ncu, compute-sanitizer
"""

from __future__ import annotations

import csv
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch

from bench.baselines import loops
from bench.harness.step_setup import run_steps
from bench.harness.timing import repeated
from bench.proof.ideas import batches
from bench.proof.lines import Line, NotHere, Proof
from bench.proof.machine_and_steps import (
    DEVICE,
    ON_GPU,
    REFERENCE,
    ROOT,
    SMALL,
    TABLE,
    built,
    slices,
    step_of,
    step_rate,
)
from fastcnn.system.device import synchronize
from fastcnn.system.switches import torch_settings
from fastcnn.training import engines

TOOLS_VARIABLE = "FASTCNN_PROOF_TOOLS"
"""Folder of tools that stand in for ncu and compute-sanitizer, for tests: they are taken without a GPU, too."""
WATCHED = "hybrid" if ON_GPU else "eager"
"""Engine that the tools watch."""
NUM_STEPS = 16  # that are profiled
COUNTERS = {
    "gpu__time_duration.sum": "seconds",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "launch__registers_per_thread": "registers",
}


def kernel_tables(proof: Proof) -> None:
    """Write the kernels of each engine: a CSV file each."""
    from bench.suites.bench_step import ENGINES

    for engine in (name for name in (*TABLE, "hybrid") if name in ENGINES):
        for batch in batches(proof):
            path = proof.out / f"kernels-{re.sub('[^a-z0-9]+', '-', engine)}-{batch}.csv"
            work = functools.partial(kernel_table, engine, batch, path, small=proof.small)
            proof.measure(f"kernels: {engine}, batch {batch}", work, least=25.0 if "compiled" in engine else 5.0)


def kernel_table(name: str, batch: int, path: Path, *, small: bool) -> Line:
    """Return launches and time of a step, and write a row a kernel (on a CPU an operator): name, launches, time."""
    with torch_settings(DEVICE, threads=None, deterministic=False):
        step, engine, _ = built(name, batch, small=small)
        run_steps(step, engine, NUM_STEPS)
        synchronize(DEVICE)
        activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if ON_GPU else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.profiler.profile(activities=activities) as trace:
                run_steps(step, engine, NUM_STEPS)
                synchronize(DEVICE)
            events = trace.events() or []
    kind = "CUDA" if ON_GPU else "CPU"
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if str(event.device_type).endswith(kind) and (ON_GPU or event.name.startswith("aten::")):
            times[event.name].append(event.time_range.end - event.time_range.start)
    rows = sorted(times.items(), key=lambda row: -sum(row[1]))
    total = sum(map(sum, times.values())) or 1.0
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["kernel", "launches a step", "us a step", "share"])
        for kernel, found in rows:
            share = f"{sum(found) / total:.4f}"
            table.writerow([kernel, len(found) / NUM_STEPS, f"{sum(found) / NUM_STEPS:.2f}", share])
    return {
        "launches_a_step": sum(map(len, times.values())) / NUM_STEPS,
        "us_a_step": total / NUM_STEPS,
        "most": [kernel for kernel, _ in rows if not kernel.startswith(("Mem", "mem"))][:6],
        "table": path.name,
    }


def counters(proof: Proof) -> None:
    """Write hardware counters of the six kernels that take longest: issue, occupancy, bytes, registers."""
    proof.measure("ncu", lambda: _counters(proof), limit=100.0, least=20.0)


def _counters(proof: Proof) -> Line:
    tool = _tool("ncu")
    table = proof.values(f"kernels: {WATCHED}, batch {batches(proof)[-1]}")
    if not table:
        raise NotHere("the kernel table is not there")
    # ncu's names are functions' own: without return type, namespaces and template arguments.
    names = {re.split(r"[<(]", name.removeprefix("void "))[0].rpartition("::")[2] for name in table["most"]}
    command = [tool, "--csv", "--clock-control", "none", "--metrics", ",".join(COUNTERS)]
    command += ["--kernel-name", f"regex:^({'|'.join(map(re.escape, names))})$", "--launch-skip", "30"]
    command += ["--launch-count", "60", sys.executable, "-m", "bench.proof.causes"]
    command += [WATCHED, str(batches(proof)[-1]), "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (proof.out / "ncu.csv").write_text(done.stdout, encoding="utf-8")
    lines = done.stdout.splitlines()
    head = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise RuntimeError(f"ncu gave no table: {(done.stdout + done.stderr)[-500:]}")
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in csv.DictReader(lines[head:]):
        if counter := COUNTERS.get(row["Metric Name"]):
            found[row["Kernel Name"]][counter] = f"{row['Metric Value']} {row['Metric Unit']}"  # of its last launch
    return {"kernels": found}


def sanitizers(proof: Proof) -> None:
    """Write what compute-sanitizer says of races and addresses in a small step by our own kernels."""
    for tool in ("racecheck", "memcheck"):
        proof.measure(f"compute-sanitizer {tool}", functools.partial(_sanitized, proof, tool), limit=90.0, least=20.0)


def _sanitized(proof: Proof, tool: str) -> Line:
    plain = [sys.executable, "-m", "bench.proof.causes", WATCHED, "4", "1"]
    command = [_tool("compute-sanitizer"), "--tool", tool, "--target-processes", "application-only"]
    # Compiled beforehand and in one process: a compiler's own processes need no watching.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    subprocess.run(plain, cwd=ROOT, check=True, env=environment)
    command += ["--error-exitcode", "9", *plain]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    (proof.out / f"{tool}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    said = [line for line in done.stdout.splitlines() if "SUMMARY" in line] or [""]
    if done.returncode:
        last = (done.stdout + done.stderr).splitlines() or [""]
        raise RuntimeError(f"exit code {done.returncode}: {said[-1] or last[-1]}")
    return {"summary": said[-1]}


def _tool(name: str) -> str:
    """Return where a tool is. Raises NotHere where it is not installed, or would find no GPU."""
    if stand_in := os.environ.get(TOOLS_VARIABLE):
        return str(Path(stand_in) / name)
    found = shutil.which(name) or next((str(path) for path in Path("/usr/local/cuda/bin").glob(name)), None)
    if not found:
        raise NotHere(f"{name} is not installed")
    if not ON_GPU:
        raise NotHere("needs an NVIDIA GPU")
    return found


def rivals(proof: Proof) -> None:
    """Write the plain loops at two shapes, TF32 by that name, torch's max-autotune among them. Ours beside them."""
    from bench.suites.bench_step import ENGINES

    kinds = [("plain", "fp32"), ("plain", "tf32"), ("plain", "bf16")]
    kinds += [("max-autotune", "bf16"), ("max-autotune", "tf32")]
    for batch in (8, 16) if proof.small else (32, 2048):
        for name in ("hybrid+graphed", "graphed") if ON_GPU else ("eager",):
            if name in ENGINES:
                work = functools.partial(step_rate, name, "bf16" if ON_GPU else "fp32", batch, small=proof.small)
                proof.measure(f"rivals: ours, {name}, bf16, batch {batch}", work, limit=90.0, least=8.0)
        for loop, precision in kinds if ON_GPU else kinds[:1]:
            work = functools.partial(_rival, loop, precision, batch, *(SMALL if proof.small else REFERENCE))
            least = 30.0 if loop == "max-autotune" else 5.0
            proof.measure(f"rivals: {loop}, {precision}, batch {batch}", work, limit=120.0, least=least)


def _rival(loop: str, precision: str, batch: int, size: int, filters: tuple[int, ...]) -> Line:
    torch._dynamo.reset()
    step = loops.random_steps(loop, max(512, 4 * batch), size, filters, batch, precision)
    found = slices(repeated(step), batch)
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return {**found, "tf32": {"convolutions": flags[0], "matrices": flags[1]}}


def main(engine: str, batch: str, num_steps: str) -> None:
    """Run steps of an engine on the reference network."""
    step = step_of(int(batch), small=int(batch) < 32)
    run_steps(step, engines.ENGINES[engine](step), int(num_steps))
    synchronize(DEVICE)


if __name__ == "__main__":
    main(*sys.argv[1:])
