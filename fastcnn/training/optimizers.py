"""Optimizers over one flat buffer of parameters: one kernel per update."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fastcnn.training.parameters import FlatParameters, ordered

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ITERATIONS = (2, 3)
"""Iterations between two products with the full matrix, five in all."""
MUON_EPSILON = 1e-7


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
        if torch.compiler.is_dynamo_compiling():  # is_compiling is also true while another thread compiles
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


def adam_update(optimizer: Optimizer, lr: Tensor, skip: Tensor | None) -> None:
    """Update all parameters and count the update: see `Optimizer._update`."""
    adam(
        [optimizer.parameters.values],
        [optimizer.parameters.gradient],
        [optimizer.moments["exp_avg"]],
        [optimizer.moments["exp_avg_sq"]],
        [],
        [optimizer.num_updates],
        fused=skip is not None,
        foreach=False,
        capturable=skip is None,
        amsgrad=False,
        found_inf=skip,
        beta1=0.9,
        beta2=0.999,
        lr=lr,
        weight_decay=0.0,
        eps=1e-8,
        maximize=False,
    )


class Adam(Optimizer):
    """D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980."""

    moment_names = ("exp_avg", "exp_avg_sq")

    def _update(self, skip: Tensor | None) -> None:
        adam_update(self, self.lr, skip)


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


class Muon(Optimizer):
    """Muon for convolutions and the dense layer; Adam for biases, batch norms and the output layer.

    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; a convolution is the matrix of
    its filters, (out, kernel * kernel * in). Dense layers are updated as by torch.optim.Muon.

    momentum: Nesterov momentum of the matrices.
    adam_lr: Adam's learning rate when that of the matrices is `lr`; the schedule scales both.
    fixed_norm: before each update, scale every matrix to the norm sqrt(rows), as K. Jordan's airbench does
        (arXiv:2404.00498), so that the learning rate is the relative size of an update.
    """

    moment_names = ("velocity", "exp_avg", "exp_avg_sq")
    decoupled = True

    def __init__(
        self,
        parameters: FlatParameters,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        adam_lr: float = 3e-3,
        fixed_norm: bool = False,
    ) -> None:
        super().__init__(parameters, lr, weight_decay, momentum)
        self.adam_share, self.fixed_norm = adam_lr / lr, fixed_norm
        buffers = parameters.values, parameters.gradient, self.moments["velocity"]
        self.groups: list[tuple[list[Tensor], ...]] = [
            tuple(
                [buffer[start : start + rows * columns].view(rows, columns) for start in places] for buffer in buffers
            )
            for (rows, columns), places in _matrices(parameters).items()
        ]
        """Matrices, gradients and velocities: views of the flat buffers, those of one shape in one group."""
        if self.decay is not None:  # of the output layer's weight, at Adam's learning rate
            self.decay = self.decay * parameters.values.new_full((), self.adam_share)
            for (rows, columns), places in _matrices(parameters).items():
                for start in places:
                    self.decay[start : start + rows * columns] = weight_decay

    def _update(self, skip: Tensor | None) -> None:
        for matrices, gradients, velocities in self.groups:
            gradient = torch.stack(gradients)
            velocity = torch.stack(velocities).lerp(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp(velocity, self.momentum))
            matrix = torch.stack(matrices)
            rows, columns = matrix.shape[1:]
            if self.fixed_norm:
                matrix = matrix * (math.sqrt(rows) / _norm(matrix))
            matrix = matrix - update * math.sqrt(max(1, rows / columns)) * self.lr
            for olds, news in ((matrices, matrix), (velocities, velocity)):
                for old, new in zip(olds, news, strict=True):
                    old.copy_(new if skip is None else torch.where(skip > 0, old, new))
            for own in gradients:
                own.zero_()  # Adam leaves a value alone whose gradient was always zero
        adam_update(self, self.lr * self.adam_share, skip)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (B, rows, columns) with singular values near 1, by five iterations of Newton and Schulz.

    They are carried out on the Gram matrix of the shorter side, and so cost a third for a wide matrix; it is computed
    again after two iterations, before the rounding of its small eigenvalues has grown.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices / _norm(matrices)
    for count in NEWTON_SCHULZ_ITERATIONS:
        gram = x @ x.mT
        product = polynomial = _added_to_diagonal(b * gram + c * (gram @ gram), a)
        for _ in range(count - 1):
            gram = polynomial @ gram @ polynomial
            polynomial = _added_to_diagonal(b * gram + c * (gram @ gram), a)
            product = polynomial @ product
        x = product @ x
    return x


def _added_to_diagonal(matrices: Tensor, value: float) -> Tensor:
    matrices.diagonal(dim1=1, dim2=2).add_(value)
    return matrices


def _norm(matrices: Tensor) -> Tensor:
    return matrices.square().sum((1, 2), keepdim=True).sqrt().clamp(min=MUON_EPSILON)


def _matrices(parameters: FlatParameters) -> dict[tuple[int, int], list[int]]:
    """Return where in the flat buffer the matrices begin, by shape (rows, columns).

    A convolution's weight lies there as (out, kernel, kernel, in).
    """
    found: dict[tuple[int, int], list[int]] = {}
    start = 0
    for name, parameter in ordered(parameters.model):
        if parameter.dim() > 1 and not name.startswith("output."):
            rows = len(parameter)
            found.setdefault((rows, parameter.numel() // rows), []).append(start)
        start += parameter.numel()
    return found


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD, "muon": Muon}


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
