"""The run's configuration: one field a hyperparameter, validated, read from options, recipes and YAML files."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from typing import Any, Literal, get_type_hints

from fastcnn.config.coerce import Bytes, Interval, check, coerce, coerce_scalar
from fastcnn.errors import UsageError, nearest

Activation = Literal["relu", "gelu", "silu", "mish", "elu", "leaky_relu", "selu", "tanh"]
Augmentation = Literal["flip", "shift", "crop", "rotate", "colour", "cutout", "mixup", "cutmix"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine", "step", "onecycle"]
Balance = Literal["none", "weights", "sampling"]
Engine = Literal[
    "auto",
    "eager",
    "compiled",
    "fused",
    "fused+compiled",
    "graphed",
    "compiled+graphed",
    "fused+graphed",
    "fused+compiled+graphed",
]
Precision = Literal["auto", "fp64", "fp32", "tf32", "bf16", "fp16"]
Loader = Literal["auto", "resident", "shared", "sharded", "mapped", "stream"]
Decoder = Literal["auto", "dali", "turbo", "pillow"]
Export = Literal["torchscript", "onnx", "pt2"]
Wandb = Literal["auto", "online", "offline", "disabled"]
OnNan = Literal["stop", "skip"]
LrScaling = Literal["none", "sqrt", "linear"]


EVERY_FIVE_MINUTES = Interval("5m")
NUM_BLOCKS = 5
MIN_IMAGE_SIZE = 2**NUM_BLOCKS  # every block halves the side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run. The line under each field is its `--help`."""

    data: str = ""
    """Folder of photos: DATA/<class>/..., or DATA/train/<class>/... with val and test folders."""

    epochs: int = 10
    """Passes over the training photos."""
    batch_size: int = 32
    """Photos a step, of all devices together."""
    optimizer: Optimizer = "adam"
    """What updates the weights."""
    lr: float = 1e-3
    """Learning rate: the highest, where a schedule changes it."""
    lr_scaling: LrScaling = "none"
    """What the learning rate is multiplied by where the batch size is not 32: 1, or their ratio, or its root."""
    momentum: float = 0.9
    """Momentum of sgd (Nesterov's)."""
    weight_decay: float = 0.0
    """Decay of the weights of convolutions and dense layers: decoupled by adamw, in the gradient by the others."""
    schedule: Schedule = "constant"
    """How the learning rate changes from step to step."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from 0; onecycle has a rise of its own, the first 30%."""
    decay_epochs: float | None = None
    """Epochs between two drops of the step schedule; left out, a third of them all."""
    decay_rate: float = 0.1
    """What the step schedule multiplies the learning rate by."""
    augment: tuple[str, ...] = ()
    """Random changes to the training photos: none, light, strong, or a list as flip,rotate=20 (name=strength)."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    balance: Balance = "none"
    """What makes up for classes of unequal size: weights in the loss, or sampling rare classes more often."""
    patience: int | None = None
    """Epochs without a better validation accuracy after which the run ends; left out, it never ends early."""
    limit_train_batches: int | None = None
    """Steps an epoch at most, for a dry run; left out, all."""
    init_from: str | None = None
    """A run or checkpoint whose weights to begin with; its output layer only where the number of classes agrees."""
    clip_norm: float | None = None
    """Largest norm of a step's gradient; left out, no limit."""
    on_nan: OnNan = "stop"
    """What a step whose loss is not a finite number does: end the run, or be left out and counted."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is evaluated and exported, as 0.999; 0 for none."""
    seed: int = 0
    """Seed of the split, the initial weights and the order of the photos."""

    image_size: int = 128
    """Side, in pixels, that photos are resized to (32 or more)."""
    cache_size: int | None = None
    """Side that photos are kept at, where larger: crops and turns then lose less; left out, the image size."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each colour channel (0 to 1), subtracted from the pixels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each colour channel, that the pixels are divided by."""
    filters: tuple[int, ...] = (32, 32, 32, 32, 32)
    """Filters of the five convolutions, as 32,64,128,256,512; one number stands for all five."""
    kernel_size: int = 3
    """Side of the convolutions' kernels (odd)."""
    activation: Activation = "relu"
    """Activation after each convolution and the dense layer."""
    batch_norm: bool = True
    """Batch norm at the end of each block."""
    dense_neurons: int = 128
    """Neurons of the dense layer."""
    dropout: float = 0.0
    """Probability of dropout before the output layer."""

    val_fraction: float = 0.2
    """Share of the training photos held out for validation."""
    split: str | None = None
    """A split.csv of an earlier run to use as it is."""
    max_bad: float = 0.05
    """Share of unusable photos above which the run stops."""
    max_pixels: int = 178_956_970
    """Pixels above which a photo is not used; its header is asked, nothing is decoded."""

    engine: Engine = "auto"
    """How the training step is run; auto measures."""
    precision: Precision = "auto"
    """Arithmetic of the network; auto is bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU; fp64 is
    for comparisons."""
    loader: Loader = "auto"
    """Where pixels come from while training: the device's memory (sharded: each of several has its part of an epoch),
    memory that all runs on a CPU share, the cache on disk, or the files, decoded each time; auto is resident, sharded,
    mapped or stream, the first that has room."""
    memory_limit: Bytes | None = None
    """Memory that the photos may take, as 2GB or 500MB; left out, 60% of what is free on a GPU, 50% of it on a CPU."""
    decoder: Decoder = "auto"
    """What decodes the photos; auto is DALI on a GPU, else turbo, else Pillow."""
    device: str = "auto"
    """cpu, cuda, cuda:N or mps; auto is the first of cuda, mps and cpu that is there."""
    devices: int = 1
    """GPUs of this machine, or processes on its CPU, that share each batch; torchrun says it where it starts them."""
    sync_batch_norm: bool = True
    """Batch norm by the statistics of the whole batch, not of each device's share."""
    workers: int | None = None
    """Decoding threads; left out, one a core."""
    threads: int | None = None
    """Arithmetic threads on a CPU; left out, one a core."""
    cache_dir: str | None = None
    """Where decoded photos are kept; left out, the user's cache folder."""
    deterministic: bool = False
    """Repeat to the bit: fp32 and deterministic algorithms (on a CPU with the same --threads)."""
    checkpoint_every: Interval | None = EVERY_FIVE_MINUTES
    """How often last.pt is saved within an epoch, in steps as 200 or in time as 30s; none only at an epoch's end."""
    report: bool = True
    """Draw the pictures and the page of the run folder at the end."""
    export: tuple[Export, ...] = ()
    """Formats that the best model is exported to when training ends, as torchscript,onnx,pt2; none for none."""
    wandb: Wandb = "auto"
    """Where W&B records the run; auto is WANDB_MODE, else online when logged in, else offline in the run's folder."""
    wandb_project: str | None = None
    """Project in W&B; left out, WANDB_PROJECT, else fastcnn."""
    strict: bool = False
    """Make every fallback an error."""

    def __post_init__(self) -> None:
        """Coerce every field to its type and check its range."""
        for name, kind in field_types().items():
            object.__setattr__(self, name, coerce(name, kind, getattr(self, name)))
        object.__setattr__(self, "augment", _augmentations(self.augment))
        if len(self.filters) == 1:
            object.__setattr__(self, "filters", self.filters * NUM_BLOCKS)
        check("epochs", self.epochs, self.epochs >= 1, "1 or more")
        check("batch_size", self.batch_size, self.batch_size >= 2, "2 or more")
        check("lr", self.lr, 0 < self.lr < float("inf"), "a number above 0")
        check("momentum", self.momentum, 0 <= self.momentum < 1, "0 to below 1")
        check("weight_decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "0 or more")
        check("warmup_epochs", self.warmup_epochs, 0 <= self.warmup_epochs < float("inf"), "0 or more")
        check("decay_epochs", self.decay_epochs, self.decay_epochs is None or self.decay_epochs > 0, "above 0")
        check("decay_rate", self.decay_rate, 0 < self.decay_rate <= 1, "above 0, up to 1")
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "0 to below 1")
        check("patience", self.patience, self.patience is None or self.patience >= 1, "1 or more")
        limit = self.limit_train_batches
        check("limit_train_batches", limit, limit is None or limit >= 1, "1 or more")
        check("clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "a number above 0")
        check("ema", self.ema, 0 <= self.ema < 1, "0 to below 1")
        check("seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1")
        check("image_size", self.image_size, MIN_IMAGE_SIZE <= self.image_size <= 4096, "32 to 4096")
        cache_size = self.cache_size
        ok = cache_size is None or self.image_size <= cache_size <= 4096
        check("cache_size", cache_size, ok, f"the image size ({self.image_size}) to 4096")
        check("mean", self.mean, len(self.mean) == 3, "three numbers")
        check("std", self.std, len(self.std) == 3 and min(self.std) > 0, "three numbers above 0")
        check(
            "filters", self.filters, len(self.filters) == NUM_BLOCKS and min(self.filters) > 0, "five numbers above 0"
        )
        check("kernel_size", self.kernel_size, self.kernel_size % 2 == 1 and self.kernel_size > 0, "an odd number")
        check("dense_neurons", self.dense_neurons, self.dense_neurons >= 1, "1 or more")
        check("dropout", self.dropout, 0 <= self.dropout < 1, "0 to below 1")
        check("val_fraction", self.val_fraction, 0 < self.val_fraction < 1, "a share between 0 and 1")
        check("max_bad", self.max_bad, 0 <= self.max_bad <= 1, "a share from 0 to 1")
        check("max_pixels", self.max_pixels, self.max_pixels >= 1, "1 or more")
        check("devices", self.devices, self.devices >= 1, "1 or more")
        if self.batch_size % self.devices:
            nearest_multiple = max(1, round(self.batch_size / self.devices)) * self.devices
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be shared by {self.devices} devices: give {nearest_multiple}"
            )
        mixes = {name for name, _ in self.augmentations} & {"mixup", "cutmix"}
        if mixes and self.devices > 1 and self.batch_size // self.devices % 2:
            raise UsageError(
                f"--augment {min(mixes)} takes photos in pairs: with {self.devices} devices, "
                f"--batch-size must be a multiple of {2 * self.devices}"
            )
        check("workers", self.workers, self.workers is None or self.workers >= 1, "1 or more")
        check("threads", self.threads, self.threads is None or self.threads >= 1, "1 or more")
        kind = self.device.partition(":")[0]
        check("device", self.device, kind in DEVICES, f"one of {', '.join(DEVICES)}{nearest(kind, DEVICES)}")
        if self.deterministic and self.precision not in ("auto", "fp32", "fp64"):
            raise UsageError("--deterministic needs --precision fp32 (or auto): 16-bit sums need not repeat to the bit")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, as they are written to config.yaml and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def decoded_size(self) -> int:
        """Side, in pixels, that photos are decoded to."""
        return self.cache_size or self.image_size

    @property
    def augmentations(self) -> list[tuple[str, float]]:
        """Name and strength of each augmentation."""
        return [(name, float(strength)) for name, _, strength in (item.partition("=") for item in self.augment)]


