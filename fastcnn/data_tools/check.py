"""Check of a folder of photos before a run is spent on it: counts, formats, bad files, duplicates. Reads only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.config import Decoder, LayoutOptions
from fastcnn.data.index import Index, scan_loosely
from fastcnn.data.layout import NO_OPTIONS
from fastcnn.data.recognise import digests
from fastcnn.data_tools import duplicates
from fastcnn.data_tools.findings import Findings, Group, class_rows, counted, detail
from fastcnn.errors import FastCNNError
from fastcnn.system import text
from fastcnn.system.text import printable
from pipelines.facts import facts
from pipelines.shared_memory import shared
from pipelines.verdict import Source, Verdict
from pipelines.workers import DECODE_TIMEOUT, Workers

CHUNK = 512  # photos decoded at once
NUM_NAMED = 10  # photos and groups that the table names


def check(
    root: str | Path,
    *,
    decoder: Decoder = "auto",
    workers: int | None = None,
    max_bad: float = 0.05,
    max_pixels: int | None = None,
    timeout: float = DECODE_TIMEOUT,
    options: LayoutOptions = NO_OPTIONS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Return the findings about a folder of photos, of any layout; nothing in it is changed.

    Args:
        root: the folder.
        decoder: decoder of the photos; auto is turbo, else Pillow.
        workers: decoding threads; None is one a core.
        max_bad: fraction of unusable photos above which a run refuses the folder.
        max_pixels: a larger photo is unusable; None is `pipelines.MAX_PIXELS`.
        timeout: seconds that decoding one photo may take.
        options: what is not to be found by names and content.
        progress: called with the number of photos decoded and to decode.

    Raises DataError where there is no such folder, FastCNNError where the decoder is missing.
    """
    index, refusal = scan_loosely(root, options)
    sources = index.sources()
    try:
        used, _ = pipelines.choose(decoder, gpu=False)
        limit = max_pixels or pipelines.MAX_PIXELS
        with Workers(used, threads=workers, max_pixels=limit, timeout=timeout) as decoding:
            verdicts, hashes, pictures = _decode(sources, decoding, progress)
    except pipelines.DecoderUnavailable as error:
        raise FastCNNError(str(error)) from None
    usable = np.flatnonzero([verdict.ok for verdict in verdicts])
    with ThreadPoolExecutor(workers or pipelines.num_cores()) as pool:
        known = list(pool.map(lambda i: facts(sources[i], header=verdicts[i].ok), range(len(sources))))
    num_bad = len(index) - len(usable)
    if not refusal and num_bad > max_bad * len(index):
        refusal = f"{num_bad:,} of {len(index):,} photos cannot be used, more than --max-bad {max_bad:g}"
    exact = _same_files(index, usable)
    alike = duplicates.groups(usable[duplicates.pairs(hashes[usable], pictures[usable])])
    copies = {frozenset(group) for group in exact}
    return Findings(
        index=index,
        refusal=refusal,
        facts=known,
        verdicts=verdicts,
        exact=_groups(index, exact),
        near=_groups(index, [group for group in alike if not any(set(group) <= same for same in copies)]),
        decoder=used,
        max_pixels=limit,
    )


def table(findings: Findings) -> str:
    """Return the findings as text: classes, formats, problems, and the first photos of each."""
    index, problems = findings.index, findings.problems()
    total = f"{len(index):,} photos, {index.sizes.sum() / 2**20:,.1f} MiB"
    heads, rows = class_rows(findings)
    others = f"; {index.told_others()}" if index.others else ""
    blocks = [
        f"layout: {index.layout}\n{total} in {printable(str(index.root))}{others}",
        text.table(heads, rows, right=heads[1:]),
    ]
    blocks.append("\n".join(f"{name}: {counted(each)}" for name, each in findings.kinds().items() if each))
    blocks.append("\n".join(["to look at:", *(f"  {line}" for line in problems)]) if problems else "nothing is wrong")
    bad = [f"{printable(path)}: {each.reason}{detail(each.detail)}" for path, each in findings.bad.items()]
    damaged = [f"{printable(path)}: {damage}" for path, damage in findings.damaged.items()]
    named = [f"{printable(path)}: {name}" for path, name in findings.misnamed.items()]
    exact, near = (
        [" = ".join(printable(index.paths[i]) for i in group.photos) for group in groups]
        for groups in (findings.exact, findings.near)
    )
    lists = {
        "cannot be used": bad,
        "damaged": damaged,
        "the same file": exact,
        "look the same": near,
        "named as another format": named,
        "in no class folder": [printable(path) for path in index.outside],
    }
    for title, lines in lists.items():
        if lines:
            more = [f"  ... and {len(lines) - NUM_NAMED:,} more: --json lists all"] if len(lines) > NUM_NAMED else []
            blocks.append("\n".join([f"{title}:", *(f"  {line}" for line in lines[:NUM_NAMED]), *more]))
    return "\n\n".join(blocks)


def _decode(
    sources: Sequence[Source], decoding: Workers, progress: Callable[[int, int], None]
) -> tuple[list[Verdict], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Return the verdicts (N,), hashes (N,) and small grey pictures (N, 256) of all photos."""
    verdicts: list[Verdict] = []
    hashes = np.zeros(len(sources), np.uint64)
    pictures = np.zeros((len(sources), (duplicates.SIZE // 2) ** 2), np.uint8)
    buffer = shared((CHUNK, duplicates.SIZE, duplicates.SIZE, 3))
    for start in range(0, len(sources), CHUNK):
        part = sources[start : start + CHUNK]
        images = buffer[: len(part)]
        verdicts += decoding.decode(part, duplicates.SIZE, images)
        here = slice(start, start + len(part))
        hashes[here], pictures[here] = duplicates.describe(images)
        progress(start + len(part), len(sources))
    return verdicts, hashes, pictures


def _same_files(index: Index, usable: npt.NDArray[np.intp]) -> list[list[int]]:
    """Return the groups of photos that have the same bytes. Only files of the same size are read."""
    _, which, counts = np.unique(index.sizes[usable], return_inverse=True, return_counts=True)
    candidates = usable[counts[which] > 1]
    groups = defaultdict[str, list[int]](list)
    for i, digest in zip(candidates.tolist(), digests(index, candidates), strict=True):
        groups[digest].append(i)
    return [same for digest, same in groups.items() if digest and len(same) > 1]


def _groups(index: Index, groups: Iterable[Sequence[int]]) -> list[Group]:
    """Return the groups, those across classes first, then those across splits."""
    made = [
        Group(
            photos=tuple(group),
            splits=tuple(sorted({str(index.folders[i]) for i in group})),
            classes=tuple(sorted({index.classes[index.labels[i]] for i in group})),
        )
        for group in groups
    ]
    return sorted(made, key=lambda group: (-len(group.classes), -len(group.splits), group.photos))
