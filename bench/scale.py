"""Model of a run with N photos on G GPUs: seconds, bottleneck and cost of each stage, from rates and their sources.

    python -m bench.scale            # print the tables
    python -m bench.scale --write    # write them and the picture into docs/scale.md

GPU rates are counted from the network's shapes, published by somebody else, or assumed; the others were measured on two
CPU cores. The file reads in order: rates, a training step, a run, a simulation, tables, the picture.
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from bench.harness.roofline import floor_seconds, passes
from bench.report.record import Record, read
from bench.report.tables import fill, markdown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scale.md"
PUBLISHED = ROOT / "bench" / "results" / "published" / "amd-epyc-2-cores.json"
RATES = ROOT / "bench" / "scale_rates.csv"
PHOTO_BYTES = 128 * 128 * 3
NUM_PARAMETERS = 105_162  # SmallCNN(10); a test counts them
GRADIENT_BYTES = 4 * (NUM_PARAMETERS + 1)
STATISTICS_BYTES = 4 * 3 * 32  # a block's count, mean and squares around it, 32 channels
FILTERS = (32,) * 5
GPUS_PER_NODE = 8

Values = Mapping[str, float]
"""Rates by name."""


@dataclass(frozen=True)
class Rate:
    """Number with the range that it may well lie in, its unit and its source."""

    value: float
    low: float
    high: float
    unit: str
    kind: str  # measured, published or assumed
    source: str


def rate_table() -> dict[str, Rate]:
    """Return every rate of bench/scale_rates.csv by its name; the published results give the values left out there."""
    record, table = read(PUBLISHED), {}
    measured = _measured_rates(record)
    with RATES.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name, source = row["name"], row["source"]
            value = float(row["value"] or measured[name])
            low, high = (float(row[end] or measured.get(f"{name} {end}", value)) for end in ("low", "high"))
            if not row["value"]:
                source = f"`{record.command}`: {source}"
            table[name] = Rate(value, low, high, row["unit"], row["kind"], source)
    return table


def rate_values(*, threads: bool = False) -> dict[str, float]:
    """Return the value of every rate by its name; `threads`: of a loader that reads rows by several threads."""
    faster = ("row_read", "upload") if threads else ()
    return {name: rate.high if name in faster else rate.value for name, rate in rate_table().items()}


def _measured_rates(record: Record) -> dict[str, float]:
    """Return the rates that the published results file of two cores holds."""
    row = {(one["group"], one["name"]): one for one in record.rows}
    run = row["train", "cold start to the end"]["extra_info"]
    cold, warm = run["stages"]["cold"], run["stages"]["warm"]
    a_photo = row["growth", "50,000 photos, batch 32, 1 epoch"]["extra_info"]["photo_seconds"]
    step = row["step", "eager, bf16, 32,32,32,32,32, batch 32"]
    images = step["extra_info"]["images_per_second"] * step["median_seconds"]
    assert record.growth
    first, last = record.growth["points"][0], record.growth["points"][-1]
    return {
        "start": cold["start"] + cold["import"] + cold["report"],
        "scan": 1 / a_photo["scan"],
        "cpu_decode": row["decode", "turbo, 2 threads"]["extra_info"]["images_per_second"] / 2,
        "cpu_step": images / step["median_seconds"],
        "cpu_step low": images / step["max_seconds"],
        "cpu_step high": images / step["min_seconds"],
        "evaluate": 4 * cold["eval"] / cold["train"],  # four photos are trained on for each that is held out
        "check": run["num_photos"] * PHOTO_BYTES / warm["decode"] / 2,
        "upload": PHOTO_BYTES / a_photo["upload"],
        "checkpoint": cold["checkpoint"] / run["epochs"],
        "index": (last["more_bytes"] - last["more_bytes_by_size"]) / (last["num_photos"] - first["num_photos"]),
    }


@dataclass(frozen=True)
class Step:
    """Seconds of a training step on the slowest rank, by cause."""

    launches: float  # however few photos it has, where computing takes less; else 0
    compute: float
    stragglers: float  # that the slowest rank takes longer than the mean
    exchange: float  # gradient and batch-norm statistics: nothing is computed meanwhile
    feed: float  # the loader's for a rank's batch, while the step before runs

    @property
    def seconds(self) -> float:
        """Seconds from one step to the next."""
        return max(self.feed, self.launches + self.compute + self.stragglers + self.exchange)

    @property
    def bottleneck(self) -> str:
        """The largest of them."""
        return max(vars(self), key=vars(self).__getitem__)


def nodes_of(gpus: int) -> int:
    """Return how many machines hold so many GPUs."""
    return max(1, math.ceil(gpus / GPUS_PER_NODE))


def collective(num_bytes: float, gpus: int, rates: Values, ways: int = 2) -> float:
    """Return the seconds of an all-reduce, or with one way of an all-gather: within nodes, then between them.

    On each level the faster of a ring (ways x (n - 1) hops of 1/n of the bytes) and a tree (ways x log2 n hops).
    """

    def level(n: int, hop: float, link: float, size: float) -> float:
        return ways * min((n - 1) * (hop + size / n / link), math.ceil(math.log2(n)) * hop + size / link)

    if gpus == 1:
        return 0.0
    local = min(gpus, GPUS_PER_NODE)
    within = level(local, rates["hop_node"], rates["link_node"], num_bytes)
    return rates["collective"] + within + level(nodes_of(gpus), rates["hop_net"], rates["link_net"], num_bytes / local)


def slowest(ranks: int) -> float:
    """Return the expected largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def step(batch: float, gpus: int, rates: Values, *, sync_batch_norm: bool = True, feed: float = 0.0) -> Step:
    """Return a step of `batch` photos a GPU; no GPU is the two measured cores. feed: the loader's seconds a photo."""
    ranks, launches, compute = max(1, gpus), 0.0, batch / rates["cpu_step"]
    if gpus:
        whole = max(1, round(batch))
        floor = floor_seconds(passes(FILTERS, batch=whole), rates["bandwidth"], rates["matrix"])
        launches, compute = rates["launch"], floor / rates["share"] * batch / whole
    exchange = collective(GRADIENT_BYTES, ranks, rates)
    if sync_batch_norm:
        for ways in (1, 2):  # gathered forward, reduced backward
            exchange += len(FILTERS) * collective(STATISTICS_BYTES, ranks, rates, ways)
    stragglers = rates["jitter"] * slowest(ranks) * max(launches, compute)
    launches, compute = (launches, 0.0) if launches > compute else (0.0, compute)
    return Step(launches, compute, stragglers, exchange, batch * feed)


