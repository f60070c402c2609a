"""Dropout by a mask that is drawn before each step, by a generator of the run's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcnn.system.ranks import Ranks


class MaskedDropout(nn.Dropout):
    """Dropout with the mask in memory. In evaluation mode the input is passed through.

    torch's own draws from the generator of the process, which runs in other threads draw from as well. The mask is
    drawn outside of what is compiled, as compilers take no generator: every engine has the same. On a CPU it is that
    of nn.Dropout.

    Args:
        p: probability of dropping a value.
        mask: (N, neurons) of the whole batch, of all ranks, in the type and on the device of the input.
        ranks: the processes that train together; each takes its own rows.
        generator: draws the mask; None: torch's own.
    """

    def __init__(self, p: float, mask: Tensor, ranks: Ranks, generator: torch.Generator | None) -> None:
        super().__init__(p)
        self.generator, self.whole = generator, mask
        rows = len(mask) // ranks.count
        self.mask = mask.narrow(0, ranks.rank * rows, rows)

    def draw(self) -> None:
        """Draw the next batch's mask."""
        self.whole.bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        """(N / ranks, neurons) -> the same shape."""
        return x * self.mask if self.training else x
