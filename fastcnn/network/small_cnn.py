"""SmallCNN: five blocks of convolution, activation, max pooling and batch norm, a dense layer and an output layer."""

# No `from __future__ import annotations`: TorchScript reads the types of attributes.

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling  # is_compiling is also true while another thread compiles
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fastcnn.config import MIN_IMAGE_SIZE, NUM_BLOCKS, Tta
from fastcnn.errors import FastCNNError, UsageError, first_line, nearest
from fastcnn.network.kernels import cpu_max_pool

Layer = TypeVar("Layer", bound=nn.Module)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
}

# Non-decreasing: max pooling before them gives the same values and gradients at a quarter of the cost.
MONOTONE = frozenset({"relu", "elu", "leaky_relu", "selu", "tanh"})


TTA: tuple[str, ...] = get_args(Tta)
"""Test-time augmentations. flip: the mean of the logits of an image and of its mirror image, at twice the cost;
K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498."""


class BatchNorm(nn.Module):
    """Batch norm over (N, H, W) as nn.BatchNorm2d, without `num_batches_tracked`, which costs a kernel per layer.

    S. Ioffe and C. Szegedy, "Batch Normalization", arXiv:1502.03167.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); in training mode by the batch's statistics, which are recorded."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class Block(nn.Module):
    """Convolution (same padding), activation, 2x2 max pool, and batch norm where asked for.

    pool_first: pool before the activation; None: where that gives the same values (`MONOTONE`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        activation: str,
        batch_norm: bool,
        pool_first: bool | None = None,
    ) -> None:
        super().__init__()
        self.conv = _undrawn(nn.Conv2d, in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.activation = ACTIVATIONS[activation]()
        self.name = activation
        self.pool = nn.MaxPool2d(2)
        self.norm = BatchNorm(out_channels) if batch_norm else nn.Identity()
        self.pool_first = activation in MONOTONE if pool_first is None else pool_first
        self.relu = activation == "relu"

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) float -> (N, out_channels, H // 2, W // 2)."""
        # TorchScript knows nothing of kernels and skips what stands under this condition alone.
        if not is_scripting():  # noqa: SIM102
            if self.pool_first and not is_dynamo_compiling() and cpu_max_pool.usable(x):
                before, after = (None, self.conv.bias) if cpu_max_pool.takes_bias(x.dtype) else (self.conv.bias, None)
                x = F.conv2d(x, self.conv.weight, before, padding=self.conv.padding)
                x = cpu_max_pool.max_pool(x, after, self.relu)
                return self.norm(x if self.relu else self.activation(x))  # type: ignore[no-any-return]
        x = self.conv(x)
        x = self.activation(self.pooled(x)) if self.pool_first else self.pooled(self.activation(x))
        return self.norm(x)  # type: ignore[no-any-return]

    def pooled(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2): the maxima of 2x2 windows."""
        if not is_scripting():  # noqa: SIM102
            if is_dynamo_compiling():
                return cpu_max_pool.compilable_max_pool(x)
        return self.pool(x)  # type: ignore[no-any-return]


class SmallCNN(nn.Module):
    """The network of the reference assignment, configurable, in channels_last layout.

    Args:
        num_classes: width of the output layer.
        filters: channels of the five convolutions.
        kernel_size: side of their kernels, odd.
        activation: a name in `ACTIVATIONS`, after each convolution and the dense layer.
        batch_norm: whether each block ends in a batch norm.
        dense_neurons: width of the dense layer.
        dropout: probability before the output layer.
        image_size: side of the square input in pixels, 32 or more.
        tta: test-time augmentation, a name in `TTA`; in evaluation mode alone.
        pool_first: see `Block`.
        generator: draws the initial weights; None: torch's own.

    Raises UsageError, naming what is allowed, for a wrong value.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        filters: Sequence[int] = (32, 32, 32, 32, 32),
        kernel_size: int = 3,
        activation: str = "relu",
        batch_norm: bool = True,
        dense_neurons: int = 128,
        dropout: float = 0.0,
        image_size: int = 128,
        tta: str = "none",
        pool_first: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, "
                f"got '{activation}'{nearest(activation, ACTIVATIONS)}"
            )
        for name, value, ok, expected in (
            ("num_classes", num_classes, num_classes >= 2, "2 or more"),
            ("filters", filters, len(filters) == NUM_BLOCKS and min(filters) > 0, "five numbers above 0"),
            ("kernel_size", kernel_size, kernel_size > 0 and kernel_size % 2 == 1, "an odd number"),
            ("dense_neurons", dense_neurons, dense_neurons >= 1, "1 or more"),
            ("dropout", dropout, 0 <= dropout < 1, "0 to below 1"),
            ("image_size", image_size, image_size >= MIN_IMAGE_SIZE, f"{MIN_IMAGE_SIZE} or more"),
            ("tta", f"'{tta}'", tta in TTA, f"one of {', '.join(TTA)}"),
        ):
            if not ok:
                raise UsageError(f"{name}: expected {expected}, got {value}")
        self.options: dict[str, object] = {
            "num_classes": num_classes,
            "filters": list(filters),
            "kernel_size": kernel_size,
            "activation": activation,
            "batch_norm": batch_norm,
            "dense_neurons": dense_neurons,
            "dropout": dropout,
            "image_size": image_size,
            "tta": tta,
        }
        self.mirrors = tta == "flip"
        channels = [3, *filters]
        self.blocks = nn.Sequential(
            *(
                Block(channels[i], channels[i + 1], kernel_size, activation, batch_norm, pool_first)
                for i in range(NUM_BLOCKS)
            )
        )
        side = image_size // 2**NUM_BLOCKS
        self.dense = _undrawn(nn.Linear, filters[-1] * side * side, dense_neurons)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.output = _undrawn(nn.Linear, dense_neurons, num_classes)
        _draw_weights(self, generator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) normalised float -> (N, num_classes) logits."""
        if self.mirrors and not self.training:
            return (self.logits(x) + self.logits(x.flip([3]))) / 2
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the images as they are, without those of their mirror images."""
        x = self.blocks(x).flatten(1)
        return self.output(self.dropout(self.activation(self.dense(x))))  # type: ignore[no-any-return]