EPOCHS = 10
VAL_FRACTION = 0.2
UPDATES = 2500  # of the reference run: 8,000 photos, 10 epochs, batches of 32
SMALLEST, LARGEST_A_GPU = 32, 2048
MOST_THREADS = 32  # that check a cache


@dataclass(frozen=True)
class Plan:
    """How a run is organised. The defaults are what is built."""

    decoder: str = "dali"  # on the GPU; turbo: on the node's cores
    list_dealt_out: bool = False  # a rank lists, checks and remembers its part of the photos; else the first all
    caches_apart: bool = False  # each rank appends to a cache of its own; else all take turns with one
    dealt_once: bool = False  # a rank keeps its part of the photos for all epochs; else it gets another one each time


AS_BUILT = Plan()
ALL_BUILT = Plan("turbo", list_dealt_out=True, caches_apart=True, dealt_once=True)


@dataclass(frozen=True)
class Run:
    """Run from the start of the command, nothing decoded, to its end."""

    gpus: int
    batch: int  # photos of a step on all GPUs together
    memory: str  # where the pixels are: resident, sharded (this epoch's part on each device), mapped or stream
    stages: dict[str, dict[str, float]]  # seconds of each stage, by what they are spent on
    check: float  # seconds that opening a finished cache takes instead of decoding
    images_per_second: float  # training rate
    price: float  # of a GPU-hour

    def stage(self, name: str) -> float:
        """Return the seconds of a stage."""
        return sum(self.stages[name].values())

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(map(self.stage, self.stages))

    @property
    def bottleneck(self) -> str:
        """Cause that most of the seconds are spent on."""
        causes: dict[str, float] = defaultdict(float)
        for spent in self.stages.values():
            for cause, seconds in spent.items():
                causes[cause] += seconds
        return max(causes, key=causes.__getitem__)

    @property
    def time(self) -> str:
        """Seconds of the whole run, in words."""
        return duration(self.seconds)

    @property
    def epoch(self) -> str:
        """Seconds of an epoch once the photos are decoded and loaded, in words, and what most are spent on."""
        spent = self.stages["train"] | (self.stages["load"] if self.memory == "sharded" else {})
        return f"{duration(sum(spent.values()) / EPOCHS)}: {max(spent, key=spent.__getitem__)}"

    @property
    def cost(self) -> str:
        """Price of the GPUs, in words."""
        cost = self.seconds / 3600 * self.gpus * self.price
        return f"${cost:,.0f}" if cost >= 10 else f"${cost:.2f}"


