"""Adam over one flat buffer: a model's parameters as views of it, one kernel an update, one an all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class FlatParameters:
    """A model's parameters as views of one flat tensor, with one flat gradient beside it.

    Each parameter keeps its shape and strides (channels_last weights stay so); its elements lie in the buffer in
    the order of its memory. Loading a state_dict into the model writes into the buffer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = torch.cat([_in_memory_order(p.detach()) for p in self.parameters])  # (P,) fp32
        self.gradient = torch.zeros_like(self.values)
        sizes = [p.numel() for p in self.parameters]
        for p, piece in zip(self.parameters, self.values.split(sizes), strict=True):
            p.data = torch.as_strided(piece, p.shape, p.stride(), piece.storage_offset())

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Copy a gradient a parameter, in the parameters' order, into the flat gradient: one kernel."""
        pieces = [_in_memory_order(g.to(memory_format=torch.channels_last) if g.dim() == 4 else g) for g in gradients]
        torch.cat(pieces, out=self.gradient)


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

    def step(self) -> None:
        """Update the parameters by their gradient."""
        adam(
            [self.parameters.values],
            [self.parameters.gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.num_updates],
            fused=True,
            amsgrad=False,
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


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements as (numel,), in the order in which they lie in memory."""
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d])).reshape(-1)
