"""The tables of docs/scale.md, made from the model in bench/scale.py and its rates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import rates, scale, scale_step
from bench.pipeline import simulate
from bench.report.record import read
from bench.report.tables import fill, markdown
from bench.scale import ALL_BUILT, AS_BUILT, Plan
from bench.scale_step import Values

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
PHOTOS = [10**power for power in range(3, 10)]
GPUS = [1, 8, 64, 1000]
CELLS = [(10**4, 1), (10**6, 8), (10**7, 8), (10**8, 64), (10**9, 1000)]  # what the smaller tables are about
STAGES = ("start", "list", "decode", "load", "train", "evaluate")
TOO_FEW, TOO_MANY = "too few photos", "the list does not fit"


def filled(text: str) -> str:
    """Return a text with every marked table made anew."""
    return fill(text, lambda name: f"\n{TABLES[name]()}\n")


def duration(seconds: float) -> str:
    """Return seconds as a reader takes them in."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def dollars(run: scale.Run, price: float) -> str:
    """Return what the GPUs of a run cost."""
    cost = run.seconds / 3600 * run.gpus * price
    return f"${cost:,.0f}" if cost >= 10 else f"${cost:.2f}"


def run_of(photos: int, gpus: int, values: Values, plan: Plan = AS_BUILT) -> scale.Run | str:
    """Return a run, or why there can be none."""
    if scale.batch_of(photos, gpus) < gpus:
        return TOO_FEW
    return scale.run(photos, gpus, values, plan) if scale.list_fits(photos, gpus, values, plan) else TOO_MANY


def with_threads() -> dict[str, float]:
    """Return the rates of a loader that reads rows by several threads."""
    return rates.values() | {name: rates.rates()[name].high for name in ("row_read", "upload")}


def _rates() -> str:
    lines = [
        [name, *map(_number, (rate.value, rate.low, rate.high)), rate.unit, rate.kind, rate.source]
        for name, rate in rates.rates().items()
    ]
    return markdown(["rate", "value", "low", "high", "unit", "", "source"], lines)


def _number(value: float) -> str:
    if 100 <= value < 1e6:
        return f"{value:,.0f}"
    return re.sub(
        r"e([+-])0?", lambda match: "e" + match[1].strip("+"), f"{value:.2g}" if value < 1 else f"{value:.3g}"
    )


def _sizes() -> str:
    values, lines = rates.values(), []
    for photos in PHOTOS:
        jpeg, pixels, index = (photos * size for size in (values["jpeg"], rates.PHOTO_BYTES, values["index"]))
        month = (jpeg + pixels) / 1e9 * values["keep"]
        lines.append([f"{photos:,}", *map(_size, (jpeg, pixels, index)), f"${month:,.2f}"])
    return markdown(
        ["photos", "JPEGs", "cache", "index in memory, each rank", "JPEGs and cache kept for a month"], lines
    )


