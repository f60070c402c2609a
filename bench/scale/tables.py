"""Tables of docs/scale.md, made from the model."""

from __future__ import annotations

import math
import re
from typing import Any

from bench.report.record import read
from bench.report.tables import markdown
from bench.scale.rates import PHOTO_BYTES, PUBLISHED, Values, rate_table, rate_values
from bench.scale.run import ALL_BUILT, AS_BUILT, Plan, Run, duration, run, run_of
from bench.scale.simulation import simulate
from bench.scale.step import FILTERS, Step, step

PHOTOS = [10**power for power in range(3, 10)]
GPUS = [1, 8, 64, 1000]
CELLS = [(10**4, 1), (10**6, 8), (10**7, 8), (10**8, 64), (10**9, 1000)]  # what the smaller tables are about
STAGES = ("start", "list", "decode", "load", "train", "evaluate")
# What a cell tells of a run.
SUMMARY, SHORT, EPOCH = "{0.time}, {0.cost}: {0.bottleneck}", "{0.time}, {0.bottleneck}", "{0.epoch}"

Rows = list[dict[str, str]]
"""Cells of each row of a table, by their heads."""


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _bytes(count: float) -> str:
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _number(value: float) -> str:
    text = f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.2g}" if value < 1 else f"{value:.3g}"
    return re.sub(r"e\+?(-?)0?", r"e\1", text)


def tables() -> dict[str, str]:
    """Return every table of the page as Markdown, by its name."""
    return {name: markdown(list(rows[0]), [list(row.values()) for row in rows]) for name, rows in _rows().items()}


def _rows() -> dict[str, Rows]:
    rates, threads = rate_values(), rate_values(threads=True)
    month = (rates["jpeg"] + PHOTO_BYTES) / 1e9 * rates["keep"]  # USD a photo
    return {
        "sizes": [
            {
                "photos": f"{photos:,}",
                "JPEGs": _bytes(photos * rates["jpeg"]),
                "cache": _bytes(photos * PHOTO_BYTES),
                "index in memory, each rank": _bytes(photos * rates["index"]),
                "JPEGs and cache kept for a month": f"${photos * month:,.2f}",
            }
            for photos in PHOTOS
        ],
        "map": _grid(SUMMARY, rates),
        "built": _grid(SUMMARY, threads, ALL_BUILT),
        "epochs": _grid(EPOCH, rates),
        "runs": [
            {
                "photos": f"{photos:.0e}".replace("e+0", "e"),
                "GPUs": f"{gpus:,}",
                "batch": f"{one.batch:,}",
                "pixels": one.memory,
                **{stage: duration(one.stage(stage)) for stage in STAGES},
                "all": one.time,
                "again": duration(one.seconds - one.stage("decode") + one.check),
                "images/s": f"{one.images_per_second:,.0f}",
                "efficiency": f"{run(photos, 1, rates).seconds / gpus / one.seconds:.2g}",
                "cost": one.cost,
            }
            for photos in PHOTOS
            for gpus in GPUS
            if isinstance(one := run_of(photos, gpus, rates), Run)
        ],
        "step": [_step_row(batch, rates) for batch in (4, 32, 256, 2048)],
        "changes": _changes(rates, threads),
        "sensitivity": _sensitivity(rates),
        "simulated": _simulated(rates),
        "measured": _measured(rates),
        "rates": [
            {
                "rate": name,
                **{column: _number(getattr(rate, column)) for column in ("value", "low", "high")},
                "unit": rate.unit,
                "": rate.kind,
                "source": rate.source,
            }
            for name, rate in rate_table().items()
        ],
    }


def _tell(found: Run | Step | str, form: str) -> str:
    return found if isinstance(found, str) else form.format(found)


def _grid(form: str, rates: Values, plan: Plan = AS_BUILT) -> Rows:
    """Return a table over photos and GPUs."""
    heads = {gpus: f"{gpus:,} GPU{'s' * (gpus > 1)}" for gpus in GPUS}
    return [
        {"photos": f"{photos:,}"}
        | {head: _tell(run_of(photos, gpus, rates, plan), form) for gpus, head in heads.items()}
        for photos in PHOTOS
    ]


def _step_row(batch: int, rates: Values) -> dict[str, str]:
    alone = step(batch, 1, rates).seconds
    row = {"batch a GPU": f"{batch:,}", "1 GPU": _microseconds(alone)}
    for gpus in GPUS[1:]:
        both, apart = (step(batch, gpus, rates, sync_batch_norm=sync) for sync in (True, False))
        efficiency = f"{alone / both.seconds:.2f} ({alone / apart.seconds:.2f})"
        times = f"{_microseconds(both.seconds)}, of which {both.exchange * 1e6:,.0f} exchange"
        row[f"{gpus:,} GPUs"] = f"{times}: {efficiency}"
    return row


