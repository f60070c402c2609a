"""Random generators of one run: those of the process are its caller's, and other threads draw from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Generators:
    """Generators of one run. Order and augmentation of each epoch have theirs, of (seed, epoch)."""

    cpu: torch.Generator
    """Draws the initial weights: the same on every device."""
    device: torch.Generator
    """Draws the masks of dropout on the run's device; on a CPU it is `cpu`."""

    def restore(self, cpu: torch.Tensor, device: torch.Tensor | None) -> None:
        """Continue from the states of a checkpoint; that of another kind of device is left out."""
        self.cpu.set_state(cpu.cpu())
        if self.device is not self.cpu and device is not None and len(device) == len(self.device.get_state()):
            self.device.set_state(device.cpu())


def seeded(device: torch.device, seed: int) -> Generators:
    """Return the generators of a run on a device."""
    cpu = torch.Generator().manual_seed(seed)
    return Generators(cpu, cpu if device.type == "cpu" else torch.Generator(device).manual_seed(seed))
