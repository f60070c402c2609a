"""What a run would take and cost with N photos on G GPUs: a model of its stages, from the rates of bench/rates.py.

python -m bench.scale            # prints the tables
python -m bench.scale --write    # and puts them into docs/scale.md, with its picture
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from bench.rates import PHOTO_BYTES
from bench.scale_step import A_NODE, Values, nodes_of, step

EPOCHS = 10
VAL_FRACTION = 0.2
UPDATES = 2500  # what the reference run makes: 8,000 photos, 10 epochs, batches of 32
SMALLEST, LARGEST_A_GPU = 32, 2048
MOST_THREADS = 32  # that check a cache


@dataclass(frozen=True)
class Plan:
    """How a run goes about it. The defaults are what is built."""

    decoder: str = "dali"
    """dali (on the GPU) or turbo (on the node's cores)."""
    list_dealt_out: bool = False
    """Whether a rank lists, checks and remembers its share of the photos; else the first lists and checks them all."""
    caches_apart: bool = False
    """Whether each rank appends to a cache of its own; else all take turns with one."""
    dealt_once: bool = False
    """Whether a rank keeps its share of the photos for all epochs; else it gets another one each time."""


@dataclass(frozen=True)
class Part:
    """Seconds of a stage of a run, and what they are spent on."""

    stage: str
    cause: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run, from the start of the command, nothing decoded, to its end."""

    photos: int
    gpus: int
    batch: int
    """Of all GPUs together."""
    memory: str
    """Where the pixels are: resident, sharded (this epoch's share on each device), mapped or stream."""
    parts: list[Part]
    check: float
    """Seconds that opening a finished cache takes instead of decoding."""
    images_per_second: float
    """While it trains."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(part.seconds for part in self.parts)

    @property
    def again(self) -> float:
        """Seconds of the same with the cache there."""
        return self.seconds - self.of("stage", "decode") + self.check

    def of(self, what: str, name: str) -> float:
        """Return the seconds of a stage, or of a cause."""
        return sum(part.seconds for part in self.parts if getattr(part, what) == name)

    @property
    def bottleneck(self) -> str:
        """What most of the seconds are spent on."""
        return max((part.cause for part in self.parts), key=lambda cause: self.of("cause", cause))


AS_BUILT = Plan()
ALL_BUILT = Plan("turbo", list_dealt_out=True, caches_apart=True, dealt_once=True)


def list_fits(photos: int, gpus: int, rates: Values, plan: Plan = AS_BUILT) -> bool:
    """Return whether the ranks of a machine can each remember the photos that they have to."""
    each = rates["index"] * photos / (gpus if plan.list_dealt_out else 1)
    return each * min(gpus, A_NODE) <= 0.8 * rates["host_memory"]


def batch_of(photos: int, gpus: int, epochs: int = EPOCHS) -> int:
    """Return the batch of all GPUs: as large as still leaves as many updates as the reference run makes."""
    return round(min(max(SMALLEST, photos * (1 - VAL_FRACTION) * epochs / UPDATES), LARGEST_A_GPU * max(1, gpus)))


def run(photos: int, gpus: int, rates: Values, plan: Plan = AS_BUILT, *, epochs: int = EPOCHS, batch: int = 0) -> Run:
    """Return a run's parts.

    Args:
        photos: photos of the set, four fifths of them trained on.
        gpus: GPUs, up to eight a machine; 0 is the two measured cores.
        rates: values of bench/rates.py.
        plan: how it is done.
        epochs: epochs.
        batch: of all GPUs together; 0 is what `batch_of` says.
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
    # A node's share is another one each epoch: its memory helps where it holds the whole set.
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
    threads = min(MOST_THREADS, rates["cores"] * min(gpus, A_NODE)) if gpus else 2
    checking = nodes if plan.list_dealt_out else 1
    from_disk = rates["disk_read"] if nodes == 1 else min(checking * rates["storage_node"], storage)
    check = pixels / min(checking * threads * rates["check"], from_disk) if written else 0.0
    return Run(photos, gpus, batch, memory, parts, check, batch / one.seconds)


def _memory(pixels: float, gpus: int, rates: Values) -> str:
    """Return where the pixels of a set are while it is trained on."""
    device = rates["memory"] * 0.8
    if pixels <= device or not gpus:
        return "resident"
    if nodes_of(gpus) == 1 and pixels > rates["disk"]:
        return "stream"
    return "sharded" if pixels / gpus <= device else "mapped"


def _longest(**seconds: float) -> tuple[str, float]:
    """Return what takes longest of things that happen at once, and its seconds."""
    return max(seconds.items(), key=lambda item: item[1])


def main(arguments: list[str]) -> int:
    """Print the tables, or write them into docs/scale.md; return the exit code."""
    from bench import scale_picture, scale_tables

    if arguments not in ([], ["--write"]):
        print(f"scale: error: expected --write or nothing, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if not arguments:
        for name, make in scale_tables.TABLES.items():
            print(f"{name}\n\n{make()}")
        return 0
    document = scale_tables.DOCUMENT
    document.write_text(scale_tables.filled(document.read_text(encoding="utf-8")), encoding="utf-8")
    scale_picture.draw(document.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
