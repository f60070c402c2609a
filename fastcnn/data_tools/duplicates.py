"""Duplicates by looks: a perceptual hash of each photo, and a search that does not compare all pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SIZE = 32  # side of the hashed photos, in pixels
DISTANCE = 6  # bits in which the hashes of duplicates may differ
MIN_CORRELATION = 0.98  # of the small grey pictures of duplicates

_BANDS, _BAND_BITS = DISTANCE + 1, 9  # 7 x 9 = the 63 bits of a hash
_BLOCK = 2**22  # pairs compared at once: 32 MiB


def describe(images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Return (n,) hashes and (n, 256) grey pictures of 16 x 16, of images (n, 32, 32, 3).

    The hash is the perceptual one of the DCT (Zauner, Implementation and Benchmarking of Perceptual Image Hash
    Functions, 2010): a bit for each of the 63 lowest frequencies, set where it is above their median. It hardly changes
    with size, compression, brightness and colour; it does not recognise a crop of a few percent.
    """
    grey = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    k = np.arange(SIZE)
    waves = np.cos(np.pi * k[:8, None] * (2 * k + 1) / (2 * SIZE)).astype(np.float32)  # (8, 32)
    frequencies = (waves @ grey @ waves.T).reshape(len(images), 64)[:, 1:]
    bits = frequencies > np.median(frequencies, 1, keepdims=True)
    hashes = np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(">u8")[:, 0].astype(np.uint64)
    small = grey.reshape(len(images), SIZE // 2, 2, SIZE // 2, 2).mean((2, 4))
    return hashes, small.reshape(len(images), (SIZE // 2) ** 2).round().astype(np.uint8)


def pairs(hashes: npt.NDArray[np.uint64], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Return (m, 2) positions, sorted, of duplicates, given what `describe` returned.

    Two hashes that differ in at most 6 bits are equal in one of 7 bands of 9 bits: only such pairs are compared.
    """
    found = [np.zeros((0, 2), np.intp)]
    for band in range(_BANDS):
        keys = hashes >> np.uint64(band * _BAND_BITS) & np.uint64(2**_BAND_BITS - 1)
        order = np.argsort(keys, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            found += _close(hashes, group)
    close = np.unique(np.concatenate(found), axis=0)
    alike = [
        _correlations(pictures[part]) >= MIN_CORRELATION for part in np.array_split(close, len(close) // 2**16 + 1)
    ]
    return close[np.concatenate(alike)]


def groups(pairs: npt.NDArray[np.intp]) -> list[list[int]]:
    """Return the groups of photos that pairs (m, 2) connect, each sorted, ordered by their first photo."""
    leader: dict[int, int] = {}

    def find(i: int) -> int:
        while leader.setdefault(i, i) != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for one, other in pairs.tolist():
        one, other = find(one), find(other)
        leader[max(one, other)] = min(one, other)
    members: dict[int, list[int]] = {}
    for i in sorted(leader):
        members.setdefault(find(i), []).append(i)
    return list(members.values())


def _close(hashes: npt.NDArray[np.uint64], group: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Return the pairs in a group (ascending positions) whose hashes are close, as several arrays (m, 2)."""
    mine, found = hashes[group], []
    rows = max(1, _BLOCK // max(1, len(group)))
    for start in range(0, len(group) - 1, rows):
        block = mine[start : start + rows, None] ^ mine[None, start + 1 :]
        one, other = np.nonzero(np.bitwise_count(block) <= DISTANCE)
        later = other >= one  # the block's columns begin one after its rows
        found.append(np.stack([group[start + one[later]], group[start + 1 + other[later]]], 1))
    return found


def _correlations(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return (m,) correlations of pairs of pictures (m, 2, 256); 0 for a picture of one grey value."""
    values = pictures.astype(np.float32)
    values -= values.mean(2, keepdims=True)
    norms = np.linalg.norm(values, axis=2)
    products = (values[:, 0] * values[:, 1]).sum(1)
    return np.asarray(products / np.maximum(norms[:, 0] * norms[:, 1], 1.0), np.float32)
