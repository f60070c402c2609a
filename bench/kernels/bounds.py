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
    """Rates of a GPU, from its maker's data sheet; bandwidths as copies reach them."""

    name: str
    bytes_per_second: float
    flop_per_second: dict[str, float]
    """Dense products by precision: on tensor cores in 16 bits, without them in fp32."""
    multiprocessors: int = 132
    hertz: float = 1.755e9


SCHEDULERS = 4  # of a multiprocessor, each of which issues one warp instruction a cycle
LAUNCH_SECONDS = 2e-6  # between the ends of two small kernels of a replayed graph: assumed
RATES = {"bf16": 788e12, "fp16": 788e12, "fp32": 59e12}
CARDS = [Card("H200", 4.3e12, RATES), Card("H100", 3.0e12, RATES)]


@dataclass(frozen=True)
class Bounds:
    """What a step of an engine takes at least, each by itself."""

    engine: str
    batch: int
    num_launches: int
    instruction_seconds: float
    """Of our own kernels; 0 where there are none."""
    bytes: float
    flops: float

    def seconds(self, card: Card, precision: str) -> dict[str, float]:
        """Return each bound by its name."""
        return {
            "launches": self.num_launches * LAUNCH_SECONDS,
            "instructions": self.instruction_seconds,
            "bytes": self.bytes / card.bytes_per_second,
            "matrix": self.flops / card.flop_per_second[precision],
        }


def bounds(engine: str, batch: int, precision: str = "bf16") -> Bounds:
    """Return what bounds a step of the reference network at 128 px."""
    issued = 0.0
    if engine == "hybrid":
        issued = sum(issue_seconds(code, CARDS[0]) for code in machine_code(own_launches(precision, batch=batch), 90))
    moved = passes(REFERENCE, batch=batch, element_bytes=4 if precision == "fp32" else 2)
    number = count_launches(engine, precision, batch=batch).total()
    return Bounds(engine, batch, number, issued, sum(one.bytes for one in moved), sum(one.flops for one in moved))


def bounds_table(batches: Sequence[int], precision: str = "bf16") -> str:
    """Return a table of engines, batches and cards, with a column for what a GPU measures."""
    head = ["engine", "batch", "launches", "instructions", "bytes", "matrix"]
    head += [f"{card.name} {what}" for card in CARDS for what in ("at least", "at most")] + ["measured"]
    lines = []
    for engine, batch in itertools.product(("eager", "compiled", "hybrid"), batches):
        found = bounds(engine, batch, precision)
        here = found.seconds(CARDS[0], precision)
        cells = [
            f"{found.num_launches}",
            *(f"{here[name] * 1e6:,.0f} us" for name in ("instructions", "bytes", "matrix")),
        ]
        cells[1] = cells[1] if found.instruction_seconds else "-"
        for card in CARDS:
            most = max(found.seconds(card, precision).values())
            cells += [f"{most * 1e6:,.0f} us", f"{batch / most:,.0f} images/s"]
        lines.append([f"{engine}+graphed" if engine != "eager" else "graphed", f"{batch:,}", *cells, "not measured"])
    return markdown(head, lines)


def issue_seconds(code: Code, card: Card) -> float:
    """Return the seconds that a GPU takes to issue all instructions of a launch, if it never waits."""
    waves = -(-code.programs // card.multiprocessors)
    return waves * max(1.0, code.warps / SCHEDULERS) * code.instructions / card.hertz