def batch_of(photos: int, gpus: int, epochs: int = EPOCHS) -> int:
    """Return the batch of all GPUs: as large as still leaves as many updates as the reference run makes."""
    return round(min(max(SMALLEST, photos * (1 - VAL_FRACTION) * epochs / UPDATES), LARGEST_A_GPU * max(1, gpus)))


def run(photos: int, gpus: int, rates: Values, plan: Plan = AS_BUILT, *, epochs: int = EPOCHS, batch: int = 0) -> Run:
    """Return a run on so many GPUs, up to eight a machine, or on the two measured cores (0 GPUs).

    Four fifths of the photos are trained on. batch: photos of a step on all GPUs; 0 is what `batch_of` says.
    """
    ranks, nodes = max(1, gpus), nodes_of(gpus)
    batch = batch or batch_of(photos, gpus, epochs)
    share, pixels = photos / ranks, photos * PHOTO_BYTES
    storage = min(nodes * rates["storage_node"], rates["storage_all"])  # all nodes together
    disk_read, disk_write = (rates["disk_read"], rates["disk_write"]) if nodes == 1 else (storage, storage)
    on_cpu = rates["cpu_decode"] * (rates["cores"] if gpus else 2)
    decode_rate = rates["gpu_decode"] if gpus and plan.decoder == "dali" else on_cpu  # photos/s a rank
    memory = _memory(pixels, gpus, rates)
    written = pixels * (memory != "stream")

    # Opening a finished cache: every row is read and checked.
    checking = nodes if plan.list_dealt_out else 1  # nodes
    threads = min(MOST_THREADS, rates["cores"] * min(gpus, GPUS_PER_NODE)) if gpus else 2
    check_read = disk_read if nodes == 1 else min(checking * rates["storage_node"], storage)

    loads = 1 if plan.dealt_once else epochs
    # A node's part is another one each epoch: its memory helps where it holds the whole set.
    reads = 1 if pixels <= 0.8 * rates["host_memory"] else loads
    load, feed = {"loader": 0.0}, {"none": 0.0}  # feed: seconds a photo of one rank
    if memory == "resident":
        load = _longest(loader=pixels / rates["upload"], storage=pixels * nodes / disk_read)
    elif memory == "sharded":
        rows = loads * share * PHOTO_BYTES / rates["row_read"]
        load = _longest(loader=rows, storage=reads * pixels / disk_read)
    elif memory == "mapped":
        a_photo = PHOTO_BYTES * ranks / disk_read
        feed = _longest(loader=PHOTO_BYTES / rates["row_read"], storage=a_photo * reads / loads)
    else:
        feed = _longest(decode=1 / decode_rate, storage=rates["jpeg"] * ranks / storage)

    one = step(batch / ranks, gpus, rates, feed=sum(feed.values()))
    steps = max(1, int(photos * (1 - VAL_FRACTION) / batch)) * epochs
    trained = {cause: seconds for cause, seconds in vars(one).items() if cause != "feed"}
    if one.feed >= sum(trained.values()):
        trained = dict.fromkeys(feed, one.feed)
    forward = rates["evaluate"] * (one.launches + one.compute) * ranks / batch  # seconds a photo
    scored = _longest(**feed, **{"launches" if one.launches else "compute": forward})
    joined = (3 + rates["join"] * ranks) * (ranks > 1)
    listed = share if plan.list_dealt_out else photos
    decoded = _longest(
        decode=share / decode_rate,
        storage=max(photos * rates["jpeg"] / storage, written / disk_write),
        append=written / rates["append"] / (ranks if plan.caches_apart else 1),
    )
    stages = {
        "start": {"start-up": rates["start"] + (rates["start_gpu"] if gpus else 0) + joined},
        "list": {"list": listed / rates["scan"] + (listed / rates["journal"] if ranks > 1 else 0)},
        "decode": decoded,
        "load": load,
        "train": {cause: seconds * steps for cause, seconds in trained.items()},
        "evaluate": {cause: seconds * epochs * share * VAL_FRACTION for cause, seconds in scored.items()},
        "checkpoint": {"checkpoint": epochs * rates["checkpoint"]},
    }
    check = written / min(checking * threads * rates["check"], check_read)
    return Run(gpus, batch, memory, stages, check, batch / one.seconds, rates["price"])


