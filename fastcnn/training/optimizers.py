"""Adam over one flat buffer: a model's parameters as views of it, one kernel an update, one an all-reduce."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fastcnn.network.small_cnn import BatchNorm, SmallCNN


class FlatParameters:
    """A model's parameters as views of one flat fp32 tensor, with one flat gradient beside it.

    Each parameter keeps its shape and strides (channels_last weights stay so); its elements lie in the buffer in
    the order of its memory. Loading a state_dict into the model writes into the buffer.

    For 16-bit arithmetic `compute` is a second model whose convolutions and dense layers are views of a 16-bit copy of
    the buffer: one cast a step, where autocast casts every weight forward and every gradient back. Its batch norms are
    those of the model itself, in fp32. For fp32, `compute` is the model. For fp64 all of it is in fp64.
    """

    def __init__(self, model: SmallCNN, dtype: torch.dtype = torch.float32) -> None:
        self.model = model.double() if dtype == torch.float64 else model
        named = ordered(model)
        self._sizes = [p.numel() for _, p in named]
        self.values = torch.cat([_in_memory_order(p.detach()) for _, p in named])  # (P,) fp32
        # Beside the gradient the loss, so that one all-reduce brings both.
        self.reduced = self.values.new_zeros(len(self.values) + 1)
        self.gradient, self.loss = self.reduced[:-1], self.reduced[-1]
        for (_, p), piece in zip(named, torch.split(self.values, self._sizes), strict=True):
            p.data = torch.as_strided(piece, p.shape, p.stride(), piece.storage_offset())
        self.low = None if dtype == self.values.dtype else self.values.to(dtype)
        self.compute = model if self.low is None else self._twin(self.low)
        self.inputs = [p for _, p in ordered(self.compute)]
        """What the loss is differentiated by, in the buffer's order."""
        self._num_low = sum(p.dtype != self.values.dtype for p in self.inputs)

    def set_gradients(self, gradients: Sequence[Tensor], loss: Tensor | None = None) -> None:
        """Copy a gradient a parameter, in the order of `inputs`, into the flat gradient, and a loss () behind it.

        One `cat` for each type: of mixed types a GPU would copy tensor by tensor.
        """
        pieces = [_in_memory_order(g.to(memory_format=torch.channels_last) if g.dim() == 4 else g) for g in gradients]
        split = sum(self._sizes[: self._num_low])
        if self._num_low:
            self.gradient[:split].copy_(torch.cat(pieces[: self._num_low]))
        rest = pieces[self._num_low :] + ([] if loss is None else [loss.view(1)])
        if rest:
            torch.cat(rest, out=self.reduced[split:] if loss is not None else self.gradient[split:])

    def weights_only(self, value: float) -> Tensor:
        """Return (P,): `value` at the weights of convolutions and dense layers, 0 at biases and batch norms."""
        shares = [value if p.dim() > 1 else 0.0 for _, p in ordered(self.model)]
        counts = torch.tensor(self._sizes)
        return torch.tensor(shares).repeat_interleave(counts).to(self.values)

    def refresh(self) -> None:
        """Bring `compute` up to date after the values have changed."""
        if self.low is not None:
            self.low.copy_(self.values)

    @contextmanager
    def holding(self, values: Tensor) -> Iterator[None]:
        """Let the model hold other values (P,) for a while, such as their moving average."""
        own = self.values.clone()
        self.values.copy_(values)
        self.refresh()
        try:
            yield
        finally:
            self.values.copy_(own)
            self.refresh()

    def _twin(self, low: Tensor) -> SmallCNN:
        twin = copy.deepcopy(self.model)
        for (name, p), piece in zip(ordered(twin), torch.split(low, self._sizes), strict=True):
            owner, _, attribute = name.rpartition(".")
            if isinstance(twin.get_submodule(owner), BatchNorm):
                shared = self.model.get_parameter(name)
            else:
                shared = nn.Parameter(torch.as_strided(piece, p.shape, p.stride(), piece.storage_offset()))
            setattr(twin.get_submodule(owner), attribute, shared)
        for name, buffer in self.model.named_buffers():
            owner, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(owner), attribute, buffer)
        return twin


def ordered(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a model's named parameters in the buffer's order: those of batch norms, which stay fp32, last."""
    norms = {id(p) for module in model.modules() if isinstance(module, BatchNorm) for p in module.parameters()}
    return sorted(model.named_parameters(), key=lambda named: id(named[1]) in norms)


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


def scaled_lr(lr: float, rule: str, batch_size: int) -> float:
    """Return the learning rate for a batch size, from that for 32: by their ratio, its root or not at all.

    linear: P. Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677. sqrt, which suits Adam: S. Malladi et
    al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", arXiv:2205.10287.
    """
    ratio = batch_size / 32
    return lr * {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]


def schedule(
    name: str,
    lr: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay_rate: float = 0.1,
) -> Tensor:
    """Return (num_steps,) learning rates: those of `SCHEDULES`, after a linear rise over `warmup_steps`.

    decay_steps, decay_rate: how often, and to what share, "step" drops; None is a third of the run.
    """
    rise = [(i + 1) / (warmup_steps + 1) for i in range(min(warmup_steps, num_steps))]
    rest = num_steps - len(rise)
    every = decay_steps or max(1, num_steps // 3)
    shares = rise + [SCHEDULES[name](i, rest, every, decay_rate) for i in range(rest)]
    return (lr * torch.tensor(shares, dtype=torch.float64)).float()


def _constant(step: int, num_steps: int, every: int, rate: float) -> float:
    return 1.0


def _cosine(step: int, num_steps: int, every: int, rate: float) -> float:
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def _step(step: int, num_steps: int, every: int, rate: float) -> float:
    return rate ** (step // every)


def _onecycle(step: int, num_steps: int, every: int, rate: float) -> float:
    """L. N. Smith and N. Topin, "Super-Convergence", arXiv:1708.07120.

    From 1 / 25 up to 1 over the first 30% and down to 1 / 250,000, both along a cosine, as
    torch.optim.lr_scheduler.OneCycleLR does.
    """
    peak = max(0.3 * num_steps - 1, 0.5)  # in a run of a few steps the first is all that rises
    if step <= peak:
        return _between(1 / 25, 1, step / peak)
    return _between(1, 1 / 25e4, (step - peak) / (num_steps - 1 - peak))


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step": _step,
    "onecycle": _onecycle,
}
"""(step, steps of the run, steps between two drops, what a drop leaves) -> share of the learning rate."""


def average_weights(decay: float, num_steps: int) -> Tensor:
    """Return (num_steps,): the weight of each step's values in their moving average.

    The average's decay is min(decay, (1 + i) / (10 + i)), so that a short run does not average its first weights in.
    """
    return torch.tensor([1 - min(decay, (1 + i) / (10 + i)) for i in range(num_steps)])


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements as (numel,), in the order in which they lie in memory."""
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d])).reshape(-1)
