"""Loaders: a split's images as a feed, resident on the device, shared by processes, read from the cache or streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

import pipelines
from fastcnn.config import Loader
from fastcnn.data.arrays import Labels, Pixels, Positions
from fastcnn.data.buffered_feed import BufferedFeed
from fastcnn.data.cached_photos import Cache
from fastcnn.data.crops import crop_boxes
from fastcnn.data.feeds import READERS, Epoch, Feed, Fill, RankSlice, ShardedFeed, in_chunks
from fastcnn.errors import DataError, FastCNNError
from fastcnn.system.device import free_memory_bytes
from fastcnn.system.ranks import ALONE, Ranks

GPU_MEMORY_SHARE, CPU_MEMORY_SHARE = 0.6, 0.5  # of the free memory, for images: the network needs the rest


@dataclass(frozen=True, kw_only=True)
class Options(RankSlice):
    """How a split is fed to the step of one rank."""

    device: torch.device
    """Where the step runs."""
    decoder: str = "turbo"
    """Decoder of streamed photos, a name in `pipelines.BACKENDS`."""
    workers: int | None = None
    """Its threads; None is one a core."""
    crop_scale: float | None = None
    """Smallest fraction of a streamed training photo's area that a crop shows; None shows whole photos."""
    max_pixels: int = pipelines.MAX_PIXELS
    """Pixels above which a streamed photo is refused."""


