"""Journal of a cache as columns: the last whole entry of each photo, by its path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from fastcnn.data.arrays import Positions
from fastcnn.data.index import Index
from fastcnn.data.path_list import PathList

FACTS = ("size", "mtime", "ctime", "inode")
DIGEST_BYTES = 16
Note = TypeVar("Note")
_NOTES = ("reason", "damage", "decode_timeout")


class Digests(Sequence[str]):
    """Digest of each photo's bytes in hexadecimal digits, "" where it is not known; packed (N, 16)."""

    def __init__(self, packed: npt.NDArray[np.uint8]) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, at: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Digests: ...
    def __getitem__(self, at: int | np.integer[Any] | slice) -> str | Digests:
        """Return a digest, or those of some photos."""
        if isinstance(at, slice):
            return Digests(self.packed[at])
        digest = self.packed[at].tobytes()
        return digest.hex() if any(digest) else ""

    def __iter__(self) -> Iterator[str]:
        return iter(self.encoded())

    def encoded(self) -> PathList:
        """Return the digests in one buffer."""
        known = self.packed.any(axis=1)
        return PathList(self.packed[known].tobytes().hex().encode(), np.cumsum(known * (2 * DIGEST_BYTES)))


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The last whole entry of each photo, as columns."""

    paths: PathList
    """(M,) paths, each once."""
    facts: Sequence[npt.NDArray[np.int64]]
    """(M,) each of size, mtime, ctime and inode: while they agree with a file's, it is taken to be the same, unread."""
    digests: Digests
    """(M,) digests of the files' bytes."""
    rows: npt.NDArray[np.int64]
    """(M,) row of the pixels, -1 where there are none."""
    checksums: npt.NDArray[np.uint32]
    """(M,) CRC-32 of the row."""
    notes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Position -> what few entries have: reason, damage, or the `decode_timeout` that was exceeded."""
    num_bytes: int = 0
    """Bytes of the file that were read; 0 for entries that are not those of a file."""
    checksum: int = 0
    """CRC-32 of those bytes."""
    num_indexed: int = 0
    """Entries that came from the index."""

    def __len__(self) -> int:
        return len(self.paths)

    def reason(self, at: int) -> str:
        """Return why a photo is unusable, "" for a usable one."""
        return str(self.notes.get(at, {}).get("reason", ""))

    def num_usable(self) -> int:
        """Return the number of photos that can be decoded."""
        return len(self) - sum(map(bool, map(self.reason, self.notes)))

    def entry(self, at: int) -> dict[str, Any]:
        """Return an entry as it stands in a line."""
        own = dict(self.notes.get(at, {}))
        numbers = {name: int(fact[at]) for name, fact in zip(FACTS, self.facts, strict=True)}
        row, checksum = int(self.rows[at]), int(self.checksums[at])
        known = {"path": self.paths[at], **numbers, "digest": self.digests[at], "row": row, "crc": checksum}
        return {**known, "reason": own.pop("reason", ""), **own}

    def find(self, index: Index) -> Positions:
        """Return (N,) the position here of each photo of an index by its path, -1 for one that is not here."""
        return np.arange(len(self)) if self.paths == index.paths else self.paths.find(index.paths)

    def find_current(self, index: Index) -> Positions:
        """Return (N,) the position here of each photo of an index whose file is as it was, -1 for the others."""
        at = self.find(index)
        for fact, column in zip(self.facts, facts_of(index), strict=True):
            if len(fact):
                at[fact[at] != column] = -1
        return at

    def in_order_of(self, index: Index) -> Journal:
        """Return the journal in an index's order, so that nobody has to look for its photos; as it is if others are."""
        if self.paths == index.paths or len(self) != len(index) or ((at := self.find(index)) < 0).any():
            return self
        return replace(self.take(at), num_bytes=self.num_bytes, checksum=self.checksum)

    def followed_by(self, later: Journal) -> Journal:
        """Return the journal with later entries, which replace those of the same paths."""
        if not len(later):
            return self
        return joined([self.without(np.flatnonzero(later.paths.find(self.paths) >= 0)), later])

    def without(self, positions: Positions) -> Journal:
        """Return the journal without the photos at some positions."""
        kept = np.ones(len(self), np.bool_)
        kept[positions] = False
        return self if kept.all() else self.take(np.flatnonzero(kept))

    def take(self, positions: Positions) -> Journal:
        """Return the journal of the photos at some positions."""
        return Journal(
            paths=self.paths.take(positions),
            facts=[fact[positions] for fact in self.facts],
            digests=Digests(self.digests.packed[positions]),
            rows=self.rows[positions],
            checksums=self.checksums[positions],
            notes=taken(self.notes, positions),
        )


