"""Adam over one flat buffer: a model's parameters and gradients as views, one kernel an update, one an all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatParameters:
    """A model's parameters as views of one flat tensor, with one flat gradient beside it.

    Each parameter keeps its shape and strides (channels_last weights stay so); its elements lie in the buffer in
    the order of its memory. Loading a state_dict into the model writes into the buffer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = nn.Parameter(torch.cat([_in_memory_order(p.detach()) for p in self.parameters]))  # (P,)
        self.values.grad = torch.zeros_like(self.values)
        for p, piece in zip(
            self.parameters, self.values.detach().split([p.numel() for p in self.parameters]), strict=True
        ):
            p.data = torch.as_strided(piece, p.shape, p.stride(), piece.storage_offset())

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Copy a gradient a parameter, in the parameters' order, into the flat gradient: one kernel."""
        assert self.values.grad is not None
        pieces = [_in_memory_order(g.to(memory_format=torch.channels_last) if g.dim() == 4 else g) for g in gradients]
        torch.cat(pieces, out=self.values.grad)


def adam(values: nn.Parameter, lr: float) -> torch.optim.Adam:
    """Return Adam over the flat parameters, its learning rate and step count device tensors.

    D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980. A rate held as a Python
    float would be frozen into a captured graph.
    """
    on_gpu = values.device.type == "cuda"
    rate = torch.tensor(lr, device=values.device)
    return torch.optim.Adam([values], lr=rate, fused=values.device.type in ("cuda", "cpu"), capturable=on_gpu)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements as (numel,), in the order in which they lie in memory."""
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d])).reshape(-1)
