"""Decoders: paths, parts of files or bytes in, (n, size, size, 3) uint8 pixels out, and a verdict on every source.

A decoder is one module with `decode` and `identity` (and `close`, if it keeps state) and one line in `BACKENDS`.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from pipelines.verdict import MAX_PIXELS, Box, Member, Source, Verdict

__all__ = [
    "BACKENDS", "MAX_PIXELS", "Boxes", "DecoderUnavailable", "Member", "Source", "Verdict", "choose", "close",
    "decode", "decode_whole", "identity",
]  # fmt: skip

BACKENDS = {
    "dali": "pipelines.dali",
    "turbo": "pipelines.turbo",
    "pillow": "pipelines.pillow",
}
"""Decoder -> its module, imported on first use."""

Boxes = np.ndarray | Callable[[int, int, int], np.ndarray]
"""(n, 4) left, top, right, bottom; or a function (position, upright width, upright height) -> (4,)."""

_imported: dict[str, ModuleType] = {}


class DecoderUnavailable(RuntimeError):
    """The decoder `name` cannot be used here; the message says why and how to install it."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why
        super().__init__(f"decoder {name!r} cannot be used: {why}")


def choose(decoder: str, *, gpu: bool) -> tuple[str, str]:
    """Return (name, note): the decoder that `decoder` ("auto" or a name) means here, and why it is not a better one.

    "auto" is DALI where `gpu` is true, else turbo, else Pillow. The note is "" where the preferred one can be used.
    Raises DecoderUnavailable for a named decoder that cannot be imported, ValueError for an unknown name.
    """
    if decoder != "auto":
        _backend(decoder)
        return decoder, ""
    notes: list[str] = []
    for name in ("dali", "turbo") if gpu else ("turbo",):
        try:
            _backend(name)
        except DecoderUnavailable as error:
            notes.append(error.why)
        else:
            return name, _note(notes, f"{name} on the CPU")
    return "pillow", _note(notes, "Pillow on the CPU")


def decode(
    sources: Sequence[Source],
    size: int,
    out: np.ndarray,
    boxes: Boxes | None = None,
    *,
    decoder: str = "turbo",
    workers: int | None = None,
    gpu: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Verdict]:
    """Write the pixels of each usable source into its row of `out`; return the verdict on each source, in their order.

    Args:
        sources: n paths, encoded photos as bytes, or parts of files (`Member`).
        size: side of the decoded photos in pixels.
        out: (n, size, size, 3) uint8, C-contiguous. Each photo upright, in RGB, squashed to size x size (bilinear,
            antialiased). Rows of unusable sources are zeroed.
        boxes: (n, 4) float, the part of each upright photo to show: left, top, right, bottom in pixels, clipped to the
            photo; None shows all. Or a function (position, width, height) -> (4,), called in a decoding thread once the
            photo's size is known, so that no file is read twice.
        decoder: a name in BACKENDS ("auto" is for `choose`, whose answer belongs into cache keys).
        workers: decoding threads; None is one for each core that this process may use.
        gpu: index of the device on which DALI decodes; None is the CPU. The other decoders ignore it.
        max_pixels: a photo whose header claims more is "too large" and is not decoded. A value above the default also
            raises Pillow's own limit in this process.

    Raises DecoderUnavailable, and ValueError for arrays of a wrong shape or type and for boxes without area in the
    photo. A bad photo never raises: it gets a verdict.
    """
    if out.shape != (len(sources), size, size, 3) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be {(len(sources), size, size, 3)} uint8, C-contiguous; got {out.shape} {out.dtype}"
            f"{'' if out.flags.c_contiguous else ', not contiguous'}"
        )
    parts: Sequence[Box] | None = None
    if callable(boxes):
        parts = [functools.partial(boxes, i) for i in range(len(sources))]
    elif boxes is not None:
        boxes = np.asarray(boxes, np.float64)
        parts = list(boxes)
        if boxes.shape != (len(sources), 4) or not (boxes[:, 2:] > boxes[:, :2]).all():
            raise ValueError(f"boxes must be {(len(sources), 4)}: left < right, top < bottom; got {boxes.shape}")
    backend = _backend(decoder)
    verdicts: list[Verdict] = backend.decode(sources, size, out, parts, workers or num_cores(), gpu, max_pixels)
    return verdicts


def decode_whole(source: Source, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, Verdict]:
    """Return the photo as Pillow decodes it, (height, width, 3) uint8, upright and in RGB, and its verdict.

    The pixels of a bad photo are (0, 0, 3).
    """
    whole = _backend("pillow").whole
    result: tuple[np.ndarray, Verdict] = whole(source, max_pixels)
    return result


def close() -> None:
    """Release the state of decoders (DALI's pipelines). No decoding is in flight afterwards."""
    for backend in _imported.values():
        if hasattr(backend, "close"):
            backend.close()


def identity(decoder: str, gpu: int | None) -> str:
    """Return the version of a decoder's pixels, for cache keys, such as "turbo-2" or "dali-gpu-2"."""
    answer: str = _backend(decoder).identity(gpu)
    return answer


def _backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"unknown decoder {name!r}: one of {', '.join(BACKENDS)}")
    if name not in _imported:
        try:
            _imported[name] = importlib.import_module(BACKENDS[name])
        except ImportError as error:
            raise DecoderUnavailable(name, _why(name, error)) from error
    return _imported[name]


def _why(name: str, error: ImportError) -> str:
    package, install = {
        "dali": ("nvidia-dali", "pip install 'fastcnn[cuda13]' (or cuda12)"),
        "turbo": ("simplejpeg", "pip install simplejpeg"),
    }.get(name, ("Pillow", "pip install Pillow"))
    missing = isinstance(error, ModuleNotFoundError)
    return f"{package} {'is not installed' if missing else f'cannot be imported ({error})'}; {install}"


def _note(notes: list[str], used: str) -> str:
    return f"photos are decoded by {used}: {'; '.join(notes)}" if notes else ""


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
