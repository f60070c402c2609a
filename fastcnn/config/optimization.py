"""Optimization options: the optimizer, its schedule, the loss and when to stop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastcnn.config.section import Section

Optimizer = Literal["adam", "adamw", "sgd", "muon"]
Schedule = Literal["constant", "cosine", "step", "onecycle", "triangular"]
LrScaling = Literal["none", "sqrt", "linear"]
Balance = Literal["none", "weights", "sampling"]
OnNan = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(Section):
    """Optimizer, learning rate schedule, loss and early stopping."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Number of epochs: passes over the training images."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Images per training step, over all devices."""
    optimizer: Optimizer = "adam"
    """Optimizer: adam, adamw (decoupled weight decay), sgd (Nesterov momentum) or muon (orthogonalised momentum)."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate; with a schedule, its highest value."""
    lr_scaling: LrScaling = "none"
    """Scale the learning rate by batch size / 32 (linear) or by its square root (sqrt)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov momentum of sgd and muon."""
    adam_lr: Annotated[float, Field(gt=0)] = 3e-3
    """muon: learning rate of biases, batch norms and the output layer, which Adam updates; scheduled as --lr is."""
    fixed_norm: bool = False
    """muon: keep each weight's norm at the square root of its rows, so that --lr is the relative size of an update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of convolutions and dense layers: decoupled in adamw and muon, added to the gradient elsewhere."""
    schedule: Schedule = "constant"
    """Learning rate schedule."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up from 0. onecycle and triangular have one of their own: the first 30%
    and 20% of training."""
    decay_epochs: Annotated[float, Field(gt=0)] | None = None
    """Step schedule: epochs between two drops of the learning rate. Default: a third of all epochs."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Step schedule: factor applied to the learning rate at each drop."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the norm of the gradient to this value. Default: no clipping."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing: fraction of each label spread evenly over all classes."""
    balance: Balance = "none"
    """Correction for classes of unequal size: weights in the loss, or sampling rare classes more often."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, such as 0.999. The averaged weights are evaluated and exported.
    0: no average."""
    on_nan: OnNan = "stop"
    """When the loss or a weight is not a finite number: stop the run, or skip the step and count it."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Early stopping: epochs without a better validation accuracy before the run ends. Default: never."""
    limit_train_batches: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of steps per epoch, for a dry run. Default: all."""
