"""Model options: the network and its initial weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from fastcnn.config.section import Section

Activation = Literal["relu", "gelu", "silu", "mish", "elu", "leaky_relu", "selu", "tanh"]
Tta = Literal["none", "flip"]

NUM_BLOCKS = 5
MIN_IMAGE_SIZE = 2**NUM_BLOCKS  # every block halves the side


def _one_per_block(filters: tuple[int, ...]) -> tuple[int, ...]:
    filters = filters * NUM_BLOCKS if len(filters) == 1 else filters
    if len(filters) != NUM_BLOCKS:
        raise ValueError("five numbers above 0, or one for all five")
    return filters


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError("an odd number")
    return number


def _one_per_channel(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError("three numbers")
    return values


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Network: five convolutional blocks, a dense layer and the output layer."""

    filters: Annotated[tuple[Annotated[int, Field(gt=0)], ...], AfterValidator(_one_per_block)] = (32, 32, 32, 32, 32)
    """Number of filters in each of the five convolutions, such as 32,64,128,256,512; one number sets all five."""
    kernel_size: Annotated[int, Field(ge=1), AfterValidator(_odd)] = 3
    """Height and width of the convolution kernels; odd."""
    activation: Activation = "relu"
    """Activation function after each convolution and after the dense layer."""
    batch_norm: bool = True
    """Batch normalisation at the end of each block."""
    sync_batch_norm: bool = True
    """With several devices: normalise with the statistics of the whole batch, not of each device's part."""
    dense_neurons: Annotated[int, Field(ge=1)] = 128
    """Number of neurons in the dense layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability before the output layer."""
    tta: Tta = "none"
    """Test-time augmentation. flip: average the logits of each image and its mirror image wherever the model is
    evaluated, and in the exported file; prediction takes twice as long."""
    mean: Annotated[tuple[float, ...], AfterValidator(_one_per_channel)] = (0.485, 0.456, 0.406)
    """Mean of each colour channel (0 to 1) for normalisation."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_one_per_channel)] = (0.229, 0.224, 0.225)
    """Standard deviation of each colour channel for normalisation."""
    init_from: str | None = None
    """Run or checkpoint whose weights to start from; the output layer is used only if the number of classes is the
    same. Default: random weights."""
