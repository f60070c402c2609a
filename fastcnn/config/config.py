"""The whole configuration of a run: all sections in one flat dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from fastcnn.config.data import DataConfig
from fastcnn.config.model import ModelConfig
from fastcnn.config.optimization import OptimizationConfig
from fastcnn.config.run import RunConfig
from fastcnn.config.section import Section
from fastcnn.errors import UsageError

SECTIONS: dict[str, type[Section]] = {
    "Data": DataConfig,
    "Model": ModelConfig,
    "Optimization": OptimizationConfig,
    "Run": RunConfig,
}

OPTIONS: dict[str, FieldInfo] = {
    name: field for section in SECTIONS.values() for name, field in section.__pydantic_fields__.items()
}
"""Type, default and description of each option, section by section."""


@dataclass(frozen=True, kw_only=True)
class Config(DataConfig, ModelConfig, OptimizationConfig, RunConfig):
    """Everything that determines a run, as flat keyword arguments. Raises UsageError for a wrong name or value."""

    @model_validator(mode="after")
    def _check_batch_size(self) -> Self:
        if self.batch_size % self.devices:
            multiple = max(1, round(self.batch_size / self.devices)) * self.devices
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be divided among {self.devices} devices: use {multiple}"
            )
        paired = {name for name, _ in self.augmentations} & {"mixup", "cutmix"}
        if paired and self.devices > 1 and self.batch_size // self.devices % 2:
            raise UsageError(
                f"--augment {min(paired)} takes images in pairs: with {self.devices} devices, "
                f"--batch-size must be a multiple of {2 * self.devices}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, as they are written to config.yaml and checkpoints."""
        values = dataclasses.asdict(self)
        return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in OPTIONS}