def _undrawn(kind: type[Layer], *sizes: int, **options: int) -> Layer:
    """Return a layer whose weights are not drawn yet, on the device that is the default."""
    layer = kind(*sizes, device="meta", **options)
    for name, parameter in layer.named_parameters():  # `to_empty` imports sympy, which takes a third of a second
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape)))
    return layer


def _draw_weights(model: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the initial weights as torch's layers do, which take no generator, in their order."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert layer.bias is not None
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no value is NaN or infinite. Waits for the device."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def restore(state: dict[str, Any]) -> SmallCNN:
    """Return the network of a checkpoint, with its weights, in evaluation mode.

    Raises FastCNNError where a weight is not finite, or where configuration, classes and weights do not describe one
    network, which is checked before anything large is allocated.
    """
    network, config = state["network"], {**state["config"], "num_classes": len(state["classes"])}
    try:
        other = next((name for name in network if network[name] != config.get(name)), None)
        if other:
            raise ValueError(f"'{other}' is {network[other]} for the network and {config.get(other)} elsewhere")
        with torch.device("meta"):  # shapes alone
            expected = SmallCNN(**network).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in state["model"].items()}:
            raise ValueError("its weights are of another network")
        if not all_finite(state["model"].values()):
            raise ValueError("its weights are not finite numbers: train again, with a lower --lr")
        model = SmallCNN(**network, generator=torch.Generator())  # the caller's draws nothing for it
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise FastCNNError(f"the checkpoint cannot be used: {first_line(error)}") from None
    return model.eval()
