"""Run options: how and where training is executed, and what is saved."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from fastcnn.config.section import Interval, Section
from fastcnn.config.synonyms import propose_value
from fastcnn.errors import UsageError, warn

Engine = Literal[
    "auto",
    "eager",
    "compiled",
    "hybrid",
    "graphed",
    "compiled+graphed",
    "hybrid+graphed",
]
Precision = Literal["auto", "fp64", "fp32", "tf32", "bf16", "fp16"]
Export = Literal["torchscript", "onnx", "pt2"]
Wandb = Literal["auto", "online", "offline", "disabled"]

DEVICES = ("auto", "cpu", "cuda", "mps")
EVERY_FIVE_MINUTES = Interval("5m")


def _known_device(device: str) -> str:
    device = device.lower()
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        raise UsageError(
            f"--device: expected one of {', '.join(DEVICES)}, got '{device}'{propose_value(kind, DEVICES)}"
        )
    return device


EARLIER_ENGINES = {
    "fused": "hybrid",
    "fused+compiled": "hybrid",
    "fused+graphed": "hybrid+graphed",
    "fused+compiled+graphed": "hybrid+graphed",
}


def _engine_of_today(name: object) -> object:
    if not isinstance(name, str) or name.lower() not in EARLIER_ENGINES:
        return name
    name = name.lower()
    warn(f"there is no {name} engine any more: using {EARLIER_ENGINES[name]}, which computes the same")
    return EARLIER_ENGINES[name]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Execution on the hardware, reproducibility, checkpoints, reports and tracking."""

    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """Device: cpu, cuda, cuda:N or mps. auto: the first of cuda, mps and cpu that is available."""
    devices: Annotated[int, Field(ge=1)] = 1
    """Number of GPUs of this machine, or of processes on its CPU, that share each batch. torchrun sets it."""
    precision: Precision = "auto"
    """Arithmetic precision. auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU. fp64 is for
    comparisons."""
    engine: Annotated[Engine, BeforeValidator(_engine_of_today)] = "auto"
    """Execution of the training step. auto: measured, the fastest for this run."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Number of CPU threads for arithmetic. Default: one per core, or fewer where training is then faster."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Random seed of the split, the initial weights and the order of the images."""
    deterministic: bool = False
    """Bit-identical results for the same seed: fp32 and deterministic algorithms. On a CPU, use the same --threads."""
    checkpoint_every: Interval | None = EVERY_FIVE_MINUTES
    """Save last.pt within an epoch at this interval: steps, such as 200, or time, such as 30s. none: only at the end
    of each epoch."""
    report: bool = True
    """Draw plots and write the report page at the end of the run."""
    export: tuple[Export, ...] = ()
    """Export the best model at the end, to these formats: torchscript, onnx, pt2."""
    wandb: Wandb = "auto"
    """Weights & Biases mode. auto: WANDB_MODE if set, else online when logged in, else offline."""
    wandb_project: str | None = None
    """Weights & Biases project. Default: WANDB_PROJECT, else fastcnn."""
    strict: bool = False
    """Fail instead of falling back to something slower."""

    @model_validator(mode="after")
    def _check_deterministic(self) -> Self:
        if self.deterministic and self.precision not in ("auto", "fp32", "fp64"):
            raise UsageError(
                f"--deterministic does not work with --precision {self.precision}: its sums need not repeat to the "
                "bit. Use fp32 or auto"
            )
        return self
