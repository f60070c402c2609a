"""The configuration of a run: its options, and how they are read from the command line, recipes and YAML files."""

from fastcnn.config.config import OPTIONS, SECTIONS, Config, parse_yaml, read_recipe, read_yaml, recipe_names, resolve
from fastcnn.config.data import (
    LAYOUT_FIELDS,
    PRESETS,
    STRENGTHS,
    Augmentation,
    DataConfig,
    Decoder,
    LayoutOptions,
    Loader,
    require_data,
)
from fastcnn.config.model import MIN_IMAGE_SIZE, NUM_BLOCKS, Activation, ModelConfig, Tta
from fastcnn.config.optimization import OptimizationConfig, Optimizer, Schedule
from fastcnn.config.run import Engine, Export, Precision, RunConfig, Wandb
from fastcnn.config.section import Bytes, Interval, base_type, option_name, parse_bytes, parse_interval
from fastcnn.config.synonyms import METRIC_SYNONYMS, as_choice, as_field, in_our_words, propose_option
