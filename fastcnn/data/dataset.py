"""A folder of photos made ready: scanned, decoded into the cache, rid of what cannot be used, and split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

import pipelines
from fastcnn.config import Decoder, Loader
from fastcnn.data import loaders
from fastcnn.data.cache import Cache, build, fits_on_disk
from fastcnn.data.index import Index, check_classes, scan, scan_held_out
from fastcnn.data.split import draw_split, read_split
from fastcnn.errors import DataError, FastCNNError, fall_back, warn
from fastcnn.storage import files
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.system.stopwatch import Stopwatch
from fastcnn.system.text import printable

NUM_NAMED = 10  # bad photos that an error names


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The usable photos of a folder, with pixels, labels and splits."""

    index: Index
    cache: Cache
    splits: npt.NDArray[np.str_]
    """(N,) train, val or test of each photo of the index."""
    bad: dict[str, str]
    """Path -> reason of every photo left out."""
    damaged: dict[str, str]
    """Path -> what is wrong with a photo that is used all the same."""
    decoder: Decoder
    """What decoded the photos; never auto."""
    loader: Loader
    """How they are to be fed; never auto."""
    loader_reason: str
    """Why, where it was auto."""
    max_pixels: int
    """Pixels above which photos were left out."""

    def photos(self, split: str) -> npt.NDArray[np.intp]:
        """Return the positions in the index of a split's photos."""
        return np.flatnonzero(self.splits == split)

    def pixels(self, photos: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """Return (n, size, size, 3): the pixels of photos, by their positions in the index, in memory."""
        if self.loader != "stream":
            return self.cache.pixels(photos)
        out = np.zeros((len(photos), *self.cache.images.shape[1:]), np.uint8)
        sources = self.index.sources(photos)
        pipelines.decode(sources, out.shape[1], out, decoder=self.decoder, max_pixels=self.max_pixels)
        return out


def prepare(
    root: str | Path,
    *,
    image_size: int,
    decoder: Decoder = "auto",
    gpu: int | None = None,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    loader: Loader = "resident",
    memory_limit: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    split: str | Path | None = None,
    classes: Sequence[str] | None = None,
    max_bad: float = 0.05,
    max_pixels: int | None = None,
    strict: bool = False,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
    stopwatch: Stopwatch | None = None,
) -> Dataset:
    """Return the dataset of a folder.

    The arguments are those of `index.scan`, `loader.choose`, `cache.build` and `index.split`.

    With `classes`, those of a model to be scored, it holds the photos of `index.scan_held_out`, split by their folders.

    Raises DataError where the folder cannot be used or more than `max_bad` of its photos are unusable, FastCNNError
    where the decoder is missing or the cache cannot be written.
    """
    stopwatch = stopwatch or Stopwatch()
    with stopwatch.stage("scan"):
        index = ranks.broadcast(lambda: scan(root) if classes is None else scan_held_out(root, classes))
    hidden = f", {index.num_hidden} hidden files skipped" if index.num_hidden else ""
    note(f"{len(index):,} photos of {len(index.classes)} classes in {index.root}{hidden}")
    try:
        chosen, missing = pipelines.choose(decoder, gpu=gpu is not None)
    except pipelines.DecoderUnavailable as error:
        raise FastCNNError(str(error)) from None
    if missing:
        fall_back(missing, strict=strict)
    decoding_gpu = gpu if chosen == "dali" else None
    picked, why = ranks.broadcast(
        lambda: loaders.choose(
            loader,
            len(index) * image_size**2 * 3,
            on_disk=fits_on_disk(
                index,
                image_size=image_size,
                decoder=chosen,
                gpu=decoding_gpu,
                cache_dir=cache_dir,
                max_pixels=max_pixels,
            ),
            device=torch.device("cpu") if gpu is None else torch.device("cuda", gpu),
            memory_limit=memory_limit,
            ranks=ranks,
        )
    )
    if why:
        note(f"loader {picked}: {why}")
    with stopwatch.stage("decode"):
        cache = build(
            index,
            image_size=image_size,
            decoder=chosen,
            gpu=decoding_gpu,
            workers=workers,
            cache_dir=cache_dir,
            keep_pixels=picked != "stream",
            max_pixels=max_pixels,
            strict=strict,
            ranks=ranks,
            progress=progress,
            note=note,
        )
    pipelines.close()  # nothing of DALI may be in flight while a CUDA graph is captured
    bad = {path: reason for path, reason in zip(index.paths, cache.reasons, strict=True) if reason}
    if bad:
        _report_bad(bad, len(index), max_bad, "" if classes else "; see bad_images.csv")
        usable = cache.usable
        index, cache = index.take(usable), cache.take(usable)
        if classes is None:
            check_classes(index)
    damaged = {path: damage for path, damage in zip(index.paths, cache.damage, strict=True) if damage}
    if damaged:
        _report_damaged(damaged, len(index))
    if classes is not None:
        splits = index.folders
    elif split:
        own = Path(split)
        splits = ranks.broadcast(lambda: read_split(own, index))
    else:
        splits = draw_split(index, val_fraction, seed)
    listed = splits != ""
    if not listed.all():
        warn(f"{(~listed).sum()} photos are not listed in {split} and are left out")
        index, cache, splits = index.take(listed), cache.take(listed), splits[listed]
    return Dataset(
        index=index,
        cache=cache,
        splits=splits,
        bad=bad,
        damaged=damaged,
        decoder=cast(Decoder, chosen),
        loader=picked,
        loader_reason=why,
        max_pixels=max_pixels or pipelines.MAX_PIXELS,
    )


def write_bad(path: Path, bad: dict[str, str]) -> None:
    """Write path and reason of every photo left out as CSV."""
    files.write_csv(path, [("path", "reason"), *bad.items()])


def _report_bad(bad: dict[str, str], count: int, max_bad: float, where: str) -> None:
    reasons = ", ".join(f"{number} {reason}" for reason, number in Counter(bad.values()).most_common())
    if len(bad) > max_bad * count:
        first = "; ".join(f"{printable(path)} ({reason})" for path, reason in list(bad.items())[:NUM_NAMED])
        raise DataError(
            f"{len(bad):,} of {count:,} photos cannot be used ({reasons}), more than --max-bad {max_bad:g}: {first}"
            f"{'; fastcnn data check lists them all' if len(bad) > NUM_NAMED else ''}"
        )
    warn(f"{len(bad):,} of {count:,} photos cannot be used and are left out ({reasons}){where}")


def _report_damaged(damaged: dict[str, str], count: int) -> None:
    path, damage = next(iter(damaged.items()))
    warn(
        f"{len(damaged):,} of {count:,} photos are damaged and used all the same, as far as they can be read: "
        f"{printable(path)} ({damage}){', ...' if len(damaged) > 1 else ''}; fastcnn data check lists them"
    )
