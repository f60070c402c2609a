"""What a photo's file is, without its pixels; and a small picture of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines import pillow
from pipelines.verdict import EXTENSIONS, MAX_PIXELS, Source, Unusable, image_format, read


@dataclass(frozen=True, slots=True)
class Facts:
    """A file's format (by content) and what its header says; size 0x0 where it cannot be read."""

    format: str = ""
    mode: str = ""
    """Pillow's name of how pixels are stored: RGB, L (grey), P (palette), RGBA, CMYK, I;16..."""
    width: int = 0
    height: int = 0
    orientation: int = 1
    progressive: bool = False


def facts(source: Source, *, header: bool = True) -> Facts:
    """Return the facts of a file. Never raises for a bad one: what cannot be read is left out.

    Without `header` the format alone is told, and no decoder's code meets the file: one of which decoders die.
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
    """Whether a file's name claims another format than its content has. No extension claims nothing."""
    extension = Path(path).suffix[1:].lower()
    return bool(format) and bool(extension) and extension not in EXTENSIONS[format]


def thumbnail(source: Source, side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return a JPEG of at most side x side, upright, in the photo's own proportions. Raises whatever is wrong."""
    pillow.prepare(max_pixels)
    image = pillow.load(read(source), max_pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
