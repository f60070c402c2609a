"""Optimizers over one flat buffer of parameters: one kernel per update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fastcnn.training.parameters import FlatParameters


class Optimizer:
    """Updates flat parameters. Everything it reads and writes is a device tensor, allocated once.

    It calls torch's own fused kernels in their functional form: torch.optim's classes create their state in the first
    step, inside a capture, and their constructors import dynamo, which costs every start a second.

    weight_decay: applied to the weights of convolutions and dense layers, not to biases and batch norms.
    momentum: of SGD.
    """

    moment_names: tuple[str, ...] = ()
    """Moving averages over the steps, each (P,), as they are named in checkpoints."""

    decoupled = False
    """Whether weight decay is applied to the weights themselves (I. Loshchilov and F. Hutter, arXiv:1711.05101)."""

    def __init__(self, parameters: FlatParameters, lr: float, weight_decay: float = 0.0, momentum: float = 0.9) -> None:
        self.parameters, self.momentum = parameters, momentum
        values = parameters.values
        self.lr = torch.tensor(lr, device=values.device)  # a Python number would be frozen into a captured graph
        self.decay = parameters.weights_only(weight_decay) if weight_decay else None
        self.num_updates = torch.zeros((), device=values.device)
        self.moments = {name: torch.zeros_like(values) for name in self.moment_names}

    def step(self, skip: Tensor) -> None:
        """Update the parameters by their gradient, unless `skip` () is 1."""
        values, gradient = self.parameters.values, self.parameters.gradient
        if self.decay is not None and self.decoupled:
            values.addcmul_(values, self.decay * (self.lr * (skip - 1)))
        elif self.decay is not None:
            gradient.addcmul_(values, self.decay)
        if torch.compiler.is_compiling():
            self._update_compiled(skip)
        else:
            self._update(skip)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs to resume."""
        return {"lr": self.lr, "num_updates": self.num_updates, **self.moments}

    def _update_compiled(self, skip: Tensor) -> None:
        """Update by torch's plain form, which a compiler turns into one kernel; it refuses the fused form."""
        tensors = [self.parameters.values, self.num_updates, *self.moments.values()]
        before = [tensor.clone() for tensor in tensors]
        self._update(None)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(skip > 0, old, tensor))

    def _update(self, skip: Tensor | None) -> None:
        """Update by torch's fused form unless `skip` () is 1, or by its plain form where `skip` is None."""
        raise NotImplementedError


class Adam(Optimizer):
    """D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980."""

    moment_names = ("exp_avg", "exp_avg_sq")

    def _update(self, skip: Tensor | None) -> None:
        adam(
            [self.parameters.values],
            [self.parameters.gradient],
            [self.moments["exp_avg"]],
            [self.moments["exp_avg_sq"]],
            [],
            [self.num_updates],
            fused=skip is not None,
            foreach=False,
            capturable=skip is None,
            amsgrad=False,
            found_inf=skip,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    decoupled = True


class SGD(Optimizer):
    """Stochastic gradient descent with Nesterov's momentum."""

    moment_names = ("velocity",)

    def _update(self, skip: Tensor | None) -> None:
        sgd(
            [self.parameters.values],
            [self.parameters.gradient],
            [self.moments["velocity"]],
            fused=skip is not None,
            foreach=False,
            found_inf=skip,
            weight_decay=0.0,
            momentum=self.momentum,
            lr=self.lr,  # type: ignore[arg-type]
            dampening=0.0,
            nesterov=self.momentum > 0,
            maximize=False,
        )
        self.num_updates.add_(1 if skip is None else 1 - skip)


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


class LossScale:
    """Loss scale for fp16 gradients: halved on overflow, doubled after `interval` good steps.

    P. Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740. It stays on the device; torch.amp.GradScaler
    calls `.item()`, which waits for it.
    """

    def __init__(self, device: torch.device, interval: int = 2000) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.interval = interval

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a step changes."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def update(self, overflow: Tensor) -> None:
        """Change the scale after a step; `overflow` () is 1 where its gradient was not finite."""
        self.good_steps.add_(1).mul_(1 - overflow)
        grown = (self.good_steps >= self.interval).to(self.scale.dtype)
        self.scale.mul_(torch.where(overflow > 0, 0.5, 1 + grown)).clamp_(min=1.0)
        self.good_steps.mul_(1 - grown)
