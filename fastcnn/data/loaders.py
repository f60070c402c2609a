"""A split's photos as a Feed: resident on the device, shared by processes, read from the cache, or decoded in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

import pipelines
from fastcnn.config.fields import Loader
from fastcnn.data.buffered_feed import Buffered
from fastcnn.data.cache import Cache
from fastcnn.data.crops import crop_boxes
from fastcnn.data.feeds import CHUNK, Epoch, Feed, Fill, Selected, Sharded, Share
from fastcnn.data.index import Index
from fastcnn.errors import DataError, FastCNNError
from fastcnn.system.device import free_memory_bytes
from fastcnn.system.ranks import ALONE, Ranks

__all__ = ["LOADERS", "Feed", "Options", "choose", "mapped", "resident", "sharded", "shared", "stream"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a split is fed."""

    device: torch.device
    """Where the step runs."""
    batch_size: int
    """Photos a step, of all ranks."""
    rank: int = 0
    """Which of the ranks is fed."""
    num_ranks: int = 1
    """Ranks that share each batch."""
    decoder: str = "turbo"
    """What decodes streamed photos, as in `pipelines.BACKENDS`."""
    workers: int | None = None
    """Threads that it decodes with; None is one a core."""
    crop_scale: float | None = None
    """Least share of a streamed training photo's area that is shown; None shows all of every photo."""
    max_pixels: int = pipelines.MAX_PIXELS
    """Pixels above which a streamed photo is refused."""

    @property
    def share(self) -> Share:
        """What is taken of each batch."""
        return Share(self.batch_size, self.rank, self.num_ranks)


def resident(index: Index, cache: Cache, photos: npt.NDArray[np.intp], options: Options) -> Feed:
    """Return a Feed that holds all of `photos` (positions in the index) on the device."""
    device = options.device
    images = torch.empty((len(photos), *cache.images.shape[1:]), dtype=torch.uint8, device=device)
    if device.type == "cpu":
        cache.read(photos, images.numpy())
    else:
        for start in range(0, len(photos), CHUNK):
            part = slice(start, start + CHUNK)
            images[part] = torch.from_numpy(cache.pixels(photos[part])).to(device)
    return Feed(
        images=images,
        labels=torch.from_numpy(index.labels[photos]).to(device),
        permutation=torch.arange(len(photos), device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )


def shared(index: Index, cache: Cache, photos: npt.NDArray[np.intp], options: Options) -> Feed:
    """Return a Feed of `photos` whose pixels are the cache's own pages: in memory once, whoever uses them.

    On another device than a CPU, which has no such pages, it is a resident one.
    """
    if options.device.type != "cpu" or not len(cache.images):
        return resident(index, cache, photos, options)
    labels = torch.zeros(len(cache.images), dtype=torch.int64)
    rows = cache.rows[photos]
    labels[rows] = torch.from_numpy(index.labels[photos])
    return Selected(
        images=torch.from_numpy(cache.pages()),
        labels=labels,
        permutation=torch.from_numpy(rows.copy()),
        cursor=torch.zeros(1, dtype=torch.int64),
        rows=rows,
    )


def mapped(index: Index, cache: Cache, photos: npt.NDArray[np.intp], options: Options) -> Feed:
    """Return a Feed of two batches of `photos`, whose pixels are read from the cache while the step works."""

    return Buffered(_reading(index, cache, photos), len(photos), cache.images.shape[1], options.share, options.device)


def sharded(index: Index, cache: Cache, photos: npt.NDArray[np.intp], options: Options) -> Feed:
    """Return a Feed that holds what this rank takes of `photos` in an epoch; alone, a resident one."""
    if options.num_ranks == 1:
        return resident(index, cache, photos, options)
    return Sharded(_reading(index, cache, photos), len(photos), cache.images.shape[1], options.share, options.device)


def _reading(index: Index, cache: Cache, photos: npt.NDArray[np.intp]) -> Fill:
    def fill(
        places: npt.NDArray[np.intp], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], epoch: Epoch | None
    ) -> dict[str, str]:
        cache.read(photos[places], images)
        labels[:] = index.labels[photos[places]]
        return {}

    return fill


