"""Photos of an index in their cache: pixels that are checked when they are read for the first time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcnn.data.arrays import Pixels, Positions
from fastcnn.data.cache_files import CHUNK, chunks_of, read_rows
from fastcnn.data.index import Index
from fastcnn.data.journal import Digests, taken
from fastcnn.errors import FastCNNError, warn
from fastcnn.system.text import printable
from pipelines.verdict import Source, Verdict

Decode = Callable[[Sequence[Source], int, Pixels], Sequence[Verdict]]
"""Writes photos of a side in pixels into an array, as the cache had them decoded."""

CHECKED_BYTES = 2**20  # read at once by a thread where pixels are checked and not kept


class CacheLost(FastCNNError):
    """The pixels of a cache that is in use are gone: what began before can go on once they are decoded again."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}: run the command again, which decodes its photos again")
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The decoded photos of an index.

    A row is compared with its checksum when it is read for the first time. Where it is damaged, its photo is decoded
    again and the row is written anew. So a large set can be begun with at once, and nothing damaged is ever returned.
    """

    folder: Path
    index: Index
    """The photos."""
    images: Pixels
    """(R, size, size, 3), memory-mapped, read-only and not checked; R is 0 in a cache of verdicts alone."""
    rows: npt.NDArray[np.int64]
    """(N,) row in `images` of each photo of the index, -1 where it has none."""
    checksums: npt.NDArray[np.uint32]
    """(N,) CRC-32 of each row."""
    unchecked: npt.NDArray[np.bool_]
    """(N,) whether a row was not compared with it yet."""
    decode: Decode
    """Decodes photos as those in the cache were."""
    reasons: Mapping[int, str]
    """Position -> why a photo is unusable."""
    damage: Mapping[int, str]
    """Position -> what is wrong with a photo that is usable all the same."""
    digests: Digests
    """(N,) digest of each photo's bytes."""
    num_decoded: int
    """Photos that this build decoded; the others were in the cache."""
    decode_seconds: float
    inode: int | None = None
    """Inode of pixels.bin, which `images` keeps from being reused: a file with another one has other rows."""
    damaged: set[int] = field(default_factory=set)
    """Photos whose pixels were found damaged."""

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each photo can be decoded."""
        usable = np.ones(len(self.rows), np.bool_)
        usable[[*self.reasons]] = False
        return usable

    def take(self, photos: Positions) -> Cache:
        """Return the cache of some photos, given by their positions in the index."""
        return dataclasses.replace(
            self,
            index=self.index.take(photos),
            rows=self.rows[photos],
            checksums=self.checksums[photos],
            unchecked=self.unchecked[photos],
            reasons=taken(self.reasons, photos),
            damage=taken(self.damage, photos),
            digests=Digests(self.digests.packed[photos]),
        )

    def pixels(self, photos: Positions) -> Pixels:
        """Return a copy (n, size, size, 3) of the pixels of photos, given by their positions in the index."""
        out = np.empty((len(photos), *self.images.shape[1:]), np.uint8)
        self.read(photos, out)
        return out

    def read(self, photos: Positions, out: Pixels) -> None:
        """Write the pixels of photos, given by their positions in the index, into `out` (n, size, size, 3).

        They are read, not copied from the map: pages of the map that were touched count as this process's memory, which
        would grow to the size of the set. Raises CacheLost where the file is gone, was replaced or is too short, and
        where damaged pixels cannot be decoded again.
        """
        if len(photos) <= CHUNK:
            self._read_part(photos, out)
            return
        parts = [slice(start, start + CHUNK) for start in range(0, len(photos), CHUNK)]
        with ThreadPoolExecutor() as threads:  # reading and summing release the interpreter's lock
            list(threads.map(lambda part: self._read_part(photos[part], out[part]), parts))

    def pages(self, photos: Positions) -> Pixels | None:
        """Return `images` as an array that torch accepts: the same pages, copied where they are written to.

        The rows of `photos` are checked; None where a damaged one cannot be written anew. Raises CacheLost where the
        file is gone, was replaced or is too short.
        """
        blocks = chunks_of(photos[self.unchecked[photos]], max(1, CHECKED_BYTES // math.prod(self.images.shape[1:])))
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._check, blocks))
        with self._opened() as file:
            if os.fstat(file.fileno()).st_size < self.images.nbytes:
                raise CacheLost(f"{file.name} became shorter while it was used")
            return None if self.unchecked[photos].any() else np.memmap(file, np.uint8, "c", shape=self.images.shape)

    def _check(self, photos: Positions) -> None:
        """Read a few photos for the first time, and keep nothing of them."""
        self.pixels(photos)

    def _read_part(self, photos: Positions, out: Pixels) -> None:
        """Write the pixels of a few photos into `out`, after mending those that do not have their checksum."""
        if not len(photos):
            return
        with self._opened() as file:
            if not read_rows(file, self.rows[photos], out):
                raise CacheLost(f"{file.name} became shorter while it was used")
        new = self.unchecked[photos]
        for i, photo in zip(np.flatnonzero(new).tolist(), photos[new].tolist(), strict=True):
            whole = zlib.crc32(out[i].data) == self.checksums[photo] or self._mend(photo, out[i : i + 1])
            self.unchecked[photo] = not whole

    def _mend(self, photo: int, out: Pixels) -> bool:
        """Write the pixels of a photo whose row is damaged into `out` (1, size, size, 3), and into the cache.

        Return whether the cache has them; it may be one that cannot be written.
        The checksum says whether they are those that the row had, whatever became of the photo.
        """
        path = printable(self.index.paths[photo])
        if not self.damaged:
            warn(f"the cache {self.folder} has damaged pixels, first those of {path}: decoding them again")
        self.damaged.add(photo)
        (verdict,) = self.decode([self.index.source(photo)], out.shape[1], out)
        if not verdict.ok or zlib.crc32(out.data) != self.checksums[photo]:
            why = f"cannot be decoded any more ({verdict.reason})" if verdict.reason else "has other pixels now"
            raise FastCNNError(
                f"the pixels of {path} in the cache {self.folder} are damaged, and the photo {why}: "
                f"to decode all photos again, run: fastcnn cache clear {self.folder.name} "
                f"--cache-dir {shlex.quote(str(self.folder.parent))}"
            )
        with contextlib.suppress(OSError), (self.folder / "pixels.bin").open("r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_ino == self.inode:
                file.seek(int(self.rows[photo]) * out.nbytes)
                return file.write(out.data) == out.nbytes
        return False

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        """Yield pixels.bin, opened. Raises CacheLost where it is gone or was replaced."""
        path = self.folder / "pixels.bin"
        try:
            with io.FileIO(path) as file:
                if self.inode is not None and os.fstat(file.fileno()).st_ino != self.inode:
                    raise CacheLost(f"{path} was replaced while it was used")
                yield file
        except OSError as error:
            raise CacheLost(f"cannot read the cache {path} any more: {error.strerror or error}") from None
