"""Model of a run with N photos on G GPUs: seconds, bottleneck and cost of each stage, from rates and their sources.

    python -m bench.scale            # print the tables
    python -m bench.scale --write    # write them and the picture into docs/scale.md

GPU rates are counted from the network's shapes, published by somebody else, or assumed; the others were measured on two
CPU cores. Read in order: rates, step, run, simulation, tables, picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.report.tables import fill
from bench.scale.picture import draw
from bench.scale.tables import tables

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scale.md"


def main(arguments: list[str]) -> int:
    """Print the tables, or write them into docs/scale.md; return the exit code."""
    if arguments not in ([], ["--write"]):
        print(f"scale: error: expected --write or nothing, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if arguments:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        draw(DOCUMENT.with_suffix(".png"))
    else:
        for name, table in tables().items():
            print(f"{name}\n\n{table}")
    return 0


def filled(text: str) -> str:
    """Return a text with every marked table made anew."""
    made = tables()
    return fill(text, lambda name: f"\n{made[name]}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
