"""The configuration of a run: its options, and how they are read from the command line, recipes and YAML files."""

from fastcnn.config.config import OPTIONS, SECTIONS, Config
from fastcnn.config.data import PRESETS, STRENGTHS, Augmentation, DataConfig, Decoder, Loader
from fastcnn.config.load import parse_yaml, read_recipe, read_yaml, recipe_names, resolve
from fastcnn.config.model import MIN_IMAGE_SIZE, NUM_BLOCKS, Activation, ModelConfig
from fastcnn.config.optimization import Balance, LrScaling, OnNan, OptimizationConfig, Optimizer, Schedule
from fastcnn.config.run import Engine, Export, Precision, RunConfig, Wandb
from fastcnn.config.section import base_type, option_name
from fastcnn.config.units import Bytes, Interval, parse_bytes, parse_interval

__all__ = [
    "MIN_IMAGE_SIZE",
    "NUM_BLOCKS",
    "OPTIONS",
    "PRESETS",
    "SECTIONS",
    "STRENGTHS",
    "Activation",
    "Augmentation",
    "Balance",
    "Bytes",
    "Config",
    "DataConfig",
    "Decoder",
    "Engine",
    "Export",
    "Interval",
    "Loader",
    "LrScaling",
    "ModelConfig",
    "OnNan",
    "OptimizationConfig",
    "Optimizer",
    "Precision",
    "RunConfig",
    "Schedule",
    "Wandb",
    "base_type",
    "option_name",
    "parse_bytes",
    "parse_interval",
    "parse_yaml",
    "read_recipe",
    "read_yaml",
    "recipe_names",
    "resolve",
]
