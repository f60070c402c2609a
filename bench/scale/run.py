"""Model of a whole run on N photos and G GPUs: seconds, bottleneck and cost of its stages."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from bench.scale.rates import PHOTO_BYTES, Values
from bench.scale.step import GPUS_PER_NODE, nodes_of, step

EPOCHS = 10
VAL_FRACTION = 0.2
UPDATES = 2500  # of the reference run: 8,000 photos, 10 epochs, batches of 32
SMALLEST, LARGEST_A_GPU = 32, 2048
MOST_THREADS = 32  # that check a cache


@dataclass(frozen=True)
class Plan:
    """How a run is organised. The defaults are what is built."""

    decoder: str = "dali"  # on the GPU; turbo: on the node's cores
    list_dealt_out: bool = False  # a rank reads and remembers its part of the list; else each has all of it
    dealt_once: bool = False  # a rank keeps its part of the photos for all epochs; else it gets another one each time


AS_BUILT = Plan()
ALL_BUILT = Plan("turbo", list_dealt_out=True, dealt_once=True)


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
        append=written / rates["append"] / ranks,
    )
    stages = {
        "start": {"start-up": rates["start"] + (rates["start_gpu"] if gpus else 0) + joined},
        "list": {"list": share / rates["scan"] + (listed / rates["journal"] if ranks > 1 else 0)},
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


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"
