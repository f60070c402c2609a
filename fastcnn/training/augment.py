"""Augmentation of a batch on the device, by random numbers drawn for the whole epoch before it begins.

Geometric changes (`GEOMETRY`) are composed into one mapping from output to input pixels, so that a batch is read once,
however many of them there are. Changes of colour (`PIXELS`) follow; mixing of two images and their labels (`MIXES`)
comes last. The random numbers of an image depend on seed, epoch and its place in the epoch's order alone: not on
the device, the number of ranks or the step at which a run was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.data.feeds import Epoch, SamplingWeights, shuffled

LUMA = (0.299, 0.587, 0.114)
GREY = 128


class Batch(NamedTuple):
    """Images and labels of one step."""

    images: Tensor
    """(N, size, size, 3) uint8."""
    labels: Tensor
    """(N,) int64."""
    others: Tensor | None = None
    """(N,) int64 label of the image that was mixed in; None: nothing was."""
    share: Tensor | None = None
    """(N,) weight of the first label; the other label has the rest."""


class View:
    """Geometric mapping of a batch: offsets in pixels and an angle in radians about the image centre, (N,) each."""

    def __init__(self, count: int, side: int, device: torch.device) -> None:
        self.side = side
        self.x = self.y = self.angle = torch.zeros(count, device=device)
        self.width = self.height = torch.ones(count, device=device)  # fraction of the image; negative: mirrored


def flip(view: View, draws: Tensor, probability: float) -> None:
    """Mirror images left to right."""
    view.width = torch.where(draws[0] < probability, -view.width, view.width)


def alternating_flip(view: View, draws: Tensor, share: float) -> None:
    """Mirror images in every other epoch, starting with the first or the second at random: see `Augment.draw`.

    K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.
    """
    flip(view, draws, share / 2)


def shift(view: View, draws: Tensor, share: float) -> None:
    """Shift images by whole pixels, up to a fraction of the side; the edge is repeated."""
    x, y = ((draws * 2 - 1) * (share * view.side)).round()
    view.x, view.y = view.x + x, view.y + y


def crop(view: View, draws: Tensor, least: float) -> None:
    """Crop at least the fraction `least` of the area, aspect ratio 3:4 to 4:3, and stretch it to the full size.

    C. Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842.
    """
    area, ratio = least + (1 - least) * draws[0], ((draws[1] * 2 - 1) * math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    view.x = view.x + (draws[2] - 0.5) * (1 - width) * view.side
    view.y = view.y + (draws[3] - 0.5) * (1 - height) * view.side
    view.width, view.height = view.width * width, view.height * height


def rotate(view: View, draws: Tensor, degrees: float) -> None:
    """Rotate images by up to `degrees` either way; the edge is repeated."""
    view.angle = view.angle + (draws[0] * 2 - 1) * math.radians(degrees)


def colour(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Scale brightness, contrast and saturation, each by a factor between 1 - strength and 1 + strength."""
    brightness, contrast, saturation = (1 + (draws * 2 - 1) * strength).view(3, -1, 1, 1)
    channels = [channel.float() for channel in images.unbind(3)]  # (N, H, W): apart, as threes are slow to broadcast
    grey = LUMA[0] * channels[0] + LUMA[1] * channels[1] + LUMA[2] * channels[2]
    middle = grey.mean((1, 2), keepdim=True)
    grey = grey * (contrast * (1 - saturation)) + middle * (1 - contrast)
    out = torch.empty_like(images)
    for number, channel in enumerate(channels):
        changed = (channel * (contrast * saturation) + grey) * brightness
        out[..., number] = changed.round().clamp(0, 255)
    return out


