"""Threads that decode photos one by one."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipelines.verdict import Box, Source, Unusable, Verdict, read

One = Callable[[bytes, np.ndarray, Box | None], Verdict]
"""(encoded photo, its row of the output, its box) -> verdict."""


def each(
    one: One, sources: Sequence[Source], out: np.ndarray, boxes: Sequence[Box] | None, workers: int
) -> list[Verdict]:
    """Return the verdict of `one` on every source, in their order; rows of unusable sources are zeroed."""

    def chunk(start: int) -> list[Verdict]:
        stop = min(start + step, len(sources))
        return [_guarded(one, sources[i], out[i], None if boxes is None else boxes[i]) for i in range(start, stop)]

    # Chunks, as handing over single photos costs time; several a thread, so that none waits long for the last.
    step = max(1, min(16, len(sources) // (4 * workers)))
    starts = range(0, len(sources), step)
    if workers == 1 or len(starts) <= 1:
        return [verdict for start in starts for verdict in chunk(start)]
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        return [verdict for verdicts in pool.map(chunk, starts) for verdict in verdicts]


def _guarded(one: One, source: Source, row: np.ndarray, box: Box | None) -> Verdict:
    try:
        verdict = one(read(source), row, box)
    except Unusable as error:
        verdict = error.verdict
    except MemoryError:
        verdict = Verdict("too large", "not enough memory")
    if not verdict.ok:
        row[...] = 0
    return verdict