def stream(index: Index, cache: Cache, photos: npt.NDArray[np.intp], options: Options) -> Feed:
    """Return a Feed of two batches of `photos`, decoded from their files while the step works.

    A training photo that cannot be decoded any more is replaced by the next one of its batch; in an evaluation that is
    a DataError.
    """
    size, device = cache.images.shape[1], options.device
    gpu = device.index if device.type == "cuda" and options.decoder == "dali" else None

    def fill(
        places: npt.NDArray[np.intp], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], epoch: Epoch | None
    ) -> dict[str, str]:
        chosen = photos[places]
        verdicts = pipelines.decode(
            index.sources(chosen),
            size,
            images,
            _boxes(chosen, epoch, options.crop_scale),
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
                f"more ({reason}): bring it back and start again, or start again without it"
            )
        for i in bad:
            other = next(j % len(verdicts) for j in range(i + 1, i + len(verdicts)) if verdicts[j % len(verdicts)].ok)
            images[i], labels[i] = images[other], labels[other]
        return {index.paths[chosen[i]]: reason for i, reason in bad.items()}

    return Buffered(fill, len(photos), size, options.share, device)


def _boxes(photos: npt.NDArray[np.intp], epoch: Epoch | None, scale: float | None) -> pipelines.Boxes | None:
    """Return what says which part of each photo is shown, once its size is known; None for all of it."""
    if epoch is None or scale is None:
        return None
    seed, number = epoch

    def box(i: int, width: int, height: int) -> npt.NDArray[np.float64]:
        boxes = crop_boxes(seed, number, photos[i : i + 1], np.array([[width, height]]), (scale, 1.0))
        return boxes.reshape(4)

    return box


LOADERS: dict[str, Callable[[Index, Cache, npt.NDArray[np.intp], Options], Feed]] = {
    "resident": resident,
    "shared": shared,
    "sharded": sharded,
    "mapped": mapped,
    "stream": stream,
}

SHARE = {
    "cuda": 0.6,
    "cpu": 0.5,
}  # of the free memory that the photos may take: the rest is the network's and the user's


def choose(
    loader: Loader,
    needed: int,
    *,
    on_disk: bool,
    device: torch.device,
    memory_limit: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Loader, str]:
    """Return the loader that `loader` means here, and why for "auto".

    Resident where the pixels fit into memory, sharded where a rank's part of them does, else mapped, and stream where
    not even the disk has room for them.

    Args:
        loader: what was asked for.
        needed: bytes of all photos' pixels.
        on_disk: whether the cache is there or has room.
        device: whose memory a resident feed takes.
        memory_limit: bytes that it may take; None is a share of what is free.
        ranks: who else has all of them, on a CPU in the same memory.

    Raises FastCNNError where "resident" was asked for and exceeds the limit that was given.
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
    given = memory_limit is not None
    limit = (
        memory_limit
        if memory_limit is not None
        else int(free_memory_bytes(device) * SHARE.get(device.type, SHARE["cpu"]))
        // (1 if device.type == "cuda" else ranks.local_count)
    )
    whose = "that --memory-limit allows" if given else "that they may take of the free memory"
    if needed <= limit:
        return "resident", f"the photos take {_mib(needed)} of the {_mib(limit)} {whose}"
    if ranks.count > 1 and needed / ranks.count <= limit:
        part = f"each of {ranks.count} devices {_mib(needed // ranks.count)} of them"
        return "sharded", f"the photos take {_mib(needed)}, {part}, of the {_mib(limit)} {whose}"
    return "mapped", f"the photos take {_mib(needed)}, more than the {_mib(limit)} {whose}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
