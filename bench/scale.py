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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from bench.harness.roofline import floor_seconds, passes
from bench.report.record import Record, read
from bench.report.tables import fill, markdown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scale.md"
PUBLISHED = ROOT / "bench" / "results" / "published" / "amd-epyc-2-cores.json"
OTHER_RATES = ROOT / "bench" / "scale_rates.csv"
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
    kind: Literal["measured", "counted", "published", "assumed"]
    source: str


def rate_table() -> dict[str, Rate]:
    """Return every rate by its name."""
    return _measured_rates(read(PUBLISHED)) | _other_rates()


def rate_values() -> dict[str, float]:
    """Return the value of every rate by its name."""
    return {name: rate.value for name, rate in rate_table().items()}


def _measured_rates(record: Record) -> dict[str, Rate]:
    """Return the rates that the published results file of two cores holds."""
    row = {(one["group"], one["name"]): one for one in record.rows}
    run = row["train", "cold start to the end"]["extra_info"]
    cold, warm, num_photos = run["stages"]["cold"], run["stages"]["warm"], run["num_photos"]
    a_photo = row["growth", "50,000 photos, batch 32, 1 epoch"]["extra_info"]["photo_seconds"]
    first, last = (record.growth or {})["points"][0], (record.growth or {})["points"][-1]
    index = (last["more_bytes"] - last["more_bytes_by_size"]) / (last["num_photos"] - first["num_photos"])
    step = row["step", "eager, bf16, 32,32,32,32,32, batch 32"]
    images = step["extra_info"]["images_per_second"] * step["median_seconds"]
    slow, fast = images / step["max_seconds"], images / step["min_seconds"]
    turbo = row["decode", "turbo, 2 threads"]["extra_info"]["images_per_second"] / 2
    evaluation = 4 * cold["eval"] / cold["train"]  # four photos are trained on for each that is held out
    check = num_photos * PHOTO_BYTES / warm["decode"] / 2
    start = cold["start"] + cold["import"] + cold["report"]

    def rate(value: float, unit: str, what: str, low: float | None = None, high: float | None = None) -> Rate:
        return Rate(value, low or value, high or value, unit, "measured", f"`{record.command}`: {what}")

    clothing = "turbo, generated photos; low: clothing-10's, docs/notes.md"
    upload = PHOTO_BYTES * (1 / a_photo["upload"])
    return {
        "start": rate(start, "s", "start, import and report of a run"),
        "scan": rate(1 / a_photo["scan"], "photos/s", "50,000 files, local disk", high=272_000),
        "cpu_decode": rate(turbo, "photos/s a core", clothing, 885, 1650),
        "cpu_step": rate(
            images / step["median_seconds"], "images/s, 2 cores", "eager step, bf16, batch 32, n = 7", slow, fast
        ),
        "evaluate": rate(evaluation, "of a training photo's time", "evaluation a photo, 10 epochs", 0.33, 0.64),
        "check": rate(check, "B/s a core", "opening a cache: CRC-32 of every row", high=1.6e9),
        "upload": rate(upload, "B/s", "the whole set into memory, one rank", high=16e9),
        "checkpoint": rate(cold["checkpoint"] / run["epochs"], "s an epoch", "both checkpoints"),
        "index": rate(index, "B a photo", "peak memory beyond pixels, each rank"),
    }


def _other_rates() -> dict[str, Rate]:
    """Return the rates of bench/scale_rates.csv: measured apart, published by somebody else, or assumed."""
    with OTHER_RATES.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = ("value", "low", "high")
    return {
        row.pop("name"): Rate(**{key: float(text) if key in numbers else text for key, text in row.items()})  # type: ignore[arg-type]
        for row in rows
    }


