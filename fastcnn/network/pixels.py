"""Pixels as the network reads them: resizing and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(images: Tensor, size: int) -> Tensor:
    """Return images (N, H, W, 3) uint8 resized bilinearly to (N, size, size, 3) uint8, as evaluation and export do."""
    if images.shape[1] == size:
        return images
    pixels = images.permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def normalisation(mean: Sequence[float], std: Sequence[float], image_size: int) -> tuple[Tensor, Tensor]:
    """Return scale and shift of uint8 pixels, (image_size * 3,) fp32 each: `scale * pixel + shift` is normalised.

    For a whole row of pixels: broadcasting three numbers takes 3.5 times as long on a CPU.
    """
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.repeat(image_size), shift.repeat(image_size)


class Normalise:
    """Normalisation of uint8 images (N, H, W, 3) to network input (N, 3, H, W), channels_last, of `dtype`."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scale, self.shift = (row.to(device) for row in normalisation(mean, std, image_size))
        self.dtype, self.image_size = dtype, image_size

    def __call__(self, images: Tensor) -> Tensor:
        """Return the normalised images. Arithmetic is fp32; the result is rounded once."""
        rows = images.flatten(2)  # (N, H, W * 3)
        return torch.addcmul(self.shift, rows, self.scale).to(self.dtype).view(images.shape).permute(0, 3, 1, 2)

    def pixels(self, normalised: Tensor) -> Tensor:
        """Return the uint8 images (N, H, W, 3) that normalised ones (N, 3, H, W) show: the inverse of a call."""
        images = normalised.permute(0, 2, 3, 1)
        pixels = (images.flatten(2).to(self.scale.dtype) - self.shift) / self.scale
        return pixels.round().clamp(0, 255).to(torch.uint8).view(images.shape)
