"""libjpeg-turbo's scaled decoding in threads: the fastest on a CPU. All but plain JPEGs is decoded by Pillow."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg

from pipelines import pillow
from pipelines.jpeg import Header, header, upright_size
from pipelines.threads import each
from pipelines.verdict import USABLE, Box, Source, Verdict, check_pixels


def decode(
    sources: Sequence[Source],
    size: int,
    out: np.ndarray,
    boxes: Sequence[Box] | None,
    workers: int,
    gpu: int | None,
    max_pixels: int,
) -> list[Verdict]:
    """See `pipelines.decode`."""
    pillow.prepare(max_pixels)
    return each(lambda data, row, box: _one(data, size, row, box, max_pixels), sources, out, boxes, workers)


def identity(gpu: int | None) -> str:
    """See `pipelines.identity`."""
    return "turbo-2"


def _one(data: bytes, size: int, row: np.ndarray, box: Box | None, max_pixels: int) -> Verdict:
    head = header(data)
    if head is None:
        return pillow.one(data, size, row, box, max_pixels)
    check_pixels(head.width, head.height, max_pixels)
    part = _stored(box, head)
    scale = _scale(part, size)
    # Colours, usually stored at half the size, are upsampled roughly where they shrink again: 0.86 instead of 0.99 ms
    # of CPU a photo, 0.10 instead of 0.01 levels from Pillow. Without shrinking: above 3. (fastdct gained nothing.)
    fast = min(part[2] - part[0], part[3] - part[1]) >= 2 * size
    # Rounded up as libjpeg does, so that exactly this scale is used.
    height, width = -(-head.height // scale), -(-head.width // scale)
    try:
        pixels = decode_jpeg(data, "RGB", fastupsample=fast, min_height=height, min_width=width)
    except ValueError:  # strict: damaged data
        return pillow.one(data, size, row, box, max_pixels)
    if box is None:
        resized = _resize(pixels, size)
    else:
        across, down = width / head.width, height / head.height
        scaled = part[0] * across, part[1] * down, min(part[2] * across, width), min(part[3] * down, height)
        resized = pillow.resize(Image.fromarray(pixels), size, scaled)
    # The squash to a square and the turn commute: the small photo is cheaper to turn.
    row[...] = _upright(resized, head.orientation)
    return USABLE


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return (size, size, 3) uint8, within one level of Pillow's resize.

    torch took 0.21 ms for 400 x 533 pixels where Pillow took 1.1 (it stores 4 bytes a pixel and has no AVX2), which
    makes turbo more than twice as fast. Without AVX2 torch is the slower one.
    """
    if not _AVX2:
        return pillow.resize(Image.fromarray(pixels), size, None)
    # torch sees these strides as channels_last, so the result is interleaved, too.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _scale(part: tuple[float, float, float, float], size: int) -> int:
    """Return the largest of 8, 4, 2, 1 that leaves 4 times the target on both sides.

    A scaled decode is sharper than Pillow's filter. Mean difference from Pillow a photo, 1,500 photos of clothing-10,
    decoded at 1/2 to 1.56, 2, 3 and 4 times the target: 0.98, 0.80, 0.56 and 0.44 levels on average; 32, 12, 1 and 0
    photos above 2.5; at most 4.5, 3.6, 2.8 and 2.0. Whole, at most 0.14, and that takes 1.4 times the scaled time.
    """
    side = min(part[2] - part[0], part[3] - part[1])
    return next((scale for scale in (8, 4, 2) if side >= 4 * size * scale), 1)


def _stored(box: Box | None, head: Header) -> tuple[float, float, float, float]:
    """Return a box of the upright photo in pixels of the photo as stored."""
    left, top, right, bottom = pillow.clip(box, *upright_size(head))
    if head.orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    if head.orientation in _MIRRORED:
        left, right = head.width - right, head.width - left
    if head.orientation in _FLIPPED:
        top, bottom = head.height - bottom, head.height - top
    return left, top, right, bottom


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in _MIRRORED:
        pixels = pixels[:, ::-1]
    if orientation in _FLIPPED:
        pixels = pixels[::-1]
    return pixels.transpose(1, 0, 2) if orientation >= 5 else pixels


_AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

# An EXIF orientation is a flip left to right, a flip top to bottom, then (5 to 8) a transposition.
_MIRRORED = {2, 3, 7, 8}
_FLIPPED = {3, 4, 6, 7}
