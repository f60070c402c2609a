"""Parameters and gradients in flat buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastcnn.network.small_cnn import BatchNorm, SmallCNN


class FlatParameters:
    """Parameters of a model as views of one flat fp32 tensor, with one flat gradient beside it.

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
        self.values = torch.cat([in_memory_order(p.detach()) for _, p in named])  # (P,) fp32
        # The loss stands behind the gradient, so that one all-reduce brings both.
        self.reduced = self.values.new_zeros(len(self.values) + 1)
        self.gradient, self.loss = self.reduced[:-1], self.reduced[-1]
        for (_, p), piece in zip(named, torch.split(self.values, self._sizes), strict=True):
            p.data = torch.as_strided(piece, p.shape, p.stride(), piece.storage_offset())
        self.values_16bit = None if dtype == self.values.dtype else self.values.to(dtype)
        self.compute = model if self.values_16bit is None else self._copy_16bit(self.values_16bit)
        self.inputs = [p for _, p in ordered(self.compute)]
        """Parameters that the loss is differentiated by, in the buffer's order."""
        self._num_16bit = sum(p.dtype != self.values.dtype for p in self.inputs)

    def set_gradients(self, gradients: Sequence[Tensor], loss: Tensor | None = None) -> None:
        """Copy the gradients, in the order of `inputs`, into the flat gradient, and a loss () behind it.

        One `cat` for each dtype: a GPU copies mixed dtypes tensor by tensor.
        """
        pieces = [in_memory_order(g) for g in gradients]
        split = sum(self._sizes[: self._num_16bit])
        if self._num_16bit:
            self.gradient[:split].copy_(torch.cat(pieces[: self._num_16bit]))
        rest = pieces[self._num_16bit :] + ([] if loss is None else [loss.view(1)])
        if rest:
            torch.cat(rest, out=self.reduced[split:] if loss is not None else self.gradient[split:])

    def weights_only(self, value: float) -> Tensor:
        """Return (P,): `value` at the weights of convolutions and dense layers, 0 at biases and batch norms."""
        shares = [value if p.dim() > 1 else 0.0 for _, p in ordered(self.model)]
        counts = torch.tensor(self._sizes)
        return torch.tensor(shares).repeat_interleave(counts, output_size=len(self.values)).to(self.values)

    def refresh(self) -> None:
        """Bring `compute` up to date after the values have changed."""
        if self.values_16bit is not None:
            self.values_16bit.copy_(self.values)

    @contextmanager
    def holding(self, values: Tensor) -> Iterator[None]:
        """Give the model other values (P,) for a while, such as their moving average."""
        own = self.values.clone()
        self.values.copy_(values)
        self.refresh()
        try:
            yield
        finally:
            self.values.copy_(own)
            self.refresh()

    def _copy_16bit(self, values: Tensor) -> SmallCNN:
        twin = copy.deepcopy(self.model)
        for (name, p), piece in zip(ordered(twin), torch.split(values, self._sizes), strict=True):
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
    """Return a model's named parameters in the buffer's order: batch norms, which stay fp32, come last."""
    norms = {id(p) for module in model.modules() if isinstance(module, BatchNorm) for p in module.parameters()}
    return sorted(model.named_parameters(), key=lambda named: id(named[1]) in norms)


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements of a parameter or its gradient as (numel,), in the order of a parameter's memory."""
    if tensor.dim() == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d])).reshape(-1)
