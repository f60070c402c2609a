"""Least time of a step by engine and card: launches, instructions, bytes and matrix products, each by itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.harness.roofline import passes
from bench.kernels.launch_counts import count_launches
from bench.kernels.machine_code import REFERENCE, Code, machine_code, own_launches
from bench.report.tables import markdown


class Card(NamedTuple):
    """Name and bandwidth of a GPU, as copies reach it."""

    name: str
    bytes_per_second: float


CARDS = [Card("H200", 4.3e12), Card("H100", 3.0e12)]
# Both cards', from their maker's data sheet: dense bf16 products on tensor cores, and what issues instructions.
FLOP_PER_SECOND, MULTIPROCESSORS, HERTZ = 788e12, 132, 1.755e9
SCHEDULERS = 4  # of a multiprocessor, each of which issues one warp instruction a cycle
LAUNCH_SECONDS = 2e-6  # between the ends of two small kernels of a replayed graph: assumed


@dataclass(frozen=True)
class Bounds:
    """What a step of an engine takes at least, each by itself."""

    num_launches: int
    instruction_seconds: float
    """Of our own kernels; 0 where there are none."""
    bytes: float
    flops: float

    def seconds(self, card: Card) -> dict[str, float]:
        """Return each bound by its name."""
        return {
            "launches": self.num_launches * LAUNCH_SECONDS,
            "instructions": self.instruction_seconds,
            "bytes": self.bytes / card.bytes_per_second,
            "matrix": self.flops / FLOP_PER_SECOND,
        }


def bounds(engine: str, batch: int) -> Bounds:
    """Return what bounds a step of the reference network at 128 px in bf16."""
    issued = 0.0
    if engine == "hybrid":
        issued = sum(map(issue_seconds, machine_code(own_launches("bf16", batch=batch), 90)))
    moved = passes(REFERENCE, batch=batch)
    number = count_launches(engine, "bf16", batch=batch).total()
    return Bounds(number, issued, sum(one.bytes for one in moved), sum(one.flops for one in moved))


def bounds_table(batches: Sequence[int]) -> str:
    """Return a table of engines, batches and cards, with a column for what a GPU measures."""
    head = ["engine", "batch", "launches", "instructions", "bytes", "matrix"]
    head += [f"{card.name} {what}" for card in CARDS for what in ("at least", "at most")] + ["measured"]
    lines = []
    for engine, batch in itertools.product(("eager", "compiled", "hybrid"), batches):
        found = bounds(engine, batch)
        here = found.seconds(CARDS[0])
        shown = [f"{here[name] * 1e6:,.0f} us" if here[name] else "-" for name in ("instructions", "bytes", "matrix")]
        cells = [f"{found.num_launches}", *shown]
        for card in CARDS:
            most = max(found.seconds(card).values())
            cells += [f"{most * 1e6:,.0f} us", f"{batch / most:,.0f} images/s"]
        lines.append([f"{engine}+graphed" if engine != "eager" else "graphed", f"{batch:,}", *cells, "not measured"])
    return markdown(head, lines)


def issue_seconds(code: Code) -> float:
    """Return the seconds that a GPU takes to issue all instructions of a launch, if it never waits."""
    waves = -(-code.programs // MULTIPROCESSORS)
    return waves * max(1.0, code.warps / SCHEDULERS) * code.instructions / HERTZ
