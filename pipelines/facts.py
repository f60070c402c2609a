"""Facts about a photo's file without its pixels: format, size, orientation; and thumbnails."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines import pillow
from pipelines.verdict import EXTENSIONS, MAX_PIXELS, Source, Unusable, image_format, read


@dataclass(frozen=True, slots=True)
class Facts:
    """Format of a file, by its content, and the values in its header; size 0x0 where that cannot be read."""

    format: str = ""
    mode: str = ""
    """Pillow's mode: RGB, L (grey), P (palette), RGBA, CMYK, I;16..."""
    width: int = 0
    height: int = 0
    orientation: int = 1
    progressive: bool = False


def facts(source: Source, *, header: bool = True) -> Facts:
    """Return the facts about a file, without those that cannot be read. Never raises for a bad file.

    Without `header` they are the format alone, and no decoder reads the file, for files that crash decoders.
    """
    try:
        data = read(source)
        name = image_format(data)
    except Unusable:
        return Facts()
    if not header:
        return Facts(name)
    pillow.prepare(MAX_PIXELS)
    try:
        image = pillow.open_image(data, name, MAX_PIXELS)
        width, height = image.size
        return Facts(name, image.mode, width, height, pillow.orientation(image), bool(image.info.get("progressive")))
    except Exception:  # plugins raise whatever a damaged file makes them trip over
        return Facts(name)


def misnamed(path: str, format: str) -> bool:
    """Return whether a file's extension, if it has one, is of another format than its content."""
    extension = Path(path).suffix[1:].lower()
    return bool(format) and bool(extension) and extension not in EXTENSIONS[format]


def thumbnail(source: Source, side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return a JPEG of at most side x side pixels, upright, in the photo's proportions. Raises on a bad photo."""
    pillow.prepare(max_pixels)
    image = pillow.load(read(source), max_pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
