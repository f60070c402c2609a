"""GPU kernels without a GPU: machine code, issued instructions, launches, and the least time of a step by engine.

    python -m bench.kernels [--types bf16 fp16 fp32] [--architectures 80 90] [--filters 32,32,32,32,32]
    python -m bench.kernels --bounds [--write]

The first compiles every launch of a step's own kernels through Triton's specialisation, for a pretended GPU, and
prints registers, spilled bytes, shared memory and the warp instructions that a launch issues: those of each loop times
its rounds, and all others once. It fails where a kernel spills.

The second prints, for each engine and batch, what bounds a step of the reference network: launches at 2 us each, the
instructions of our kernels if every scheduler issued one a cycle, bytes over the bandwidth and FLOPs over the matrix
rate. `--write` puts the table into docs/engines.md. Launches are counted by running the step on a CPU, for small
images: each of our own; outside of compiled parts each ATen operator that is neither a view nor an allocation, as one,
which is the least; in compiled parts the kernels and library calls in the code that inductor makes for an H100. Library
convolutions are assumed: bytes and matrix rate alone. Figures may be too low by a few; phase 2
of the GPU proof counts on a real GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.kernels.bounds import bounds_table
from bench.kernels.machine_code import REFERENCE, machine_code, own_launches
from bench.report.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ["bf16", "fp16", "fp32"]
BATCHES = (32, 256, 2048)
MARKS = "<!-- bounds -->", "<!-- end of bounds -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; return 1 where a kernel spills registers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--filters", type=lambda text: tuple(map(int, text.split(","))), default=REFERENCE)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--bounds", action="store_true", help="what bounds a step instead, by engine and batch")
    parser.add_argument("--write", action="store_true", help="with --bounds: into docs/engines.md")
    options = parser.parse_args(arguments)
    if options.bounds:
        text = bounds_table(options.batches)
        print(text, end="")
        if options.write:
            page = ROOT / "docs" / "engines.md"
            before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
            page.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
        return 0
    head = ["kernel", "sm", "type", "grid", "warps", "registers", "spilled bytes", "shared bytes", "instructions"]
    print(markdown(head, []), end="")
    found = []
    for precision, architecture, batch in itertools.product(options.types, options.architectures, options.batches):
        for code in machine_code(own_launches(precision, options.filters, batch), architecture):
            found.append(code)
            cells = code.kernel, architecture, precision, code.grid, code.warps, code.registers, code.spilled_bytes
            print(f"| {' | '.join(map(str, (*cells, code.shared_bytes, code.instructions)))} |", flush=True)
    num_spilling = sum(code.spilled_bytes > 0 for code in found)
    print(f"{len(found)} launches, {num_spilling} of which spill registers")
    return int(num_spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
