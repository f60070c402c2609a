"""Verdict on a file: whether it is a usable photo, the same for all decoders."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np


class Member(NamedTuple):
    """A photo that is part of a file, as in a tar archive: `size` bytes from `offset` on."""

    archive: str
    offset: int
    size: int


Source = str | os.PathLike[str] | bytes | Member
"""A path (str or PathLike), an encoded photo (bytes), or part of a file."""

Box = np.ndarray | Callable[[int, int], np.ndarray]
"""(4,) left, top, right, bottom in pixels of the upright photo, or a function (width, height) -> (4,)."""

Reason = Literal[
    "",
    "unreadable",
    "empty",
    "not an image",
    "unsupported format",
    "too large",
    "truncated",
    "corrupt",
    "decoder crash",
    "decoder killed",
    "decoder hung",
]
"""Why a photo cannot be used. The last three are those of worker processes: the decoder crashed, was killed by the
system, or did not end within its time limit."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit, too; no camera makes more in one shot (the largest sensor has 151 million)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of decoding one source: usable (`reason` is ""), or why not."""

    reason: Reason = ""
    detail: str = ""
    warning: str = ""
    """Damage of a usable photo: a JPEG with wrong or missing data that decodes all the same."""

    @property
    def ok(self) -> bool:
        """Whether the pixels were written."""
        return not self.reason


USABLE = Verdict()


class Unusable(Exception):
    """A source is unusable; raised inside this package."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.verdict = Verdict(reason, detail)
        super().__init__(reason, detail)


def read(source: Source) -> bytes:
    """Return the encoded photo. Raises Unusable."""
    if isinstance(source, bytes):
        data = source
    else:
        path = source.archive if isinstance(source, Member) else source
        try:
            # A named pipe would block for ever, a device never end.
            info = os.stat(path)  # noqa: PTH116 - 3 us less than Path.stat
            if not stat.S_ISREG(info.st_mode):
                raise Unusable("unreadable", "a folder" if Path(path).is_dir() else "not a regular file")
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - for the same reason
                data = _part(file, source, info.st_size) if isinstance(source, Member) else file.readall()
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise Unusable("unreadable", getattr(error, "strerror", None) or str(error)) from error
    if not data:
        raise Unusable("empty")
    return data


def _part(file: FileIO, member: Member, length: int) -> bytes:
    """Return part of a file of this length; no memory is allocated for bytes beyond its end."""
    data = b""
    if member.offset + member.size <= length:
        file.seek(member.offset)
        while len(data) < member.size and (more := file.read(member.size - len(data))):
            data += more
    if len(data) < member.size:
        raise Unusable("truncated", "the archive ends before it does")
    return data


def image_format(data: bytes) -> str:
    """Return Pillow's name of the content's format. Raises Unusable: "not an image", "unsupported format"."""
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    # "BM" alone also starts English text; the length of the second header tells.
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADERS:
        return "BMP"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 128)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")):
            raise Unusable("unsupported format", "HEIC")
    for magic, name in _UNSUPPORTED.items():
        if data.startswith(magic):
            raise Unusable("unsupported format", name)
    raise Unusable("not an image", f"starts with {data[:8]!r}")


def webp_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in the header of a WebP, or (1, 1) where it cannot be read."""
    kind, number = data[12:16], int.from_bytes
    if kind == b"VP8X":
        return 1 + number(data[24:27], "little"), 1 + number(data[27:30], "little")
    if kind == b"VP8L":
        bits = number(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return number(data[26:28], "little") & 0x3FFF, number(data[28:30], "little") & 0x3FFF
    return 1, 1


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise Unusable where a header claims no pixels, or more than `max_pixels`."""
    if width < 1 or height < 1:
        raise Unusable("corrupt", f"{width}x{height} pixels")
    if width * height > max_pixels:
        raise Unusable("too large", f"{width}x{height} pixels")


def explain(error: Exception) -> Verdict:
    """Return the verdict for an error that Pillow raised on an image of a known format."""
    if isinstance(error, Unusable):
        return error.verdict
    detail = str(error) or type(error).__name__
    words = f"{type(error).__name__} {detail}".lower()
    if "bomb" in words or isinstance(error, MemoryError):
        return Verdict("too large", detail.partition(" exceeds")[0])
    if "truncated" in words or isinstance(error, EOFError):
        return Verdict("truncated", detail)
    if isinstance(error, (NotImplementedError, ImportError)) or any(
        word in words for word in ("unsupported", "not supported")
    ):
        return Verdict("unsupported format", detail)
    return Verdict("corrupt", detail)


EXTENSIONS = {
    "AVIF": ("avif",),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "HEIC": ("heic", "heif"),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "JPEG2000": ("jp2", "j2k", "jpf", "jpx", "j2c", "jpc"),
    "PNG": ("png",),
    "PPM": ("ppm", "pgm", "pnm"),
    "TIFF": ("tiff", "tif"),
    "WEBP": ("webp",),
}
"""Format, as `image_format` names it -> extensions of such files, in small letters, the usual one first."""

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"P5\n": "PPM",
    b"P6\n": "PPM",
}

# Images that are refused. Pillow would have Ghostscript execute an EPS file, which is a program.
_UNSUPPORTED = {
    b"8BPS": "Photoshop",
    b"%!PS": "PostScript",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\1\0": "icon",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"DDS ": "DDS",
}

_BMP_HEADERS = {bytes([length, 0, 0, 0]) for length in (12, 40, 52, 56, 64, 108, 124)}