def facts(index: Index, photo: int) -> dict[str, Any]:
    """Return what an entry says of a photo's file; while it agrees, the file is taken to be the same, unread."""
    columns = zip(FACTS, facts_of(index), strict=True)
    return {"path": index.paths[photo], **{name: int(column[photo]) for name, column in columns}}


def facts_of(index: Index) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the columns (N,) of an index that an entry repeats, in the order of `FACTS`."""
    return index.sizes, index.mtimes, index.ctimes, index.inodes


def taken(notes: Mapping[int, Note], positions: Positions) -> dict[int, Note]:
    """Return the notes on the photos at some positions, by their places among these, in their order."""
    noted = np.flatnonzero(np.isin(positions, [*notes])).tolist() if notes else []
    return {place: notes[int(positions[place])] for place in noted}


def of_entries(entries: Sequence[Mapping[str, Any]]) -> Journal:
    """Return the journal of entries, in their order."""
    # Nothing has a checksum that is no CRC-32: such pixels are in a row that is nowhere.
    summed = [0 <= entry["crc"] < 2**32 for entry in entries]
    pairs = list(zip(entries, summed, strict=True))
    notes = [{name: entry[name] for name in _NOTES if entry.get(name)} for entry in entries]
    packed = np.frombuffer(b"".join(_packed(entry["digest"]) for entry in entries), np.uint8)
    return Journal(
        paths=PathList.of(entry["path"] for entry in entries),
        facts=[np.array([_limited(entry[name]) for entry in entries], np.int64) for name in FACTS],
        digests=Digests(packed.reshape(-1, DIGEST_BYTES)),
        rows=np.array([_limited(entry["row"]) if whole else -2 for entry, whole in pairs], np.int64),
        checksums=np.array([entry["crc"] if whole else 0 for entry, whole in pairs], np.uint32),
        notes={at: note for at, note in enumerate(notes) if note},
    )


def joined(parts: Sequence[Journal]) -> Journal:
    """Return the entries of journals, one behind the other."""
    parts = parts or [of_entries([])]
    if len(parts) == 1:
        return parts[0]
    starts = accumulate(map(len, parts), initial=0)
    pairs = zip(starts, parts, strict=False)
    return Journal(
        paths=PathList.joined([part.paths for part in parts]),
        facts=[np.concatenate(columns) for columns in zip(*(part.facts for part in parts), strict=True)],
        digests=Digests(np.concatenate([part.digests.packed for part in parts])),
        rows=np.concatenate([part.rows for part in parts]),
        checksums=np.concatenate([part.checksums for part in parts]),
        notes={start + at: note for start, part in pairs for at, note in part.notes.items()},
    )


def latest(journal: Journal) -> Journal:
    """Return a journal without the entries that a later one of the same path replaces."""
    last = journal.paths.find(journal.paths) == np.arange(len(journal))
    return journal if last.all() else journal.take(np.flatnonzero(last))


def _limited(number: int) -> int:
    """Return a whole number as 64 bits hold it: no file and no row has one beyond."""
    return max(-(2**63), min(number, 2**63 - 1))


def _packed(digest: str) -> bytes:
    """Return a digest as 16 bytes; zeros for one that is not known or of another kind."""
    with contextlib.suppress(ValueError):
        if len(packed := bytes.fromhex(digest)) == DIGEST_BYTES and packed.hex() == digest:
            return packed
    return bytes(DIGEST_BYTES)