def cutout(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Grey out a square around a random point, its side a fraction `share` of the image's.

    T. DeVries and G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    arXiv:1708.04552.
    """
    half = images.new_full((images.shape[0],), share / 2, dtype=torch.float32)
    inside, _ = _boxes(images, draws[0], draws[1], half, half)
    return torch.where(inside, GREY, images.flatten(2)).view(images.shape)


def mixup(images: Tensor, draws: Tensor, pairs: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Blend images with others, `pairs` (N,), where `chosen` (N,); return them and the weight of each image (N,).

    H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412.
    """
    share = torch.where(chosen, draws[0], 1.0)
    share = torch.maximum(share, 1 - share)  # the image itself keeps the larger weight
    pixels = images.flatten(1).float()
    mixed = torch.lerp(pixels.index_select(0, pairs), pixels, share[:, None])
    return mixed.round().to(torch.uint8).view(images.shape), share


def cutmix(images: Tensor, draws: Tensor, pairs: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of others, `pairs` (N,), where `chosen` (N,); return images and the weight of each image (N,).

    S. Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
    arXiv:1905.04899.
    """
    half = torch.where(chosen, (1 - draws[0]).sqrt() / 2, 0.0)
    inside, area = _boxes(images, draws[1], draws[2], half, half)
    rows = images.flatten(2)
    return torch.where(inside, rows.index_select(0, pairs), rows).view(images.shape), 1 - area


class Kind(NamedTuple):
    """Augmentation function, and the random numbers that it takes per image."""

    apply: Callable[..., object]
    draws: int


GEOMETRY: dict[str, Kind] = {
    "flip": Kind(flip, 1),
    "alternating_flip": Kind(alternating_flip, 1),
    "shift": Kind(shift, 2),
    "crop": Kind(crop, 4),
    "rotate": Kind(rotate, 1),
}
PIXELS: dict[str, Kind] = {"colour": Kind(colour, 3), "cutout": Kind(cutout, 2)}
MIXES: dict[str, Kind] = {"mixup": Kind(mixup, 1), "cutmix": Kind(cutmix, 3)}
"""Mixing functions: the first of their random numbers is drawn from Beta(strength, strength)."""
AUGMENTATIONS = (*GEOMETRY, *PIXELS, *MIXES)
WHOLE_PIXELS = {"flip", "alternating_flip", "shift"}  # move pixels without interpolation


class Augment:
    """Gathers a batch from a feed's images and augments it.

    strengths: (name in `AUGMENTATIONS`, strength), applied in this order within each group.
    size: side of the result in pixels; images of another size are resized on the way.
    """

    def __init__(self, strengths: Sequence[tuple[str, float]], size: int) -> None:
        self.size = size
        self.geometry = [(GEOMETRY[name], strength) for name, strength in strengths if name in GEOMETRY]
        self.pixels = [(PIXELS[name], strength) for name, strength in strengths if name in PIXELS]
        self.mixes = [(MIXES[name], strength) for name, strength in strengths if name in MIXES]
        self.whole_pixels = {name for name, _ in strengths if name in GEOMETRY} <= WHOLE_PIXELS
        counts = [kind.draws for kind, _ in self.geometry + self.pixels + self.mixes]
        functions = [kind.apply for kind, _ in self.geometry]
        # Row of the random numbers of `alternating_flip`.
        self.alternating = sum(counts[: functions.index(alternating_flip)]) if alternating_flip in functions else None
        # With several mixes each image takes one of them: the last random number chooses.
        self.counts = [*counts, 1] if len(self.mixes) > 1 else counts
        self.num_draws = sum(self.counts)  # random numbers per image

    def draw(self, count: int, epoch: Epoch, sampling_weights: SamplingWeights = None) -> Tensor:
        """Return (num_draws, count) random numbers, on the CPU, for the images of an epoch, in its order.

        Those of `alternating_flip` are an image's own: in the next epoch each is 1/2 away.
        """
        generator = np.random.default_rng([*epoch, 1])  # [seed, epoch] is the order's
        draws = generator.random((self.num_draws, count), np.float32)
        if self.alternating is not None:
            own = np.random.default_rng([epoch[0], 0, 1]).random(count, np.float32)
            draws[self.alternating] = (own[shuffled(count, epoch, sampling_weights)] + epoch[1] % 2 / 2) % 1
        row = sum(kind.draws for kind, _ in self.geometry + self.pixels)
        for kind, alpha in self.mixes:
            draws[row] = generator.beta(alpha, alpha, count)
            row += kind.draws
        return torch.from_numpy(draws)

    def __call__(self, images: Tensor, photos: Tensor, labels: Tensor, draws: Tensor | None = None) -> Batch:
        """Return the augmented batch of the images at indices `photos` (N,) of `images` (M, H, H, 3) uint8.

        labels: (N,) int64.
        draws: (num_draws, N) from `draw`; None where no augmentation needs any.
        """
        numbers = iter(() if draws is None else draws.split(self.counts))
        view = View(len(photos), images.shape[1], images.device)
        for kind, strength in self.geometry:
            kind.apply(view, next(numbers), strength)
        if self.whole_pixels and view.side == self.size:
            batch = _moved(images, photos, view) if self.geometry else images.index_select(0, photos)
        else:
            batch = _sampled(images.index_select(0, photos), view, self.size)
        for kind, strength in self.pixels:
            batch = kind.apply(batch, next(numbers), strength)  # type: ignore[assignment]
        return self._mixed(batch, labels, list(numbers))

    def _mixed(self, batch: Tensor, labels: Tensor, draws: list[Tensor]) -> Batch:
        if not self.mixes:
            return Batch(batch, labels)
        line = torch.arange(len(labels), device=labels.device)
        pairs = torch.where(line == len(labels) // 2 * 2, line, line ^ 1)  # neighbours; a last odd one with itself
        share = torch.ones(len(labels), device=labels.device)
        for number, ((kind, _), own) in enumerate(zip(self.mixes, draws, strict=False)):
            chosen = (draws[-1][0] * len(self.mixes)).long() == number if len(self.mixes) > 1 else line >= 0
            mixed: Any = kind.apply(batch, own, pairs, chosen)
            batch, left = mixed
            share = share * left
        return Batch(batch, labels, labels.index_select(0, pairs), share)


def _moved(images: Tensor, photos: Tensor, view: View) -> Tensor:
    """Return (N, side, side, 3) uint8: a view of whole pixels of the images at indices `photos`; edges are repeated."""
    side, line = view.side, torch.arange(view.side, device=images.device)
    mirror, x, y = (one.round().long()[:, None] for one in (view.width.sign(), view.x, view.y))
    columns = (mirror * line + torch.where(mirror < 0, side - 1, 0) + x).clamp(0, side - 1)  # (N, W)
    rows = (line + y).clamp(0, side - 1)  # (N, H)
    places = (photos[:, None, None] * side + rows[:, :, None]) * side + columns[:, None, :]  # (N, H, W)
    return images.view(-1, 3).index_select(0, places.view(-1)).view(len(photos), side, side, 3)


def _sampled(images: Tensor, view: View, size: int) -> Tensor:
    """Return (N, size, size, 3) uint8: a view of images (N, H, H, 3), interpolated bilinearly."""
    # In halves of the side from the centre, as grid_sample counts.
    line = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    across, down = line * view.width[:, None], line * view.height[:, None]  # (N, size)
    cos, sin = view.angle.cos()[:, None, None], view.angle.sin()[:, None, None]
    half = view.side / 2
    x = cos * across[:, None, :] - sin * down[:, :, None] + (view.x / half)[:, None, None]
    y = sin * across[:, None, :] + cos * down[:, :, None] + (view.y / half)[:, None, None]
    pixels = images.permute(0, 3, 1, 2).float()
    found = F.grid_sample(pixels, torch.stack([x, y], 3), "bilinear", "border", align_corners=False)
    return found.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _boxes(images: Tensor, x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, H, W * 3) whether a value lies in its image's box, and (N,) the box's fraction of the area.

    x, y: (N,) centres; half_width, half_height: (N,); all as fractions of the side, clipped at the edges.
    """
    line = (torch.arange(images.shape[1], device=images.device) + 0.5) / images.shape[1]
    columns = (line - x[:, None]).abs() < half_width[:, None]  # (N, W)
    rows = (line - y[:, None]).abs() < half_height[:, None]  # (N, H)
    area = columns.float().mean(1) * rows.float().mean(1)
    return rows[:, :, None] & columns.repeat_interleave(3, 1, output_size=3 * images.shape[2])[:, None, :], area