@dataclass(frozen=True)
class Step:
    """Seconds of a training step on the slowest rank, by cause."""

    launches: float
    """Seconds that a step takes however few photos it has, where computing takes less; else 0."""
    compute: float
    stragglers: float
    """Seconds that the slowest rank takes longer than the mean."""
    exchange: float
    """Gradient and batch-norm statistics: nothing is computed meanwhile."""
    feed: float
    """Seconds of the loader for a rank's batch, while the step before runs."""

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
    return -(-gpus // GPUS_PER_NODE)


def collective(num_bytes: float, gpus: int, rates: Values, ways: int = 2) -> float:
    """Return the seconds of an all-reduce, or with one way of an all-gather: within nodes, then between them.

    On each level the faster of a ring (ways x (n - 1) hops of 1/n of the bytes) and a tree (ways x log2 n hops).
    """
    if gpus == 1:
        return 0.0

    def level(n: int, hop: float, link: float, size: float) -> float:
        ring = ways * (n - 1) * (hop + size / n / link)
        tree = ways * (math.ceil(math.log2(n)) * hop + size / link)
        return min(ring, tree)

    local = min(gpus, GPUS_PER_NODE)
    within = level(local, rates["hop_node"], rates["link_node"], num_bytes)
    between = level(nodes_of(gpus), rates["hop_net"], rates["link_net"], num_bytes / local)
    return rates["collective"] + within + between


def slowest(ranks: int) -> float:
    """Return the expected largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def step(batch: float, gpus: int, rates: Values, *, sync_batch_norm: bool = True, feed: float = 0.0) -> Step:
    """Return a step of `batch` photos a GPU; no GPU is the two measured cores. feed: the loader's seconds a photo."""
    if gpus:
        per_batch = max(1, round(batch))
        floor = floor_seconds(passes(FILTERS, batch=per_batch), rates["bandwidth"], rates["matrix"])
        compute = floor / rates["share"] * batch / per_batch
    else:
        compute = batch / rates["cpu_step"]
    launch = rates["launch"] if gpus else 0.0
    ranks = max(1, gpus)
    exchange = collective(GRADIENT_BYTES, ranks, rates)
    if sync_batch_norm:
        for ways in (1, 2):  # gathered forward, reduced backward
            exchange += len(FILTERS) * collective(STATISTICS_BYTES, ranks, rates, ways)
    bound = launch > compute
    late = rates["jitter"] * slowest(ranks) * max(launch, compute) if ranks > 1 else 0.0
    return Step(launch * bound, compute * (not bound), late, exchange, batch * feed)


EPOCHS = 10
VAL_FRACTION = 0.2
UPDATES = 2500  # of the reference run: 8,000 photos, 10 epochs, batches of 32
SMALLEST, LARGEST_A_GPU = 32, 2048
MOST_THREADS = 32  # that check a cache


@dataclass(frozen=True)
class Plan:
    """How a run is organised. The defaults are what is built."""

    decoder: str = "dali"
    """dali (on the GPU) or turbo (on the node's cores)."""
    list_dealt_out: bool = False
    """Whether a rank lists, checks and remembers its part of the photos; else the first lists and checks them all."""
    caches_apart: bool = False
    """Whether each rank appends to a cache of its own; else all take turns with one."""
    dealt_once: bool = False
    """Whether a rank keeps its part of the photos for all epochs; else it gets another one each time."""


@dataclass(frozen=True)
class Part:
    """Seconds of a stage of a run, and what they are spent on."""

    stage: str
    cause: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """Run from the start of the command, nothing decoded, to its end."""

    photos: int
    gpus: int
    batch: int
    """Photos of a step on all GPUs together."""
    memory: str
    """Where the pixels are: resident, sharded (this epoch's part on each device), mapped or stream."""
    parts: list[Part]
    check: float
    """Seconds that opening a finished cache takes instead of decoding."""
    images_per_second: float
    """Training rate."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(part.seconds for part in self.parts)

    @property
    def again(self) -> float:
        """Seconds of the same run with the cache there."""
        return self.seconds - self.of("stage", "decode") + self.check

    def of(self, what: str, name: str) -> float:
        """Return the seconds of a stage, or of a cause."""
        return sum(part.seconds for part in self.parts if getattr(part, what) == name)

    @property
    def bottleneck(self) -> str:
        """Cause that most of the seconds are spent on."""
        return max((part.cause for part in self.parts), key=lambda cause: self.of("cause", cause))


AS_BUILT = Plan()
ALL_BUILT = Plan("turbo", list_dealt_out=True, caches_apart=True, dealt_once=True)


def list_fits(photos: int, gpus: int, rates: Values, plan: Plan = AS_BUILT) -> bool:
    """Return whether the ranks of a machine can each remember the photos that they have to."""
    each = rates["index"] * photos / (gpus if plan.list_dealt_out else 1)
    return each * min(gpus, GPUS_PER_NODE) <= 0.8 * rates["host_memory"]


def batch_of(photos: int, gpus: int, epochs: int = EPOCHS) -> int:
    """Return the batch of all GPUs: as large as still leaves as many updates as the reference run makes."""
    return round(min(max(SMALLEST, photos * (1 - VAL_FRACTION) * epochs / UPDATES), LARGEST_A_GPU * max(1, gpus)))


def run(photos: int, gpus: int, rates: Values, plan: Plan = AS_BUILT, *, epochs: int = EPOCHS, batch: int = 0) -> Run:
    """Return a run's parts.

    Args:
        photos: photos of the set, four fifths of them trained on.
        gpus: GPUs, up to eight a machine; 0 is the two measured cores.
        rates: what `rate_values` returns.
        plan: how the run is organised.
        epochs: epochs.
        batch: photos of a step on all GPUs together; 0 is what `batch_of` says.
    """
    ranks, nodes = max(1, gpus), nodes_of(max(1, gpus))
    batch = batch or batch_of(photos, gpus, epochs)
    share, pixels = photos / ranks, photos * PHOTO_BYTES
    storage = min(nodes * rates["storage_node"], rates["storage_all"])  # all nodes together
    disk_read, disk_write = (rates["disk_read"], rates["disk_write"]) if nodes == 1 else (storage, storage)
    on_cpu = rates["cpu_decode"] * (rates["cores"] if gpus else 2)
    decode_rate = rates["gpu_decode"] if gpus and plan.decoder == "dali" else on_cpu  # photos/s a rank
    memory = _memory(pixels, gpus, rates)
    written = pixels * (memory != "stream")
    decode = _longest(
        decode=share / decode_rate,
        storage=max(photos * rates["jpeg"] / storage, written / disk_write),
        append=written / rates["append"] / (ranks if plan.caches_apart else 1),
    )

    loads = 1 if plan.dealt_once else epochs
    # A node's part is another one each epoch: its memory helps where it holds the whole set.
    reads = 1 if pixels <= 0.8 * rates["host_memory"] else loads
    load, feed = ("loader", 0.0), ("none", 0.0)  # feed: seconds a photo of one rank
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

    one = step(batch / ranks, gpus, rates, feed=feed[1])
    steps = max(1, int(photos * (1 - VAL_FRACTION) / batch)) * epochs
    spent = {name: getattr(one, name) for name in ("launches", "compute", "stragglers", "exchange")}
    if one.feed >= sum(spent.values()):
        spent = {feed[0]: one.feed}
    forward = {"launches" if one.launches else "compute": (one.launches + one.compute) / (batch / ranks)}
    scored = _longest(**{feed[0]: feed[1]}, **{name: rates["evaluate"] * value for name, value in forward.items()})
    start = rates["start"] + (rates["start_gpu"] if gpus else 0) + (3 + rates["join"] * ranks) * (ranks > 1)
    listed = share if plan.list_dealt_out else photos
    parts = [
        Part("start", "start-up", start),
        Part("list", "list", listed / rates["scan"] + (listed / rates["journal"] if ranks > 1 else 0)),
        Part("decode", *decode),
        Part("load", *load),
        *(Part("train", cause, seconds * steps) for cause, seconds in spent.items()),
        Part("evaluate", scored[0], scored[1] * epochs * share * VAL_FRACTION),
        Part("checkpoint", "checkpoint", epochs * rates["checkpoint"]),
    ]
    check = _check_seconds(written, gpus, rates, plan)
    return Run(photos, gpus, batch, memory, parts, check, batch / one.seconds)


def _check_seconds(pixels: float, gpus: int, rates: Values, plan: Plan) -> float:
    """Return the seconds of opening a finished cache of so many bytes: every row is read and checked."""
    nodes = nodes_of(max(1, gpus))
    threads = min(MOST_THREADS, rates["cores"] * min(gpus, GPUS_PER_NODE)) if gpus else 2
    checking = nodes if plan.list_dealt_out else 1
    storage = min(nodes * rates["storage_node"], rates["storage_all"])
    from_disk = rates["disk_read"] if nodes == 1 else min(checking * rates["storage_node"], storage)
    return pixels / min(checking * threads * rates["check"], from_disk)


def _memory(pixels: float, gpus: int, rates: Values) -> str:
    """Return where the pixels of a set are while it is trained on."""
    device = rates["memory"] * 0.8
    if pixels <= device or not gpus:
        return "resident"
    if nodes_of(gpus) == 1 and pixels > rates["disk"]:
        return "stream"
    return "sharded" if pixels / gpus <= device else "mapped"


def _longest(**seconds: float) -> tuple[str, float]:
    """Return the longest of things that happen at once, and its seconds."""
    return max(seconds.items(), key=lambda item: item[1])


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
    num_stages, jitter = len(stages), jitter or [0.0] * len(stages)
    left = np.zeros((depth, num_stages, ranks))  # when each stage was done with the last `depth` batches
    for batch in range(num_batches):
        place, before = batch % depth, left[(batch - 1) % depth].copy()
        freed = left[place].copy()  # batch - depth: a stage writes where the next one was done reading
        handed = np.zeros(ranks)
        for stage, seconds in enumerate(stages):
            start = np.maximum(handed, before[stage])
            if stage + 1 < num_stages:
                start = np.maximum(start, freed[stage + 1])
            handed = start + seconds * np.maximum(0, 1 + jitter[stage] * random.standard_normal(ranks))
            if stage + 1 == num_stages and exchange is not None:
                handed = np.full(ranks, handed.max() + exchange)
            left[place, stage] = handed
    return float(left.max())


PHOTOS = [10**power for power in range(3, 10)]
GPUS = [1, 8, 64, 1000]
CELLS = [(10**4, 1), (10**6, 8), (10**7, 8), (10**8, 64), (10**9, 1000)]  # what the smaller tables are about
STAGES = ("start", "list", "decode", "load", "train", "evaluate")
TOO_FEW, TOO_MANY = "too few photos", "the list does not fit"


def filled(text: str) -> str:
    """Return a text with every marked table made anew."""
    return fill(text, lambda name: f"\n{TABLES[name](rate_values())}\n")


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def dollars(run: Run, price: float) -> str:
    """Return the price of a run's GPUs."""
    cost = run.seconds / 3600 * run.gpus * price
    return f"${cost:,.0f}" if cost >= 10 else f"${cost:.2f}"


def run_of(photos: int, gpus: int, rates: Values, plan: Plan = AS_BUILT) -> Run | str:
    """Return a run, or why there can be none."""
    if batch_of(photos, gpus) < gpus:
        return TOO_FEW
    return run(photos, gpus, rates, plan) if list_fits(photos, gpus, rates, plan) else TOO_MANY


def with_threads(rates: Values) -> dict[str, float]:
    """Return the rates of a loader that reads rows by several threads."""
    return {**rates, **{name: rate_table()[name].high for name in ("row_read", "upload")}}


def _grid(cell: Callable[[Run], str], rates: Values, plan: Plan = AS_BUILT) -> str:
    """Return a table over photos and GPUs."""
    lines = []
    for photos in PHOTOS:
        found = [run_of(photos, gpus, rates, plan) for gpus in GPUS]
        lines.append([f"{photos:,}", *(one if isinstance(one, str) else cell(one) for one in found)])
    return markdown(["photos", *(f"{gpus:,} GPU{'s' * (gpus > 1)}" for gpus in GPUS)], lines)


def _rates(rates: Values) -> str:
    def number(value: float) -> str:
        text = f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.2g}" if value < 1 else f"{value:.3g}"
        return re.sub(r"e([+-])0?", lambda match: "e" + match[1].strip("+"), text)

    head = ["rate", "value", "low", "high", "unit", "", "source"]
    lines = [
        [name, *map(number, (rate.value, rate.low, rate.high)), rate.unit, rate.kind, rate.source]
        for name, rate in rate_table().items()
    ]
    return markdown(head, lines)


