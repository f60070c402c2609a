"""Adam over one flat buffer: a model's parameters as views of it, one kernel an update, one an all-reduce."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fastcnn.training.parameters import FlatParameters


class Optimizer:
    """Updates flat parameters. All it reads and writes are device tensors, allocated once.

    It calls torch's own fused kernels by their functional form: torch.optim's classes would make their state in the
    first step, inside a capture, and their constructors import dynamo, a second of every start.

    weight_decay: of the weights of convolutions and dense layers; biases and batch norms are left alone.
    """

    decoupled = False
    """Whether weight decay is applied to the weights themselves (I. Loshchilov and F. Hutter, arXiv:1711.05101)."""

    def __init__(self, parameters: FlatParameters, lr: float, weight_decay: float = 0.0) -> None:
        self.parameters = parameters
        values = parameters.values
        self.lr = torch.tensor(lr, device=values.device)  # a Python number would be frozen into a captured graph
        self.decay = parameters.weights_only(weight_decay) if weight_decay else None
        self.num_updates = torch.zeros((), device=values.device)

    def step(self, skip: Tensor) -> None:
        """Update the parameters by their gradient; not where `skip` () is 1."""
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
        """Return what a checkpoint needs to go on."""
        return {"lr": self.lr, "num_updates": self.num_updates, **self._moments()}

    def _update_compiled(self, skip: Tensor) -> None:
        """Update by torch's plain form: a compiler refuses the fused one, and makes one kernel of this."""
        tensors = [self.parameters.values, self.num_updates, *self._moments().values()]
        before = [tensor.clone() for tensor in tensors]
        self._update(None)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(skip > 0, old, tensor))

    def _update(self, skip: Tensor | None) -> None:
        """Update by torch's fused form, not where `skip` () is 1; by its plain form where it is None."""
        raise NotImplementedError

    def _moments(self) -> dict[str, Tensor]:
        raise NotImplementedError


class Adam(Optimizer):
    """D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980."""

    def __init__(self, parameters: FlatParameters, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr, weight_decay)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(parameters.values), torch.zeros_like(parameters.values)

    def _update(self, skip: Tensor | None) -> None:
        adam(
            [self.parameters.values],
            [self.parameters.gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
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

    def _moments(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    decoupled = True


class SGD(Optimizer):
    """Stochastic gradient descent with Nesterov's momentum."""

    def __init__(
        self, parameters: FlatParameters, lr: float, weight_decay: float = 0.0, *, momentum: float = 0.9
    ) -> None:
        super().__init__(parameters, lr, weight_decay)
        self.momentum, self.velocity = momentum, torch.zeros_like(parameters.values)

    def _update(self, skip: Tensor | None) -> None:
        sgd(
            [self.parameters.values],
            [self.parameters.gradient],
            [self.velocity],
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

    def _moments(self) -> dict[str, Tensor]:
        return {"velocity": self.velocity}


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


class LossScale:
    """The factor that keeps fp16 gradients from vanishing: halved on overflow, doubled after `interval` good steps.

    P. Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740. On the device, unlike torch.amp.GradScaler,
    whose `.item()` waits for it.
    """

    def __init__(self, device: torch.device, interval: int = 2000) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.interval = interval

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a step changes."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def update(self, overflow: Tensor) -> None:
        """Change the scale after a step; `overflow` () is 1 where its gradient was not finite."""
        self.good_steps.add_(1).mul_(1 - overflow)
        grown = (self.good_steps >= self.interval).to(self.scale.dtype)
        self.scale.mul_(torch.where(overflow > 0, 0.5, 1 + grown)).clamp_(min=1.0)
        self.good_steps.mul_(1 - grown)