STRENGTHS: dict[Augmentation, tuple[float, float]] = {
    "flip": (0.5, 1),  # probability
    "shift": (0.0625, 0.5),  # share of the side, at most: 8 pixels of 128
    "crop": (0.35, 1),  # share of the area, at least
    "rotate": (15, 180),  # degrees, at most
    "colour": (0.3, 1),  # change of brightness, contrast and saturation, at most
    "cutout": (0.25, 1),  # share of the side
    "mixup": (0.2, 100),  # both parameters of the Beta distribution that the shares are drawn from
    "cutmix": (1, 100),  # likewise
}
"""What each augmentation's strength is when none is given, and at most."""

PRESETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "light": ("flip", "shift"),
    "strong": ("flip", "crop", "colour"),
}
"""Lists of augmentations with a name."""

DEVICES = ("auto", "cpu", "cuda", "mps")


@functools.cache
def field_types() -> dict[str, Any]:
    """Return the type of each field of Config."""
    hints = get_type_hints(Config)
    return {field.name: hints[field.name] for field in dataclasses.fields(Config)}


@functools.cache
def field_docs() -> dict[str, str]:
    """Return the docstring under each field of Config."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(Config))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = str(doc.value.value)
    return docs


def _augmentations(items: tuple[str, ...]) -> tuple[str, ...]:
    """Return augmentations as name=strength, presets written out."""
    items = tuple(PRESETS[items[0]] if len(items) == 1 and items[0] in PRESETS else items)
    found = {}
    for item in items:
        name, equals, strength = item.partition("=")
        choices = [*STRENGTHS, *PRESETS]
        if name not in STRENGTHS:
            raise UsageError(
                f"--augment: expected {', '.join(PRESETS)} or a list of {', '.join(STRENGTHS)}, "
                f"got '{name}'{nearest(name, choices)}"
            )
        default, most = STRENGTHS[name]
        value = coerce_scalar("augment", float, strength) if equals else default
        check("augment", item, 0 < value <= most, f"a strength of {name} above 0, up to {most:g}")
        found[name] = f"{name}={value:g}"
    return tuple(found.values())
