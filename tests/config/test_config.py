from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcnn import config
from fastcnn.config import NUM_BLOCKS, Config, DataConfig, resolve, synonyms
from fastcnn.data.loaders import LOADERS
from fastcnn.errors import FastCNNError, UsageError
from fastcnn.export.exporters import EXPORTERS
from fastcnn.network.small_cnn import ACTIVATIONS, TTA
from fastcnn.system.device import DTYPES
from fastcnn.training.augment import AUGMENTATIONS
from fastcnn.training.engines import ENGINES, NEXT_BEST
from fastcnn.training.optimizers import OPTIMIZERS
from fastcnn.training.schedules import SCHEDULES
from pipelines import BACKENDS


@pytest.mark.parametrize(
    ("literal", "choices"),
    [
        (config.Activation, ACTIVATIONS),
        (config.Augmentation, AUGMENTATIONS),
        (config.Augmentation, config.STRENGTHS),
        (config.Optimizer, OPTIMIZERS),
        (config.Schedule, SCHEDULES),
        (config.Engine, {"auto", *ENGINES}),
        (config.Precision, {"auto", *DTYPES}),
        (config.Loader, {"auto", *LOADERS}),
        (config.Decoder, {"auto", *BACKENDS}),
        (config.Export, EXPORTERS),
        (config.Tta, TTA),
    ],
)
def test_literals_name_what_there_is(literal: Any, choices: Any) -> None:
    assert set(get_args(literal)) == set(choices)


def test_every_engine_has_a_next_best_down_to_eager() -> None:
    for name in ENGINES:
        while name != "eager":
            name = NEXT_BEST[name]


def test_every_field_has_help() -> None:
    assert {name for name, option in config.OPTIONS.items() if option.description} == {
        field.name for field in dataclasses.fields(Config)
    }


def test_recipe_seed_is_the_defaults() -> None:
    assert resolve(config.read_recipe("seed")) == Config()


def multiply_adds(config: Config) -> int:
    """Return those of the convolutions for one photo in every epoch."""
    channels = [3, *config.filters]
    blocks = ((channels[i] * channels[i + 1], config.image_size >> i) for i in range(NUM_BLOCKS))
    return config.epochs * sum(filters * config.kernel_size**2 * side**2 for filters, side in blocks)


@pytest.mark.parametrize(("name", "share"), [("seed", 1), ("fast", 1 / 7), ("strong", 1), ("best", 10)])
def test_a_recipe_computes_at_most_its_share_of_seed(name: str, share: float) -> None:
    recipes = {name: resolve(config.read_recipe(name)) for name in config.recipe_names()}
    assert multiply_adds(recipes[name]) <= share * multiply_adds(recipes["seed"])


