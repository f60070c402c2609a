"""Dataset: a folder of photos scanned, decoded into the cache, rid of unusable photos, and split."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

import pipelines
from fastcnn.config import DataConfig, Decoder, Loader
from fastcnn.data import class_names, loaders
from fastcnn.data.cache import build, fits_on_disk
from fastcnn.data.cache_folders import default_folder
from fastcnn.data.cached_photos import Cache
from fastcnn.data.index import Index, check_classes, scan, scan_held_out
from fastcnn.data.recognise import known_sizes
from fastcnn.data.split import SPLITS, check_fraction, draw_split, explain_split, split_numbers
from fastcnn.data.split_file import NAME, missing_listed, read_split
from fastcnn.errors import DataError, FastCNNError, fall_back, warn
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.system.stopwatch import Stopwatch
from fastcnn.system.text import comparable, printable

NUM_NAMED = 10  # bad photos that an error names


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The usable photos of a folder, with pixels, labels and splits."""

    cache: Cache
    """The photos and their pixels."""
    split_numbers: npt.NDArray[np.uint8]
    """(N,) position in `SPLITS` of the split of each photo of the index."""
    bad: dict[str, str]
    """Path -> reason of every photo that was left out."""
    damaged: dict[str, str]
    """Path -> damage of every photo that is used all the same."""
    decoder: Decoder
    """Decoder of the photos; never auto."""
    loader: Loader
    """Loader that feeds them; never auto."""
    loader_reason: str
    """Why this loader, where it was auto."""
    max_pixels: int
    """Pixels above which photos were left out."""

    @property
    def index(self) -> Index:
        """The photos."""
        return self.cache.index

    def photos(self, split: str) -> npt.NDArray[np.intp]:
        """Return the positions in the index of a split's photos."""
        return np.flatnonzero(self.split_numbers == SPLITS.index(split))

    def pixels(self, photos: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """Return a copy (n, size, size, 3) of the pixels of photos, given by their positions in the index."""
        if self.loader != "stream":
            return self.cache.pixels(photos)
        out = np.zeros((len(photos), *self.cache.images.shape[1:]), np.uint8)
        sources = self.index.sources(photos)
        pipelines.decode(sources, out.shape[1], out, decoder=self.decoder, max_pixels=self.max_pixels)
        return out

    def with_classes(self, classes: Sequence[str]) -> Dataset:
        """Return the dataset with a run's classes, in the run's order: names in another Unicode form sort elsewhere.

        Raises DataError where the folder has other classes.
        """
        root, here, known = self.index.root, self.index.classes, class_names.positions(classes)
        if unknown := [name for name in here if comparable(name) not in known]:
            raise DataError(
                f"{root} now has a class that the run does not know: {printable(unknown[0])}; give a folder without it"
            )
        if missing := [name for name in classes if comparable(name) not in class_names.positions(here)]:
            raise DataError(
                f"{root} has no folder of the run's class '{printable(missing[0])}' any more; give a folder of photos"
            )
        labels = np.array([known[comparable(name)] for name in here])[self.index.labels]
        index = dataclasses.replace(self.index, classes=tuple(classes), labels=labels)
        return dataclasses.replace(self, cache=dataclasses.replace(self.cache, index=index))


def prepare(
    config: DataConfig,
    *,
    gpu: int | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    moved_from: str = "",
    strict: bool = False,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
    stopwatch: Stopwatch | None = None,
) -> Dataset:
    """Return the dataset of the folder `config.data`.

    Args:
        config: the folder, and how its photos are decoded, loaded and split.
        gpu: device of the training step, None for the CPU; DALI decodes on it.
        seed: seed of the split.
        classes: classes of a model to score: the photos are then those of `scan_held_out`, split by their folders.
        moved_from: folder that the photos of `config.split` lay in, where that is another one.
        strict: raise instead of falling back to a slower decoder or loader.
        ranks: the ranks that prepare it together.
        progress: called with the number of photos decoded and to decode.
        note: called with lines for the user.
        stopwatch: measures the stages "scan" and "decode".

    Raises DataError for an unusable folder, FastCNNError for a missing decoder or a cache that cannot be written.
    """
    stopwatch = stopwatch or Stopwatch()
    with stopwatch.stage("scan"):
        index = _scan(config, classes, ranks, note)
    config = dataclasses.replace(config, decoder=_choose_decoder(config.decoder, gpu, strict))
    loader, why = ranks.broadcast(lambda: _choose_loader(index, config, gpu, ranks))
    _tell_loader(loader, why, strict, note)
    keep, decoding = loader != "stream", _dali_gpu(config, gpu)
    with stopwatch.stage("decode"):
        cache = build(
            index, config, gpu=decoding, keep_pixels=keep, strict=strict, ranks=ranks, progress=progress, note=note
        )
    pipelines.close()  # no DALI work may be in flight while a CUDA graph is captured
    cache, bad, damaged = _without_bad(cache, config.max_bad, scoring=classes is not None)
    if classes is None:
        cache, numbers = _split(cache, config, seed, ranks, moved_from)
        if not config.split and (reading := explain_split(cache.index, config.val_fraction)):
            note(reading)
    else:
        numbers = split_numbers(cache.index.folders)
    return Dataset(
        cache=cache,
        split_numbers=numbers,
        bad=bad,
        damaged=damaged,
        decoder=config.decoder,
        loader=loader,
        loader_reason=why,
        max_pixels=config.max_pixels,
    )


def of_run(
    run_dir: Path,
    config: DataConfig,
    moved_to: str | Path | None,
    *,
    advice: str,
    gpu: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Return the dataset of a run's own photos, split as in its split.csv, whatever memory its loader was allowed.

    Args:
        run_dir: the run folder.
        config: the run's.
        moved_to: the folder that its photos were moved to; None: they are where `config` has them.
        advice: command to use where they are not.
        gpu: see `prepare`.
        progress: see `prepare`.

    Raises DataError where any of them is missing; `missing_photos.csv` in the run folder then lists all that are.
    """
    data = str(Path(moved_to).resolve()) if moved_to else config.data  # resolved, as it is in the cache's key
    own = dataclasses.replace(config, data=data, split=str(run_dir / NAME), max_bad=1.0, memory_limit=None)
    if Path(data).is_dir():  # of a run of a table, whose photos were moved
        own = dataclasses.replace(own, path_column=None, label_column=None)
    with missing_listed(run_dir, data, advice):
        return prepare(own, gpu=gpu, moved_from=config.data if data != config.data else "", progress=progress)


def _choose_decoder(decoder: Decoder, gpu: int | None, strict: bool) -> Decoder:
    """Return the decoder that `decoder` means here; never auto."""
    try:
        chosen, missing = pipelines.choose(decoder, gpu=gpu is not None)
    except pipelines.DecoderUnavailable as error:
        raise FastCNNError(str(error)) from None
    if missing:
        fall_back(missing, strict=strict)
    return cast(Decoder, chosen)


def _dali_gpu(config: DataConfig, gpu: int | None) -> int | None:
    return gpu if config.decoder == "dali" else None


def _choose_loader(index: Index, config: DataConfig, gpu: int | None, ranks: Ranks) -> tuple[Loader, str]:
    """Return the loader for an index, and the reason where it was auto."""
    return loaders.choose(
        config.loader,
        len(index) * config.decoded_size**2 * 3,
        on_disk=fits_on_disk(index, config, gpu=_dali_gpu(config, gpu)),
        device=torch.device("cpu") if gpu is None else torch.device("cuda", gpu),
        memory_limit=config.memory_limit,
        ranks=ranks,
    )


def _tell_loader(loader: Loader, why: str, strict: bool, note: Callable[[str], None]) -> None:
    """Note why auto is a loader; that it is stream, which decodes all photos in every epoch, is a fallback."""
    if why and loader == "stream":
        fall_back(f"loader stream: {why}", strict=strict)
    elif why:
        note(f"loader {loader}: {why}")


def _without_bad(cache: Cache, max_bad: float, *, scoring: bool) -> tuple[Cache, dict[str, str], dict[str, str]]:
    """Return the cache of the usable photos, path -> reason of the others, and path -> damage of those kept."""
    index = cache.index
    bad = {index.paths[photo]: reason for photo, reason in cache.reasons.items()}
    if bad:
        _report_bad(bad, len(index), max_bad, "" if scoring else "; see bad_images.csv")
        cache = cache.take(np.flatnonzero(cache.usable))
        index = cache.index
        if not scoring:
            check_classes(index)
    damaged = {index.paths[photo]: damage for photo, damage in cache.damage.items()}
    if damaged:
        _report_damaged(damaged, len(index))
    return cache, bad, damaged


def _scan(config: DataConfig, classes: Sequence[str] | None, ranks: Ranks, note: Callable[[str], None]) -> Index:
    """Return the index of the folder, of its held-out photos where `classes` are given, as the first rank scans it."""
    memory = default_folder(config.cache_dir)
    index = ranks.broadcast(
        lambda: (
            scan(config.data, memory, config.layout, ranks)
            if classes is None
            else scan_held_out(config.data, classes, memory, config.layout, ranks)
        )
    )
    note(f"layout of {printable(str(index.root))}: {index.layout}")
    index.warn_of_outside()
    if classes is None and not config.split:
        check_fraction(index, config.val_fraction)
    hidden = f", {index.num_hidden} hidden files skipped" if index.num_hidden else ""
    others = f", {index.told_others()} left out" if index.others else ""
    note(f"{len(index):,} photos of {len(index.classes)} classes in {index.root}{hidden}{others}")
    return index


def _split(
    cache: Cache, config: DataConfig, seed: int, ranks: Ranks, moved_from: str
) -> tuple[Cache, npt.NDArray[np.uint8]]:
    """Return the cache of the photos that are used, those that `config.split` lists, and (M,) their split numbers."""
    index = cache.index
    if not config.split:
        return cache, draw_split(index, config.val_fraction, seed)
    path, caches = Path(config.split), default_folder(config.cache_dir)
    photos, splits = ranks.broadcast(
        lambda: read_split(
            path,
            index,
            cache.digests,
            moved=bool(moved_from),
            known_sizes=lambda: known_sizes(moved_from, caches),
        )
    )
    if left_out := len(index) - len(photos):
        warn(f"{left_out:,} photos are not listed in {config.split} and are left out")
    return cache.take(photos), splits


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