def _size(num_bytes: float) -> str:
    power = min(int(math.log10(num_bytes)) // 3, 4)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _map() -> str:
    return _mapped(rates.values(), AS_BUILT)


def _built() -> str:
    return _mapped(with_threads(), ALL_BUILT)


def _mapped(values: Values, plan: Plan) -> str:
    """Say for photos and GPUs how long a run takes, what it costs and what most of the time is spent on."""
    lines = []
    for photos in PHOTOS:
        found = [run_of(photos, gpus, values, plan) for gpus in GPUS]
        cells = [
            run
            if isinstance(run, str)
            else f"{duration(run.seconds)}, {dollars(run, values['price'])}: {run.bottleneck}"
            for run in found
        ]
        lines.append([f"{photos:,}", *cells])
    return markdown(["photos", *map(_gpus, GPUS)], lines)


def _gpus(gpus: int) -> str:
    return f"{gpus:,} GPU{'s' * (gpus > 1)}"


def _runs() -> str:
    values = rates.values()
    lines = []
    for photos in PHOTOS:
        alone = scale.run(photos, 1, values)
        for gpus in GPUS:
            run = run_of(photos, gpus, values)
            if isinstance(run, str):
                continue
            lines.append(
                [
                    f"{photos:.0e}".replace("e+0", "e"),
                    f"{gpus:,}",
                    f"{run.batch:,}",
                    run.memory,
                    *(duration(run.of("stage", stage)) for stage in STAGES),
                    duration(run.seconds),
                    duration(run.again),
                    f"{run.images_per_second:,.0f}",
                    f"{alone.seconds / gpus / run.seconds:.2g}",
                    dollars(run, values["price"]),
                ]
            )
    head = ["photos", "GPUs", "batch", "pixels", *STAGES, "all", "again", "images/s", "efficiency", "cost"]
    return markdown(head, lines)


def _epochs() -> str:
    """Once the photos are decoded and loaded: seconds an epoch and what they are spent on."""
    values, lines = rates.values(), []
    for photos in PHOTOS:
        cells = []
        for gpus in GPUS:
            run = run_of(photos, gpus, values)
            if isinstance(run, str):
                cells.append(run)
                continue
            stages = ("load", "train") if run.memory == "sharded" else ("train",)
            parts = [part for part in run.parts if part.stage in stages]
            seconds = sum(part.seconds for part in parts) / scale.EPOCHS
            cells.append(f"{duration(seconds)}: {max(parts, key=lambda part: part.seconds).cause}")
        lines.append([f"{photos:,}", *cells])
    return markdown(["photos", *map(_gpus, GPUS)], lines)


def _step() -> str:
    values = rates.values()
    lines = []
    for batch in (4, 32, 256, 2048):
        alone = scale_step.step(batch, 1, values).seconds
        cells = []
        for gpus in GPUS[1:]:
            both, apart = (scale_step.step(batch, gpus, values, sync_batch_norm=sync) for sync in (True, False))
            share = f"{alone / both.seconds:.2f} ({alone / apart.seconds:.2f})"
            cells.append(f"{both.seconds * 1e6:,.0f} us, of which {both.exchange * 1e6:,.0f} exchange: {share}")
        lines.append([f"{batch:,}", f"{alone * 1e6:,.0f} us", *cells])
    return markdown(["batch a GPU", "1 GPU", *(f"{gpus:,} GPUs" for gpus in GPUS[1:])], lines)


def _simulated() -> str:
    """A batch's time by the model and by the simulation, over 200 batches."""
    values, lines = rates.values(), []

    def add(
        what: str, ranks: int, stages: list[float], model: float, depth: int = 2, batches: int = 1, **how: Any
    ) -> None:
        took = simulate(stages, 200 * batches, ranks=ranks, depth=depth, **how) / 200
        micro = [f"{seconds * 1e6:,.0f} us" for seconds in (model, took)]
        lines.append([what, f"{ranks:,}", str(depth), *micro, f"{took / model:.2f}"])

    for gpus in GPUS:
        one = scale_step.step(256, gpus, values)
        add(
            "steps of 256 photos a GPU",
            gpus,
            [one.compute],
            one.seconds,
            exchange=one.exchange,
            jitter=[values["jitter"]],
        )
    for gpus in GPUS[2:]:
        one, parts = scale_step.step(256, gpus, values), 1 + 2 * len(scale_step.FILTERS)
        how: dict[str, Any] = {"exchange": one.exchange / parts, "jitter": [values["jitter"] * parts**0.5]}
        what = f"the same in {parts} parts, each as uncertain by itself, an exchange after each"
        add(what, gpus, [one.compute / parts], one.seconds, batches=parts, **how)
    for gpus, depth in ((1, 2), (64, 2), (64, 8), (1000, 8)):
        one = scale_step.step(2048, gpus, values)
        stages, jitter = [0.8 * one.seconds, one.compute], [0.5, values["jitter"]]
        what = "steps of 2,048, a loader that takes 0.8 of a step, give or take 0.4"
        add(what, gpus, stages, one.seconds, depth, exchange=one.exchange, jitter=jitter)
    one = scale_step.step(2048, 8, values, feed=rates.PHOTO_BYTES / values["row_read"])
    add("steps of 2,048, mapped", 8, [one.feed, one.compute], one.seconds, exchange=one.exchange)
    chunk = [512 * values["jpeg"] * 8 / values["storage_node"], 512 / values["gpu_decode"]]
    chunk.append(512 * rates.PHOTO_BYTES * 8 / values["disk_write"])
    add("512 photos read, decoded, written to the cache", 8, chunk, max(chunk))
    return markdown(["what", "ranks", "batches buffered", "model", "simulated", "ratio"], lines)


def _measured() -> str:
    """Compare the model of two cores with the published runs, from the start of the command to its end."""
    values, lines = rates.values(), []
    for row in read(rates.PUBLISHED).rows:
        info = row["extra_info"]
        if row["group"] != "train" and info.get("grows") != "photos":
            continue
        epochs = info.get("epochs", 1)
        took = info["stages"].get("cold", info["stages"])
        run = scale.run(info["num_photos"], 0, values, epochs=epochs, batch=32)
        pairs = {"all": (run.seconds, took["start"] + took["total"])}
        pairs |= {stage: (run.of("stage", stage), took[stage]) for stage in ("decode", "train")}
        cells = [f"{ours:.1f} / {theirs:.1f} = {ours / theirs:.2f}" for ours, theirs in pairs.values()]
        lines.append([f"{info['num_photos']:,}", str(epochs), *cells, str(row["n"])])
    return markdown(["photos", "epochs", "all, s: model / measured", "decode", "train", "n"], lines)


def _sensitivity() -> str:
    """What halving and doubling a rate does to four runs and to a step: those rates that change one by a tenth."""
    values = rates.values()

    def found(changed: Values) -> list[scale.Run | scale_step.Step]:
        runs = [scale.run(*cell, changed) for cell in CELLS[:-1]]
        return [*runs, scale.run(*CELLS[-1], changed, ALL_BUILT), scale_step.step(256, 64, changed)]

    plain, lines = found(values), []
    for name, value in values.items():
        pairs = zip(plain, found({**values, name: value / 2}), found({**values, name: value * 2}), strict=True)
        cells = [[_over(one, before) for one in both] for before, *both in pairs]
        if any(abs(float(text.split()[0]) - 1) >= 0.1 for both in cells for text in both):
            lines.append([name, *(", ".join(both) for both in cells)])
    said = [_said(run_of(*cell, values)) for cell in CELLS[:-1]]
    said.append(_said(run_of(*CELLS[-1], values, ALL_BUILT)) + ", four changes built")
    step = f"step, 256 a GPU on 64: {scale_step.step(256, 64, values).seconds * 1e6:,.0f} us, exchange"
    return markdown(["halved, doubled", *_heads(said), step], lines)


def _heads(said: list[str]) -> list[str]:
    return [f"{photos:,} on {gpus:,}: {text}" for (photos, gpus), text in zip(CELLS, said, strict=True)]


def _over(after: scale.Run | scale_step.Step, before: scale.Run | scale_step.Step) -> str:
    moved = "" if after.bottleneck == before.bottleneck else f" ({after.bottleneck})"
    return f"{after.seconds / before.seconds:.2f}{moved}"


def _said(run: scale.Run | str) -> str:
    return run if isinstance(run, str) else f"{duration(run.seconds)}, {run.bottleneck}"


def _changes() -> str:
    """What could be bought or built, for four runs."""
    values = rates.values()
    threads, plan = with_threads(), ALL_BUILT
    storage = {name: 4 * values[name] for name in ("storage_node", "storage_all")}
    rows: dict[str, tuple[Values, Plan]] = {
        "`--decoder turbo`: decoded by the node's cores": (values, Plan(decoder="turbo")),
        "rows read by threads, 16 GB/s a rank": (threads, AS_BUILT),
        "each rank appends to a cache of its own": (values, Plan(caches_apart=True)),
        "each rank lists and checks its share": (values, Plan(list_dealt_out=True)),
        "photos dealt out once a run": (values, Plan(dealt_once=True)),
        "all five": (threads, plan),
        "storage four times as fast": ({**values, **storage}, AS_BUILT),
        "all six": ({**threads, **storage}, plan),
    }
    lines = [[what, *(_said(run_of(*cell, *how)) for cell in CELLS)] for what, how in rows.items()]
    return markdown(["changed", *_heads([_said(run_of(*cell, values)) for cell in CELLS])], lines)


TABLES: dict[str, Callable[[], str]] = {
    "sizes": _sizes,
    "map": _map,
    "built": _built,
    "epochs": _epochs,
    "runs": _runs,
    "step": _step,
    "changes": _changes,
    "sensitivity": _sensitivity,
    "simulated": _simulated,
    "measured": _measured,
    "rates": _rates,
}