@pytest.mark.parametrize(
    ("name", "given_", "value"),
    [
        ("lr", "1e-3", 1e-3),  # PyYAML reads 1e-3 as text
        ("epochs", "7", 7),
        ("epochs", 7.0, 7),
        ("filters", "[32,64,128,256,512]", (32, 64, 128, 256, 512)),
        ("filters", "32, 64, 128, 256, 512", (32, 64, 128, 256, 512)),
        ("filters", 16, (16,) * 5),
        ("batch_norm", "False", False),
        ("workers", "none", None),
        ("augment", "flip, shift=0.1", ("flip=0.5", "shift=0.1")),
        ("augment", "light", ("flip=0.5", "shift=0.0625")),
        ("augment", ["mixup"], ("mixup=0.2",)),
        ("augment", "none", ()),
        ("augment", [], ()),
        ("export", "torchscript", ("torchscript",)),
        ("checkpoint_every", 200, "200"),
        ("checkpoint_every", " 30s ", "30s"),
        ("checkpoint_every", "none", None),
        ("device", "cuda:1", "cuda:1"),
        ("device", "CPU", "cpu"),
        ("activation", "LeakyReLU", "leaky_relu"),
        ("schedule", "OneCycle", "onecycle"),
        ("export", ["ONNX"], ("onnx",)),
        ("batch_norm", "Yes", True),
        ("batch_norm", "off", False),
        ("augment", "Strong", ("flip=0.5", "crop=0.35", "colour=0.3")),
        ("augment", False, ()),  # as YAML reads: augment: no
        ("patience", "NONE", None),
    ],
)
def test_values_are_coerced(name: str, given_: object, value: object) -> None:
    assert getattr(resolve({name: given_}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation", "rleu", "did you mean 'relu'"),
        ("epochs", "0", "--epochs: expected 1 or more, got 0"),
        ("epochs", "many", "--epochs: expected a whole number, got 'many'"),
        ("epochs", "1.5", "--epochs: expected a whole number"),
        ("epochs", True, "--epochs"),
        ("lr", "nan", "--lr"),
        ("lr", "inf", "--lr"),
        ("filters", "1,2", "five numbers"),
        ("filters", "", "--filters"),
        ("kernel_size", 4, "an odd number"),
        ("image_size", 31, "32 or more"),
        ("dropout", 1, "--dropout: expected a number below 1, got 1"),
        ("device", "gpu", "--device"),
        ("batch_norm", "perhaps", "true or false"),
        ("epoch", 3, "did you mean 'epochs'"),
        ("learning_rate", 1, "no option 'learning_rate'; did you mean 'lr'?"),
        ("LR", 1, "no option 'LR'; did you mean 'lr'?"),
        ("imgsz", 64, "did you mean 'image_size'"),
        ("hflip", True, "did you mean 'augment=flip'?"),
        ("activation", "swish", "did you mean 'silu'"),
        ("device", "GPU", "did you mean 'cuda'"),
        ("augment", "flip,shfit", "did you mean 'shift'"),
        ("augment", "flip=2", "a strength of flip above 0, up to 1"),
        ("augment", "rotate=much", "a number"),
        ("cache_size", 64, "the image size (128) to 4096"),
        ("clip_norm", "0", "above 0"),
        ("ema", "1", "a number below 1"),
    ],
)
def test_wrong_values_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({name: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*synonyms.OPTION_SYNONYMS, *synonyms.FLIPS])
def test_names_of_other_trainers_are_none_of_ours(name: str) -> None:
    assert name not in config.OPTIONS
    assert synonyms.as_field(name.upper().replace("_", "-")) in config.OPTIONS
    with pytest.raises(UsageError, match=f"did you mean '{synonyms.as_field(name)}[='].*"):
        Config(**{name: "1"})


def test_later_sources_win() -> None:
    assert resolve({"epochs": 2, "lr": 1}, {"epochs": 3}).epochs == 3


def test_deterministic_refuses_bf16() -> None:
    with pytest.raises(UsageError):
        Config(deterministic=True, precision="bf16")


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    import yaml

    original = Config(data="x", filters=(8, 16, 32, 64, 128), lr=1e-5)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(original.to_dict()))
    assert resolve(config.read_yaml(tmp_path / "c.yaml")) == original


def test_names_to_leave_out_may_end_in_a_slash() -> None:
    """As a shell completes them."""
    assert DataConfig(data="x", exclude=("runs/", "wandb", "/")).layout.exclude == ("runs", "wandb", "/")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "!!python/object/apply:os.system [echo]", "- - -"])
def test_bad_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        config.read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers() | st.text())


@given(st.dictionaries(st.sampled_from(sorted(config.OPTIONS)), scalars))
def test_any_value_is_taken_or_refused(values: dict[str, Any]) -> None:
    with contextlib.suppress(FastCNNError):
        resolve(values)


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [
        ("200", 200, None),
        ("200 steps", 200, None),
        ("30s", None, 30),
        ("1.5m", None, 90),
        ("2H", None, 7200),
        *((wrong, None, None) for wrong in ("", "0", "0s", "1.5", "-3", "often", "3d", "1e3", "nan")),
    ],
)
def test_intervals(text: str, steps: int | None, seconds: float | None) -> None:
    assert config.parse_interval(text) == (steps, seconds)
    if (steps, seconds) == (None, None) and text:
        with pytest.raises(UsageError, match="--checkpoint-every: expected steps as 200, or a time as 30s or 5m"):
            Config(checkpoint_every=text)