def _memory(pixels: float, gpus: int, rates: Values) -> str:
    """Return where the pixels of a set are while it is trained on."""
    device = rates["memory"] * 0.8
    if pixels <= device or not gpus:
        return "resident"
    if nodes_of(gpus) == 1 and pixels > rates["disk"]:
        return "stream"
    return "sharded" if pixels / gpus <= device else "mapped"


def _longest(**seconds: float) -> dict[str, float]:
    """Return the longest of things that happen at once, with its seconds."""
    cause = max(seconds, key=seconds.__getitem__)
    return {cause: seconds[cause]}


def run_of(photos: int, gpus: int, rates: Values, plan: Plan = AS_BUILT) -> Run | str:
    """Return a run, or why there can be none."""
    if batch_of(photos, gpus) < gpus:
        return "too few photos"
    listed = photos / gpus if plan.list_dealt_out else photos  # that each rank of a machine has to remember
    if rates["index"] * listed * min(gpus, GPUS_PER_NODE) > 0.8 * rates["host_memory"]:
        return "the list does not fit"
    return run(photos, gpus, rates, plan)


def simulate(
    stages: Sequence[float],
    num_batches: int,
    *,
    ranks: int = 1,
    exchange: float | None = None,
    jitter: Sequence[float] = (),
    depth: int = 2,
) -> float:
    """Return the simulated seconds of a pipeline, from the first batch's start to the last one's end on all ranks.

    Args:
        stages: seconds that each stage of a rank takes for a batch, in order; the last is the training step.
        num_batches: batches of every rank.
        ranks: pipelines side by side.
        exchange: seconds of the all-reduce after each step, which no rank leaves before the last has come to it;
            None: nothing is exchanged, as when a cache is built.
        jitter: standard deviation of each stage on a rank, as a part of its seconds; none takes less than no time.
        depth: batches that the buffer between two stages holds, the one that is worked on included.
    """
    random = np.random.default_rng(0)
    last, jitter = len(stages) - 1, jitter or [0.0] * len(stages)
    left = np.zeros((depth, len(stages), ranks))  # when each stage was done with the last `depth` batches
    for batch in range(num_batches):
        place, before = batch % depth, left[(batch - 1) % depth].copy()
        freed = left[place].copy()  # batch - depth: a stage writes where the next one was done reading
        handed = np.zeros(ranks)
        for stage, seconds in enumerate(stages):
            start = np.maximum(handed, before[stage])
            if stage < last:
                start = np.maximum(start, freed[stage + 1])
            handed = start + seconds * np.maximum(0, 1 + jitter[stage] * random.standard_normal(ranks))
            if stage == last and exchange is not None:
                handed = np.full(ranks, handed.max() + exchange)
            left[place, stage] = handed
    return float(left.max())


