"""What each augmentation does to pixels and labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.config import STRENGTHS
from fastcnn.data.feeds import shuffled
from fastcnn.network.pixels import resized
from fastcnn.training.augment import AUGMENTATIONS, Augment, Batch

SIDE, COUNT = 32, 64


def noise(side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (COUNT, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def smooth(side: int = SIDE) -> Tensor:
    """Photos whose neighbouring pixels are alike: interpolation changes them little."""
    small = torch.rand(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    large = F.interpolate(small, (side, side), mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def changed(images: Tensor, *names: str, size: int = SIDE, **strengths: float) -> Batch:
    augment = Augment([(name, strengths.get(name, STRENGTHS[name][0])) for name in names], size)  # type: ignore[index]
    everything = torch.arange(len(images))
    return augment(images, everything, everything % 10, augment.draw(len(images), (0, 1)))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("side", [SIDE, 48])
def test_every_augmentation_keeps_shape_and_type_and_repeats_by_seed(name: str, side: int) -> None:
    images = noise(side)
    first, again = changed(images, name), changed(images, name)
    assert first.images.shape == (COUNT, SIDE, SIDE, 3)
    assert first.images.dtype == torch.uint8
    assert first.images.is_contiguous()
    assert torch.equal(first.images, again.images)
    assert torch.equal(images, noise(side))
    assert not torch.equal(first.images, resized(images, SIDE))


def test_none_is_the_photos_asked_for() -> None:
    images, photos = noise(), torch.tensor([5, 3, 5])
    batch = Augment((), SIDE)(images, photos, torch.tensor([1, 2, 1]))
    assert torch.equal(batch.images, images[photos])
    assert batch.labels.tolist() == [1, 2, 1]
    assert batch.others is None


def test_shift_moves_whole_pixels_and_repeats_the_edge() -> None:
    images = noise()
    moved = changed(images, "shift", shift=0.25).images
    for photo, found in zip(images, moved, strict=True):
        padded = np.pad(photo.numpy(), ((8, 8), (8, 8), (0, 0)), mode="edge")
        assert any(
            np.array_equal(padded[y : y + SIDE, x : x + SIDE], found.numpy()) for x in range(17) for y in range(17)
        )


def test_flip_and_shift_go_through_the_same_pixels_as_interpolation() -> None:
    """Whole pixels, gathered, are what bilinear sampling gives at whole places: a turn by nothing forces it."""
    images = noise()
    gathered = changed(images, "flip", "shift")
    sampled = changed(images, "flip", "shift", "rotate", rotate=1e-9)
    # The draws come in one block: the same for the first three rows.
    difference = (gathered.images.int() - sampled.images.int()).abs()
    assert difference.max() <= 1


def test_rotate_by_a_right_angle() -> None:
    images = smooth()
    found = changed(images, "rotate", rotate=180).images
    angles = Augment([("rotate", 180.0)], SIDE).draw(COUNT, (0, 1)) * 2 - 1
    nearest = (angles[0].abs() - 0.5).abs().argmin()  # of all, the closest to 90 degrees
    turned = torch.rot90(images[nearest], 1 if angles[0, nearest] > 0 else -1, (0, 1))
    assert (found[nearest].float() - turned.float()).abs().mean() < 6


def test_crop_shows_parts_of_the_photo() -> None:
    ramp = torch.arange(SIDE, dtype=torch.uint8).repeat(COUNT, SIDE, 1)[..., None].repeat(1, 1, 1, 3) * 8
    found = changed(ramp, "crop", crop=0.5).images[..., 0].int()
    widths = (found[:, 16, -1] - found[:, 16, 0]) / (8 * (SIDE - 1))
    assert (widths > 0.5 * 0.75 - 0.1).all()
    assert (widths <= 1).all()
    assert widths.min() < 0.75 < widths.max()


def test_colour_of_no_strength_is_nothing_and_of_some_keeps_grey_grey() -> None:
    assert torch.equal(changed(noise(), "colour", colour=1e-6).images, noise())
    grey = noise()[..., :1].repeat(1, 1, 1, 3)
    found = changed(grey, "colour", colour=0.5).images
    assert (found.amax(3).int() - found.amin(3).int()).max() <= 1
    assert not torch.equal(found, grey)


def test_cutout_greys_out_a_square() -> None:
    images = noise()
    found = changed(images, "cutout", cutout=0.25).images
    gone = (found != images).any(3).flatten(1).sum(1)
    assert gone.max() <= 8 * 8
    assert 40 < gone.float().mean() <= 64  # less at the edges
    assert (found[(found != images).any(3)] == 128).all()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixes_say_what_they_mixed(name: str) -> None:
    """From photos of one level each: the mean of the result tells the share."""
    levels = torch.arange(COUNT) * 4
    images = levels.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, SIDE, SIDE, 3)
    batch = changed(images, name, **{name: 1.0})
    assert batch.others is not None
    assert batch.share is not None
    pairs = torch.arange(len(levels)) ^ 1
    assert torch.equal(batch.others, batch.labels[pairs])
    expected = batch.share * levels + (1 - batch.share) * levels[pairs]
    torch.testing.assert_close(batch.images.float().mean((1, 2, 3)), expected, atol=0.6, rtol=0)
    assert batch.share.min() >= (0.5 if name == "mixup" else 0)
    assert 0 < batch.share.mean() < 1


def test_of_two_mixes_each_photo_takes_one() -> None:
    levels = torch.arange(COUNT) * 4
    images = levels.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, SIDE, SIDE, 3)
    found = changed(images, "mixup", "cutmix", mixup=1.0, cutmix=1.0).images
    blended = (found[:, 0, 0, 0] == found[:, -1, -1, 0]) & (found.flatten(1).float().std(1) == 0)
    assert 16 < blended.sum() < 56


def test_resized_is_what_an_exported_model_does() -> None:
    from fastcnn.network.inference_network import Deployed

    class Means(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    images = noise(48)
    deployed = Deployed(Means(), SIDE, (0, 0, 0), (1, 1, 1), "abc")
    expected = resized(images, SIDE).float().mean((1, 2)) / 255
    torch.testing.assert_close(deployed(images), expected.softmax(1))


@pytest.mark.parametrize("others", [(), ("shift", "colour")])
def test_alternating_flip_mirrors_each_image_in_every_other_epoch(others: tuple[str, ...]) -> None:
    """Whatever the order of the epochs; half of the images begin mirrored."""
    names = [others[0], "alternating_flip", *others[1:]] if others else ["alternating_flip"]
    augment = Augment([(name, STRENGTHS[name][0]) for name in names], SIDE)  # type: ignore[index]
    row = 2 if others else 0
    mirrored = []
    for epoch in range(1, 5):
        draws = augment.draw(200, (7, epoch))
        images = torch.empty(200, dtype=torch.bool)
        images[torch.from_numpy(shuffled(200, (7, epoch)))] = draws[row] < 0.5
        mirrored.append(images)
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])
    assert 60 < int(mirrored[0].sum()) < 140
