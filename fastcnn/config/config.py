"""The whole configuration of a run, all sections in one flat dataclass, and reading it from recipes and YAML files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from fastcnn.config.data import DataConfig
from fastcnn.config.model import ModelConfig
from fastcnn.config.optimization import OptimizationConfig
from fastcnn.config.run import RunConfig
from fastcnn.config.section import Section
from fastcnn.config.synonyms import as_choice, propose_option
from fastcnn.errors import UsageError, nearest

MAX_YAML_DEPTH = 3  # a list in the mapping, and one level more so that the message can name the option
MAX_YAML_BYTES = 2**18  # a hundred times the size of a configuration
RECIPES = resources.files("fastcnn.config") / "recipes"

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


def resolve(*sources: Mapping[str, Any]) -> Config:
    """Return a Config; later sources override earlier ones. Raises UsageError for an unknown name or a wrong value."""
    merged: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            field = str(name).replace("-", "_")
            if field not in OPTIONS:
                raise UsageError(f"no option '{name}'{propose_option(field, OPTIONS)}")
            merged[field] = value
    return Config(**merged)


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in RECIPES.iterdir() if p.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Return the values of a recipe that ships with the package."""
    name = as_choice(name, recipe_names())
    if name not in recipe_names():
        raise UsageError(
            f"--recipe: expected one of {', '.join(recipe_names())}, got '{name}'{nearest(name, recipe_names())}"
        )
    return parse_yaml((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}")


def read_yaml(path: Path, max_depth: int = MAX_YAML_DEPTH) -> dict[str, Any]:
    """Return the values of a configuration file: YAML with a mapping of option names to values."""
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UsageError(f"{path} is too large for a configuration: expected at most {MAX_YAML_BYTES:,} bytes")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path), max_depth)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the configuration {path}: {why}") from None


def parse_yaml(text: str, name: str, max_depth: int = MAX_YAML_DEPTH) -> dict[str, Any]:
    """Return a YAML mapping as plain data."""
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # before any value is built
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (*name) are not supported")  # a few lines of them are gigabytes
            if depth > max_depth:
                raise ValueError("it is nested too deeply")
        values = yaml.safe_load(text)
    except Exception as error:  # a value that does not fit its tag may raise any exception
        line = " ".join(str(error).split())
        raise UsageError(f"{name} is not valid YAML: {line}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{name}: expected a mapping of option names to values, got {type(values).__name__}")
    for key in values:
        if not isinstance(key, str):
            raise UsageError(f"{name}: expected option names as keys, got a {type(key).__name__}")
    return values
