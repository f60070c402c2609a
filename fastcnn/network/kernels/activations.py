"""Activations in Triton, one for each of `fastcnn.network.small_cnn.ACTIVATIONS`."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_slope(x):
    return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def leaky_relu(x):
    return tl.where(x < 0, 0.01 * x, x)


@triton.jit
def leaky_relu_slope(x):
    return tl.where(x > 0, 1.0, 0.01)


@triton.jit
def elu(x):
    return tl.where(x > 0, x, tl.exp(tl.where(x > 0, 0.0, x)) - 1)


@triton.jit
def elu_slope(x):
    return tl.exp(tl.where(x > 0, 0.0, x))


@triton.jit
def selu(x):
    return tl.where(x > 0, 1.0507009873554805 * x, 1.7580993408473766 * (tl.exp(tl.where(x > 0, 0.0, x)) - 1))


@triton.jit
def selu_slope(x):
    return tl.where(x > 0, 1.0507009873554805, 1.7580993408473766 * tl.exp(tl.where(x > 0, 0.0, x)))


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    size = (1 - e) / (1 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def tanh_slope(x):
    e = tl.exp(-2 * tl.abs(x))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def mish(x):
    e = tl.exp(tl.where(x < 20, x, 20.0))  # tanh(softplus(x)) is w / (w + 2), and 1 from there on
    w = e * (e + 2)
    return x * (w / (w + 2))


@triton.jit
def mish_slope(x):
    e = tl.exp(tl.where(x < 20, x, 20.0))
    w = e * (e + 2)
    slope = 4 * e * (e + 1) / ((w + 2) * (w + 2))
    return w / (w + 2) + x * tl.where(x < 20, slope, 0.0)


class Activation(NamedTuple):
    """Activation and its derivative, both functions of fp32 tiles."""

    value: Any
    slope: Any
    monotone: bool
    """Non-decreasing: the window's maximum is taken before the activation."""


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(relu, relu_slope, monotone=True),
    "gelu": Activation(gelu, gelu_slope, monotone=False),
    "silu": Activation(silu, silu_slope, monotone=False),
    "mish": Activation(mish, mish_slope, monotone=False),
    "elu": Activation(elu, elu_slope, monotone=True),
    "leaky_relu": Activation(leaky_relu, leaky_relu_slope, monotone=True),
    "selu": Activation(selu, selu_slope, monotone=True),
    "tanh": Activation(tanh, tanh_slope, monotone=True),
}
