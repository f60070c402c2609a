"""Adam over one flat buffer: a model's parameters as views of it, one kernel an update, one an all-reduce."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from fastcnn.model import BatchNorm, SmallCNN


class FlatParameters:
    """A model's parameters as views of one flat fp32 tensor, with one flat gradient beside it.

    Each parameter keeps its shape and strides (channels_last weights stay so); its elements lie in the buffer in
    the order of its memory. Loading a state_dict into the model writes into the buffer.

    For 16-bit arithmetic `compute` is a second model whose convolutions and dense layers are views of a 16-bit copy of
    the buffer: one cast a step, where autocast casts every weight forward and every gradient back. Its batch norms are
    those of the model itself, in fp32. For fp32, `compute` is the model.
    """

    def __init__(self, model: SmallCNN, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        named = ordered(model)
        self._sizes = [p.numel() for _, p in named]
        self.values = torch.cat([_in_memory_order(p.detach()) for _, p in named])  # (P,) fp32
        self.gradient = torch.zeros_like(self.values)
        for (_, p), piece in zip(named, torch.split(self.values, self._sizes), strict=True):
            p.data = torch.as_strided(piece, p.shape, p.stride(), piece.storage_offset())
        self.low = None if dtype == torch.float32 else self.values.to(dtype)
        self.compute = model if self.low is None else self._twin(self.low)
        self.inputs = [p for _, p in ordered(self.compute)]
        """What the loss is differentiated by, in the buffer's order."""
        self._num_low = sum(p.dtype != torch.float32 for p in self.inputs)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Copy a gradient a parameter, in the order of `inputs`, into the flat fp32 gradient.

        One `cat` for each type: of mixed types a GPU would copy tensor by tensor.
        """
        pieces = [_in_memory_order(g.to(memory_format=torch.channels_last) if g.dim() == 4 else g) for g in gradients]
        split = sum(self._sizes[: self._num_low])
        if self._num_low:
            self.gradient[:split].copy_(torch.cat(pieces[: self._num_low]))
        if self._num_low < len(pieces):
            torch.cat(pieces[self._num_low :], out=self.gradient[split:])

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


class Adam:
    """Adam over flat parameters. All it reads and writes are device tensors, allocated once.

    D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980. It calls torch's own fused
    kernel by its functional form: torch.optim.Adam would make its state in the first step, inside a capture, and its
    constructor imports dynamo, a second of every start.
    """

    def __init__(self, parameters: FlatParameters, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameters, self.betas = parameters, betas
        values = parameters.values
        self.lr = torch.tensor(lr, device=values.device)  # a Python number would be frozen into a captured graph
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(values), torch.zeros_like(values)
        self.num_updates = torch.zeros((), device=values.device)

    def step(self, skip: Tensor) -> None:
        """Update the parameters by their gradient; not where `skip` () is 1."""
        adam(
            [self.parameters.values],
            [self.parameters.gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.num_updates],
            fused=True,
            amsgrad=False,
            found_inf=skip,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs to go on."""
        names = ("lr", "exp_avg", "exp_avg_sq", "num_updates")
        return {name: getattr(self, name) for name in names}


class LossScale:
    """The factor that keeps fp16 gradients from vanishing: halved on overflow, doubled after `interval` good steps.

    P. Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740. On the device, unlike torch.amp.GradScaler,
    whose `.item()` waits for it.
    """

    def __init__(self, device: torch.device, interval: int = 2000) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.interval = interval

    def state(self) -> tuple[Tensor, Tensor]:
        """Return what a step changes."""
        return self.scale, self.good_steps

    def update(self, overflow: Tensor) -> None:
        """Change the scale after a step; `overflow` () is 1 where its gradient was not finite."""
        self.good_steps.add_(1).mul_(1 - overflow)
        grown = (self.good_steps >= self.interval).to(self.scale.dtype)
        self.scale.mul_(torch.where(overflow > 0, 0.5, 1 + grown)).clamp_(min=1.0)
        self.good_steps.mul_(1 - grown)


def schedule(name: str, lr: float, num_steps: int) -> Tensor:
    """Return (num_steps,) learning rates: "constant", "cosine" down to 0, or "onecycle".

    onecycle: L. N. Smith and N. Topin, "Super-Convergence", arXiv:1708.07120: from lr / 25 up to lr over the first 30%
    and down to lr / 250,000, both along a cosine, as torch.optim.lr_scheduler.OneCycleLR does.
    """
    if name == "constant":
        return torch.full((num_steps,), lr)
    if name == "cosine":
        return torch.tensor([lr * (1 + math.cos(math.pi * i / num_steps)) / 2 for i in range(num_steps)])
    assert name == "onecycle", name
    peak = max(0.3 * num_steps - 1, 0.5)  # in a run of a few steps the first is all that rises
    return torch.tensor(
        [
            _between(lr / 25, lr, i / peak)
            if i <= peak
            else _between(lr, lr / 25e4, (i - peak) / (num_steps - 1 - peak))
            for i in range(num_steps)
        ]
    )


SCHEDULES = ("constant", "cosine", "onecycle")


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