def resident(cache: Cache, photos: Positions, options: Options) -> Feed:
    """Return a feed that holds all of `photos` (positions in the cache's index) on the device."""
    device = options.device
    images = torch.empty((len(photos), *cache.images.shape[1:]), dtype=torch.uint8, device=device)
    if device.type == "cpu":
        cache.read(photos, images.numpy())
    else:

        def copy(part: slice) -> None:
            images[part] = torch.from_numpy(cache.pixels(photos[part])).to(device)

        in_chunks(copy, 0, len(photos))
    return Feed(
        images=images,
        labels=torch.from_numpy(cache.index.labels[photos]).to(device),
        permutation=torch.arange(len(photos), device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )


def shared(cache: Cache, photos: Positions, options: Options) -> Feed:
    """Return a feed of `photos` whose pixels are the cache's own pages: in memory once for all processes.

    Only a CPU can read those pages; on any other device the feed is a resident one.
    """
    if options.device.type != "cpu" or not len(cache.images):
        return resident(cache, photos, options)
    pages = cache.pages(photos)
    if pages is None:  # a cache that is damaged, and that cannot be written
        return resident(cache, photos, options)
    labels = torch.zeros(len(cache.images), dtype=torch.int64)
    rows = cache.rows[photos]
    labels[rows] = torch.from_numpy(cache.index.labels[photos])
    return Feed(
        images=torch.from_numpy(pages),
        labels=labels,
        permutation=torch.from_numpy(rows.copy()),
        cursor=torch.zeros(1, dtype=torch.int64),
        rows=rows,
    )


def mapped(cache: Cache, photos: Positions, options: Options) -> Feed:
    """Return a feed of a few batches of `photos`, whose pixels are read from the cache while the step works."""
    fill = _fill_from_cache(cache, photos)
    return BufferedFeed(fill, len(photos), cache.images.shape[1], options, options.device, num_threads=READERS)


def sharded(cache: Cache, photos: Positions, options: Options) -> Feed:
    """Return a feed that holds this rank's slice of every batch of an epoch; with one rank, a resident one."""
    if options.num_ranks == 1:
        return resident(cache, photos, options)
    fill = _fill_from_cache(cache, photos)
    return ShardedFeed(fill, len(photos), cache.images.shape[1], options, options.device)


def stream(cache: Cache, photos: Positions, options: Options) -> Feed:
    """Return a feed of two batches of `photos`, decoded from their files while the step works.

    A training photo that cannot be decoded any more is replaced by the next usable one of its batch; in an evaluation
    it raises DataError.
    """
    index, size, device = cache.index, cache.images.shape[1], options.device
    gpu = device.index if device.type == "cuda" and options.decoder == "dali" else None

    def fill(positions: Positions, images: Pixels, labels: Labels, epoch: Epoch | None) -> dict[str, str]:
        chosen = photos[positions]
        verdicts = pipelines.decode(
            index.sources(chosen),
            size,
            images,
            _crops(chosen, epoch, options.crop_scale),
            decoder=options.decoder,
            workers=options.workers,
            gpu=gpu,
            max_pixels=options.max_pixels,
        )
        labels[:] = index.labels[chosen]
        bad = {i: verdict.reason for i, verdict in enumerate(verdicts) if not verdict.ok}
        if bad and (epoch is None or len(bad) == len(verdicts)):
            first, reason = next(iter(bad.items()))
            raise DataError(
                f"{index.root / index.paths[chosen[first]]} was usable when the run began and cannot be decoded any "
                f"more ({reason}): restore it, or start again without it"
            )
        for i in bad:
            other = next(j % len(verdicts) for j in range(i + 1, i + len(verdicts)) if verdicts[j % len(verdicts)].ok)
            images[i], labels[i] = images[other], labels[other]
        return {index.paths[chosen[i]]: reason for i, reason in bad.items()}

    return BufferedFeed(fill, len(photos), size, options, device)


LOADERS: dict[str, Callable[[Cache, Positions, Options], Feed]] = {
    "resident": resident,
    "shared": shared,
    "sharded": sharded,
    "mapped": mapped,
    "stream": stream,
}


def _fill_from_cache(cache: Cache, photos: Positions) -> Fill:
    def fill(positions: Positions, images: Pixels, labels: Labels, epoch: Epoch | None) -> dict[str, str]:
        cache.read(photos[positions], images)
        labels[:] = cache.index.labels[photos[positions]]
        return {}

    return fill


def _crops(photos: Positions, epoch: Epoch | None, scale: float | None) -> pipelines.Boxes | None:
    """Return the function that draws each photo's crop once its size is known; None shows whole photos."""
    if epoch is None or scale is None:
        return None
    seed, number = epoch

    def box(i: int, width: int, height: int) -> npt.NDArray[np.float64]:
        return crop_boxes(seed, number, photos[i : i + 1], np.array([[width, height]]), (scale, 1.0)).reshape(4)

    return box


def choose(
    loader: Loader, needed: int, *, on_disk: bool, device: torch.device, memory_limit: int | None, ranks: Ranks = ALONE
) -> tuple[Loader, str]:
    """Return the loader that `loader` means here, and the reason where it is "auto".

    auto is resident where the pixels fit into memory, else sharded where a rank's part of them does, else mapped; it is
    stream where not even the disk has room for them.

    Args:
        loader: the loader asked for.
        needed: bytes of the pixels of all photos.
        on_disk: whether the pixels are in the cache already, or have room there.
        device: the device whose memory a resident feed takes.
        memory_limit: bytes that the feed may take; None is a fraction of the free memory.
        ranks: ranks that each hold all pixels, on a CPU in the same memory.

    Raises FastCNNError where "resident" was asked for and exceeds `memory_limit`.
    """
    if loader != "auto":
        if loader == "resident" and memory_limit is not None and needed > memory_limit:
            raise FastCNNError(
                f"--loader resident: the photos take {_mib(needed)} and --memory-limit is {_mib(memory_limit)}; "
                "use --loader mapped, or raise the limit"
            )
        return loader, ""
    if not on_disk:
        return "stream", f"there is no room on disk for the photos' {_mib(needed)}; see also --cache-dir"
    limit, whose = memory_limit, "that --memory-limit allows"
    if limit is None:
        share = GPU_MEMORY_SHARE if device.type == "cuda" else CPU_MEMORY_SHARE / ranks.local_count
        limit, whose = int(free_memory_bytes(device) * share), "that they may take of the free memory"
    if needed <= limit:
        return "resident", f"the photos take {_mib(needed)} of the {_mib(limit)} {whose}"
    if ranks.count > 1 and needed / ranks.count <= limit:
        part = f"each of {ranks.count} devices {_mib(needed // ranks.count)} of them"
        return "sharded", f"the photos take {_mib(needed)}, {part}, of the {_mib(limit)} {whose}"
    return "mapped", f"the photos take {_mib(needed)}, more than the {_mib(limit)} {whose}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