def _simulated(rates: Values) -> Rows:
    """Return the time of a batch by the model and by the simulation, over 200 batches."""
    rows, jitter = [], rates["jitter"]

    def add(what: str, ranks: int, stages: list[float], model: float, batches: int = 1, **how: Any) -> None:
        took = simulate(stages, 200 * batches, ranks=ranks, **how) / 200
        row = {"what": what, "ranks": f"{ranks:,}", "batches buffered": str(how.get("depth", 2))}
        rows.append(
            row | {"model": _microseconds(model), "simulated": _microseconds(took), "ratio": f"{took / model:.2f}"}
        )

    for gpus in GPUS:
        one = step(256, gpus, rates)
        add("steps of 256 photos a GPU", gpus, [one.compute], one.seconds, exchange=one.exchange, jitter=[jitter])
    for gpus in GPUS[2:]:
        one, parts = step(256, gpus, rates), 1 + 2 * len(FILTERS)
        how: dict[str, Any] = {"exchange": one.exchange / parts, "jitter": [jitter * parts**0.5]}
        what = f"the same in {parts} parts, each as uncertain by itself, an exchange after each"
        add(what, gpus, [one.compute / parts], one.seconds, parts, **how)
    for gpus, depth in ((1, 2), (64, 2), (64, 8), (1000, 8)):
        one = step(2048, gpus, rates)
        how = {"exchange": one.exchange, "jitter": [0.5, jitter], "depth": depth}
        what = "steps of 2,048, a loader that takes 0.8 of a step, give or take 0.4"
        add(what, gpus, [0.8 * one.seconds, one.compute], one.seconds, **how)
    one = step(2048, 8, rates, feed=PHOTO_BYTES / rates["row_read"])
    add("steps of 2,048, mapped", 8, [one.feed, one.compute], one.seconds, exchange=one.exchange)
    photo = [rates["jpeg"] * 8 / rates["storage_node"], 1 / rates["gpu_decode"], PHOTO_BYTES * 8 / rates["disk_write"]]
    chunk = [512 * seconds for seconds in photo]
    add("512 photos read, decoded, written to the cache", 8, chunk, max(chunk))
    return rows


def _measured(rates: Values) -> Rows:
    """Return the model of two cores against the published runs, from the start of the command to its end."""
    rows = []
    for row in read(PUBLISHED).rows:
        info = row["extra_info"]
        if row["group"] != "train" and info.get("grows") != "photos":
            continue
        epochs = info.get("epochs", 1)
        took = info["stages"].get("cold", info["stages"])
        model = run(info["num_photos"], 0, rates, epochs=epochs, batch=32)
        pairs = {"all, s: model / measured": (model.seconds, took["start"] + took["total"])}
        pairs |= {stage: (model.stage(stage), took[stage]) for stage in ("decode", "train")}
        cells = {head: f"{ours:.1f} / {theirs:.1f} = {ours / theirs:.2f}" for head, (ours, theirs) in pairs.items()}
        rows.append({"photos": f"{info['num_photos']:,}", "epochs": str(epochs), **cells, "n": str(row["n"])})
    return rows


def _sensitivity(rates: Values) -> Rows:
    """Return the effect of halving and doubling a rate: the rates that change a run or the step by a tenth."""

    def found(changed: Values) -> list[Run | Step]:
        runs = [run(*cell, changed) for cell in CELLS[:-1]]
        return [*runs, run(*CELLS[-1], changed, ALL_BUILT), step(256, 64, changed)]

    def over(after: Run | Step, before: Run | Step) -> str:
        moved = "" if after.bottleneck == before.bottleneck else f" ({after.bottleneck})"
        return f"{after.seconds / before.seconds:.2f}{moved}"

    plain, rows = found(rates), []
    heads = [_cell_head(*cell, one) for cell, one in zip(CELLS, plain[:-1], strict=True)]
    heads[-1] += ", three changes built"
    heads.append(f"step, 256 a GPU on 64: {_microseconds(plain[-1].seconds)}, {plain[-1].bottleneck}")
    for name, value in rates.items():
        pairs = zip(plain, found({**rates, name: value / 2}), found({**rates, name: value * 2}), strict=True)
        cells = [[over(one, before) for one in both] for before, *both in pairs]
        if any(abs(float(text.split()[0]) - 1) >= 0.1 for both in cells for text in both):
            rows.append({"halved, doubled": name} | dict(zip(heads, map(", ".join, cells), strict=True)))
    return rows


def _cell_head(photos: int, gpus: int, found: Run | Step | str) -> str:
    return f"{photos:,} on {gpus:,}: {_tell(found, SHORT)}"


def _changes(rates: Values, threads: Values) -> Rows:
    """Return the effect of what could be bought or built, on some runs."""
    storage = {name: 4 * rates[name] for name in ("storage_node", "storage_all")}
    changes: dict[str, tuple[Values, Plan]] = {
        "`--decoder turbo`: decoded by the node's cores": (rates, Plan(decoder="turbo")),
        "rows read by more threads, 16 GB/s a rank": (threads, AS_BUILT),
        "each rank reads and remembers its share of the list": (rates, Plan(list_dealt_out=True)),
        "photos dealt out once a run": (rates, Plan(dealt_once=True)),
        "all four": (threads, ALL_BUILT),
        "storage four times as fast": ({**rates, **storage}, AS_BUILT),
        "all five": ({**threads, **storage}, ALL_BUILT),
    }
    heads = {cell: _cell_head(*cell, run_of(*cell, rates)) for cell in CELLS}
    return [
        {"changed": what} | {head: _tell(run_of(*cell, *how), SHORT) for cell, head in heads.items()}
        for what, how in changes.items()
    ]