PHOTOS = [10**power for power in range(3, 10)]
GPUS = [1, 8, 64, 1000]
CELLS = [(10**4, 1), (10**6, 8), (10**7, 8), (10**8, 64), (10**9, 1000)]  # what the smaller tables are about
STAGES = ("start", "list", "decode", "load", "train", "evaluate")
# What a cell tells of a run.
SUMMARY, SHORT, EPOCH = "{0.time}, {0.cost}: {0.bottleneck}", "{0.time}, {0.bottleneck}", "{0.epoch}"

Rows = list[dict[str, str]]
"""Cells of each row of a table, by their heads."""


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _bytes(count: float) -> str:
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _number(value: float) -> str:
    text = f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.2g}" if value < 1 else f"{value:.3g}"
    return re.sub(r"e\+?(-?)0?", r"e\1", text)


def tables() -> dict[str, Rows]:
    """Return every table of the page by its name."""
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
    heads[-1] += ", four changes built"
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
        "rows read by threads, 16 GB/s a rank": (threads, AS_BUILT),
        "each rank appends to a cache of its own": (rates, Plan(caches_apart=True)),
        "each rank lists and checks its share": (rates, Plan(list_dealt_out=True)),
        "photos dealt out once a run": (rates, Plan(dealt_once=True)),
        "all five": (threads, ALL_BUILT),
        "storage four times as fast": ({**rates, **storage}, AS_BUILT),
        "all six": ({**threads, **storage}, ALL_BUILT),
    }
    heads = {cell: _cell_head(*cell, run_of(*cell, rates)) for cell in CELLS}
    return [
        {"changed": what} | {head: _tell(run_of(*cell, *how), SHORT) for cell, head in heads.items()}
        for what, how in changes.items()
    ]


PICTURE_GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
CAUSES = ["start-up", "list", "decode", "append", "loader", "storage", "compute", "launches", "exchange"]


def draw(path: Path) -> None:
    """Draw how long a run takes and what its time is spent on, over photos and GPUs: as built, and with more built."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch
    from PIL import Image

    figure, panels = plt.subplots(2, figsize=(9, 8))
    colours = dict(zip(CAUSES, plt.get_cmap("Set3")(range(len(CAUSES))), strict=False))
    used = set()
    for axes, title, rates, plan in (
        (panels[0], "as built", rate_values(), AS_BUILT),
        (panels[1], "with the five changes that docs/scale.md names", rate_values(threads=True), ALL_BUILT),
    ):
        runs = [[run_of(photos, gpus, rates, plan) for gpus in PICTURE_GPUS] for photos in reversed(PHOTOS)]
        causes = [[one.bottleneck if isinstance(one, Run) else "" for one in row] for row in runs]
        used |= {cause for row in causes for cause in row}
        axes.table(
            [["-" if isinstance(one, str) else f"{one.time}\n{one.cost}" for one in row] for row in runs],
            [[colours.get(cause, "white") for cause in row] for row in causes],
            cellLoc="center",
            rowLabels=[f"{photos:,}" for photos in reversed(PHOTOS)],
            colLabels=[f"{gpus:,}" for gpus in PICTURE_GPUS],
            bbox=(0, 0, 1, 1),
        )
        axes.set_title(f"{title}: photos over GPUs", loc="left", fontsize=10)
        axes.axis("off")
    patches = [Patch(color=colour, label=cause) for cause, colour in colours.items() if cause in used]
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.96), ncols=len(patches), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=96, bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)


def filled(text: str) -> str:
    """Return a text with every marked table made anew."""
    made = {name: _markdown(rows) for name, rows in tables().items()}
    return fill(text, lambda name: f"\n{made[name]}\n")


def _markdown(rows: Rows) -> str:
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def main(arguments: list[str]) -> int:
    """Print the tables, or write them into docs/scale.md; return the exit code."""
    if arguments not in ([], ["--write"]):
        print(f"scale: error: expected --write or nothing, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if arguments:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        draw(DOCUMENT.with_suffix(".png"))
    else:
        for name, rows in tables().items():
            print(f"{name}\n\n{_markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