def _sizes(rates: Values) -> str:
    def size(num_bytes: float) -> str:
        power = min(int(math.log10(num_bytes)) // 3, 4)
        return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"

    lines = []
    for photos in PHOTOS:
        jpeg, pixels, index = (photos * each for each in (rates["jpeg"], PHOTO_BYTES, rates["index"]))
        month = (jpeg + pixels) / 1e9 * rates["keep"]
        lines.append([f"{photos:,}", *map(size, (jpeg, pixels, index)), f"${month:,.2f}"])
    head = ["photos", "JPEGs", "cache", "index in memory, each rank", "JPEGs and cache kept for a month"]
    return markdown(head, lines)


def _map(rates: Values, plan: Plan = AS_BUILT) -> str:
    """How long a run takes, what it costs and what most of the time is spent on."""
    return _grid(lambda run: f"{duration(run.seconds)}, {dollars(run, rates['price'])}: {run.bottleneck}", rates, plan)


def _built(rates: Values) -> str:
    return _map(with_threads(rates), ALL_BUILT)


def _epochs(rates: Values) -> str:
    """Once the photos are decoded and loaded: seconds an epoch and what they are spent on."""

    def cell(run: Run) -> str:
        stages = ("load", "train") if run.memory == "sharded" else ("train",)
        parts = [part for part in run.parts if part.stage in stages]
        seconds = sum(part.seconds for part in parts) / EPOCHS
        return f"{duration(seconds)}: {max(parts, key=lambda part: part.seconds).cause}"

    return _grid(cell, rates)


def _runs(rates: Values) -> str:
    lines = []
    for photos in PHOTOS:
        alone = run(photos, 1, rates)
        for gpus in GPUS:
            one = run_of(photos, gpus, rates)
            if isinstance(one, str):
                continue
            lines.append([f"{photos:.0e}".replace("e+0", "e"), f"{gpus:,}", f"{one.batch:,}", one.memory])
            times = [*(one.of("stage", stage) for stage in STAGES), one.seconds, one.again]
            lines[-1] += [*map(duration, times), f"{one.images_per_second:,.0f}"]
            lines[-1] += [f"{alone.seconds / gpus / one.seconds:.2g}", dollars(one, rates["price"])]
    head = ["photos", "GPUs", "batch", "pixels", *STAGES, "all", "again", "images/s", "efficiency", "cost"]
    return markdown(head, lines)


def _step(rates: Values) -> str:
    lines = []
    for batch in (4, 32, 256, 2048):
        alone, cells = step(batch, 1, rates).seconds, []
        for gpus in GPUS[1:]:
            both, apart = (step(batch, gpus, rates, sync_batch_norm=sync) for sync in (True, False))
            speed = f"{alone / both.seconds:.2f} ({alone / apart.seconds:.2f})"
            cells.append(f"{both.seconds * 1e6:,.0f} us, of which {both.exchange * 1e6:,.0f} exchange: {speed}")
        lines.append([f"{batch:,}", f"{alone * 1e6:,.0f} us", *cells])
    return markdown(["batch a GPU", "1 GPU", *(f"{gpus:,} GPUs" for gpus in GPUS[1:])], lines)


def _simulated(rates: Values) -> str:
    """A batch's time by the model and by the simulation, over 200 batches."""
    lines, jitter = [], rates["jitter"]

    def add(
        what: str, ranks: int, stages: list[float], model: float, depth: int = 2, batches: int = 1, **how: Any
    ) -> None:
        took = simulate(stages, 200 * batches, ranks=ranks, depth=depth, **how) / 200
        micro = [f"{seconds * 1e6:,.0f} us" for seconds in (model, took)]
        lines.append([what, f"{ranks:,}", str(depth), *micro, f"{took / model:.2f}"])

    for gpus in GPUS:
        one = step(256, gpus, rates)
        how: dict[str, Any] = {"exchange": one.exchange, "jitter": [jitter]}
        add("steps of 256 photos a GPU", gpus, [one.compute], one.seconds, **how)
    for gpus in GPUS[2:]:
        one, parts = step(256, gpus, rates), 1 + 2 * len(FILTERS)
        how = {"exchange": one.exchange / parts, "jitter": [jitter * parts**0.5]}
        what = f"the same in {parts} parts, each as uncertain by itself, an exchange after each"
        add(what, gpus, [one.compute / parts], one.seconds, batches=parts, **how)
    for gpus, depth in ((1, 2), (64, 2), (64, 8), (1000, 8)):
        one = step(2048, gpus, rates)
        how = {"exchange": one.exchange, "jitter": [0.5, jitter]}
        what = "steps of 2,048, a loader that takes 0.8 of a step, give or take 0.4"
        add(what, gpus, [0.8 * one.seconds, one.compute], one.seconds, depth, **how)
    one = step(2048, 8, rates, feed=PHOTO_BYTES / rates["row_read"])
    add("steps of 2,048, mapped", 8, [one.feed, one.compute], one.seconds, exchange=one.exchange)
    chunk = [512 * rates["jpeg"] * 8 / rates["storage_node"], 512 / rates["gpu_decode"]]
    chunk.append(512 * PHOTO_BYTES * 8 / rates["disk_write"])
    add("512 photos read, decoded, written to the cache", 8, chunk, max(chunk))
    return markdown(["what", "ranks", "batches buffered", "model", "simulated", "ratio"], lines)


def _measured(rates: Values) -> str:
    """The model of two cores against the published runs, from the start of the command to its end."""
    lines = []
    for row in read(PUBLISHED).rows:
        info = row["extra_info"]
        if row["group"] != "train" and info.get("grows") != "photos":
            continue
        epochs = info.get("epochs", 1)
        took = info["stages"].get("cold", info["stages"])
        model = run(info["num_photos"], 0, rates, epochs=epochs, batch=32)
        pairs = [(model.seconds, took["start"] + took["total"])]
        pairs += [(model.of("stage", stage), took[stage]) for stage in ("decode", "train")]
        cells = [f"{ours:.1f} / {theirs:.1f} = {ours / theirs:.2f}" for ours, theirs in pairs]
        lines.append([f"{info['num_photos']:,}", str(epochs), *cells, str(row["n"])])
    return markdown(["photos", "epochs", "all, s: model / measured", "decode", "train", "n"], lines)


def _sensitivity(rates: Values) -> str:
    """Effect of halving and doubling a rate on runs and a step: the rates that change one of them by a tenth."""

    def found(changed: Values) -> list[Run | Step]:
        runs = [run(*cell, changed) for cell in CELLS[:-1]]
        return [*runs, run(*CELLS[-1], changed, ALL_BUILT), step(256, 64, changed)]

    def over(after: Run | Step, before: Run | Step) -> str:
        moved = "" if after.bottleneck == before.bottleneck else f" ({after.bottleneck})"
        return f"{after.seconds / before.seconds:.2f}{moved}"

    plain, lines = found(rates), []
    for name, value in rates.items():
        pairs = zip(plain, found({**rates, name: value / 2}), found({**rates, name: value * 2}), strict=True)
        cells = [[over(one, before) for one in both] for before, *both in pairs]
        if any(abs(float(text.split()[0]) - 1) >= 0.1 for both in cells for text in both):
            lines.append([name, *(", ".join(both) for both in cells)])
    said = [_said(run_of(*cell, rates)) for cell in CELLS[:-1]]
    said.append(_said(run_of(*CELLS[-1], rates, ALL_BUILT)) + ", four changes built")
    last = f"step, 256 a GPU on 64: {step(256, 64, rates).seconds * 1e6:,.0f} us, exchange"
    return markdown(["halved, doubled", *_heads(said), last], lines)


def _heads(said: list[str]) -> list[str]:
    return [f"{photos:,} on {gpus:,}: {text}" for (photos, gpus), text in zip(CELLS, said, strict=True)]


def _said(run: Run | str) -> str:
    return run if isinstance(run, str) else f"{duration(run.seconds)}, {run.bottleneck}"


def _changes(rates: Values) -> str:
    """Effect of what could be bought or built, on some runs."""
    threads, storage = with_threads(rates), {name: 4 * rates[name] for name in ("storage_node", "storage_all")}
    rows: dict[str, tuple[Values, Plan]] = {
        "`--decoder turbo`: decoded by the node's cores": (rates, Plan(decoder="turbo")),
        "rows read by threads, 16 GB/s a rank": (threads, AS_BUILT),
        "each rank appends to a cache of its own": (rates, Plan(caches_apart=True)),
        "each rank lists and checks its share": (rates, Plan(list_dealt_out=True)),
        "photos dealt out once a run": (rates, Plan(dealt_once=True)),
        "all five": (threads, ALL_BUILT),
        "storage four times as fast": ({**rates, **storage}, AS_BUILT),
        "all six": ({**threads, **storage}, ALL_BUILT),
    }
    lines = [[what, *(_said(run_of(*cell, *how)) for cell in CELLS)] for what, how in rows.items()]
    return markdown(["changed", *_heads([_said(run_of(*cell, rates)) for cell in CELLS])], lines)


TABLES: dict[str, Callable[[Values], str]] = {
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

PICTURE_GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
COLOURS = {
    "start-up": "#d9d9d9",
    "list": "#b8a2d8",
    "decode": "#f4a35c",
    "append": "#c9a26b",
    "loader": "#f6d55c",
    "storage": "#d1605e",
    "compute": "#7fbf7b",
    "launches": "#a8c8e8",
    "exchange": "#4a7fb5",
}


def draw(path: Path) -> None:
    """Draw how long a run takes and what its time is spent on, over photos and GPUs: as built, and with more built."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch
    from PIL import Image

    rates = rate_values()
    figure, panels = plt.subplots(2, figsize=(9, 8), sharex=True)
    panels[0].set_title("as built", loc="left", fontsize=10)
    panels[1].set_title("with the five changes that docs/scale.md names", loc="left", fontsize=10)
    used = _panel(panels[0], rates, AS_BUILT) | _panel(panels[1], with_threads(rates), ALL_BUILT)
    panels[1].set_xlabel("GPUs")
    patches = [Patch(color=colour, label=cause) for cause, colour in COLOURS.items() if cause in used]
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.96), ncols=len(patches), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=96, bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)


def _panel(axes: Any, rates: Values, plan: Plan) -> set[str]:
    """Draw one; return the causes in it."""
    from matplotlib.patches import Rectangle

    used = set()
    for y, photos in enumerate(PHOTOS):
        for x, count in enumerate(PICTURE_GPUS):
            one, colour, text = run_of(photos, count, rates, plan), "white", "-"
            if not isinstance(one, str):
                used.add(one.bottleneck)
                colour = COLOURS.get(one.bottleneck, "#eeeeee")
                text = f"{duration(one.seconds)}\n{dollars(one, rates['price'])}"
            axes.add_patch(Rectangle((x, y), 1, 1, fc=colour, ec="white"))
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, len(PICTURE_GPUS)), ylim=(0, len(PHOTOS)), ylabel="photos")
    axes.set_xticks([x + 0.5 for x in range(len(PICTURE_GPUS))], [f"{count:,}" for count in PICTURE_GPUS])
    axes.set_yticks([y + 0.5 for y in range(len(PHOTOS))], [f"$10^{power}$" for power in range(3, 10)])
    axes.tick_params(length=0)
    return used


def main(arguments: list[str]) -> int:
    """Print the tables, or write them into docs/scale.md; return the exit code."""
    if arguments not in ([], ["--write"]):
        print(f"scale: error: expected --write or nothing, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if not arguments:
        for name, make in TABLES.items():
            print(f"{name}\n\n{make(rate_values())}")
        return 0
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    draw(DOCUMENT.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
