"""Pillow, the reference decoder: every format that Pillow reads, on every system.

The other decoders pass on the files that they cannot read, so that a file has the same verdict with any decoder.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from pipelines.jpeg import damage, header, strict
from pipelines.threads import each
from pipelines.verdict import (
    MAX_PIXELS,
    USABLE,
    Box,
    Source,
    Unusable,
    Verdict,
    check_pixels,
    explain,
    image_format,
    read,
    webp_size,
)


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
    prepare(max_pixels)
    return each(lambda data, row, box: _one(data, size, row, box, max_pixels), sources, out, boxes, workers)


def identity(gpu: int | None) -> str:
    """See `pipelines.identity`."""
    return "pillow-2"


def prepare(max_pixels: int) -> None:
    """Silence Pillow's own warnings, which verdicts replace, and raise its limit to `max_pixels` where that is above.

    Both stay so: they belong to the process, and no thread can restore them.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if max_pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)


def one(data: bytes, size: int, row: np.ndarray, box: Box | None, max_pixels: int) -> Verdict:
    """Write the photo in `data` into `row` (size, size, 3) uint8; return its verdict. Call `prepare` before."""
    try:
        image = load(data, max_pixels)
    except Exception as error:  # plugins raise whatever a damaged file makes them trip over
        return explain(error)
    row[...] = resize(image, size, clip(box, image.width, image.height))
    warning = damage(data) if data.startswith(b"\xff\xd8") else ""
    return Verdict(warning=warning) if warning else USABLE


def _one(data: bytes, size: int, row: np.ndarray, box: Box | None, max_pixels: int) -> Verdict:
    """As `one`, with plain JPEGs decoded strictly: the same pixels without a second pass for damage."""
    head = header(data)
    if head is not None:
        check_pixels(head.width, head.height, max_pixels)
        pixels = strict(data)
        if pixels is not None:
            image = _upright(Image.fromarray(pixels), head.orientation)
            row[...] = resize(image, size, clip(box, image.width, image.height))
            return USABLE
    return one(data, size, row, box, max_pixels)


def whole(source: Source, max_pixels: int) -> tuple[np.ndarray, Verdict]:
    """See `pipelines.decode_whole`."""
    prepare(max_pixels)
    try:
        return np.array(load(read(source), max_pixels)), USABLE
    except Exception as error:
        return np.zeros((0, 0, 3), np.uint8), explain(error)


def resize(image: Image.Image, size: int, box: tuple[float, float, float, float] | None) -> np.ndarray:
    """Return the box of an RGB image (None for all of it), squashed to (size, size, 3) uint8."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def load(data: bytes, max_pixels: int) -> Image.Image:
    """Return the photo, or its first frame, upright and in RGB. Raises Unusable, or an error of Pillow's plugins."""
    image = open_image(data, image_format(data), max_pixels)
    image.load()
    # Orientation is read after loading: TIFF has turned the pixels by then, PNG may have it at the end.
    return _upright(_rgb(image), orientation(image))


def open_image(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """Return the photo, of a format named by `image_format`, with its header read and no pixels allocated."""
    if name == "WEBP":  # Pillow allocates its pixels on opening
        check_pixels(*webp_size(data), max_pixels)
    try:
        # Only the format of the content: Pillow would try 40 others, PostScript among them.
        image: Image.Image = Image.open(io.BytesIO(data), formats=_PLUGINS.get(name, (name,)))
    except UnidentifiedImageError as error:
        if name in _OPTIONAL and not features.check(_OPTIONAL[name]):
            raise Unusable("unsupported format", f"this Pillow reads no {name}") from error
        raise Unusable("corrupt", f"the header of this {name} cannot be read") from error
    check_pixels(*image.size, max_pixels)
    return image


def clip(box: Box | None, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the box (None is the whole photo) cut to the photo. Raises ValueError where nothing is left."""
    if box is None:
        return 0, 0, width, height
    if callable(box):
        box = box(width, height)
    left, top, right, bottom = (float(edge) for edge in box)
    inside = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise ValueError(f"box {(left, top, right, bottom)} lies outside the photo of {width}x{height} pixels")
    return inside


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, usually 1 to 8; 1 where there is none."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF is no reason to refuse the photo
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB: transparency over white, 16 bits scaled to 8, embedded colour profiles not applied."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[:1] in "IF":
        return Image.fromarray(_levels(np.asarray(image))).convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # Pillow can be built without it: "unsupported format"

    lab: Any = ImageCms.createProfile("LAB")
    srgb: Any = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _levels(values: np.ndarray) -> np.ndarray:
    """Return grey values of any type as (H, W) uint8; by their range, white is 1, 255 or 65535."""
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest <= 65535):  # so also for NaN
        raise Unusable("unsupported format", f"grey values from {lowest} to {highest}")
    if values.dtype == np.uint16 or highest > 255:
        return (values / 257 + 0.5).astype(np.uint8)
    if values.dtype.kind == "f" and highest <= 1:
        return (values * 255 + 0.5).astype(np.uint8)
    return values.astype(np.uint8)


_PLUGINS = {"JPEG": ("JPEG", "MPO")}
_OPTIONAL = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
