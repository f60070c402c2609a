"""Costs of ranks that need no GPU: gradients exchanged between two processes, a cache's rows and its journal.

    python -m bench.rank_costs

prints medians over many calls, with the fastest and the slowest tenth: on a machine that others use they lie apart.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bench.scale import GRADIENT_BYTES, PHOTO_BYTES, STATISTICS_BYTES
from fastcnn.data import cache_files
from fastcnn.data.cache_files import CHUNK

CALLS = 1000
ROWS, ROWS_A_READ = 16384, 256
LINES = 50_000


def main() -> None:
    """Print seconds of an exchange between two processes by gloo, and bytes a second of rows in the page cache."""
    for num_bytes in (STATISTICS_BYTES, GRADIENT_BYTES):
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (Path(folder), num_bytes), nprocs=2)
            seconds = [float(line) for line in (Path(folder) / "seconds").read_text().split()]
        middle, spread = _spread(seconds)
        print(
            f"all_reduce of {num_bytes:,} bytes, gloo, 2 processes: {middle * 1e6:,.0f} us ({spread}), "
            f"{num_bytes / middle / 1e9:.2f} GB/s, n = {len(seconds):,}"
        )
    for what, rows, seconds in (
        ("random rows read from the page cache", ROWS_A_READ, _read_rows()),
        ("rows appended, with a CRC-32 each", CHUNK, _append_rows()),
    ):
        middle, spread = _spread(seconds)
        rate = rows * PHOTO_BYTES / middle / 1e9
        print(f"{rows} {what}: {rate:.2f} GB/s, {middle * 1e6:,.0f} us ({spread}), n = {len(seconds)}")
    seconds = read_journal()
    middle, spread = _spread(seconds)
    print(f"{LINES:,} lines of a journal: {LINES / middle:,.0f} photos/s ({spread} us), n = {len(seconds)}")


def _rank(rank: int, folder: Path, num_bytes: int) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder / 'store'}", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    flat = torch.zeros(num_bytes // 4)
    seconds = _timed(lambda: dist.all_reduce(flat), CALLS)
    if rank == 0:
        (folder / "seconds").write_text("\n".join(map(str, seconds)))
    dist.destroy_process_group()


def _read_rows() -> list[float]:
    """Return seconds a read of rows in a random order, each by one `pread`, as `Cache.read` does it."""
    out = np.empty((ROWS_A_READ, PHOTO_BYTES), np.uint8)
    order = np.random.default_rng(0)
    with tempfile.TemporaryFile() as file:
        for _ in range(ROWS // ROWS_A_READ):
            file.write(out.data)
        file.flush()

        def read() -> None:
            for row, place in zip(out, np.sort(order.integers(ROWS, size=ROWS_A_READ)), strict=True):
                os.preadv(file.fileno(), [row.data], int(place) * PHOTO_BYTES)

        return _timed(read, 200)


def _append_rows() -> list[float]:
    """Return seconds an append of a chunk of rows to a file, as `cache.build` does it."""
    pixels = np.random.default_rng(0).integers(256, size=(CHUNK, PHOTO_BYTES), dtype=np.uint8)
    with tempfile.TemporaryFile() as file:

        def append() -> None:
            file.seek(0)  # what was written before is in memory: the disk is not measured
            for row in pixels:
                zlib.crc32(row.data)
            file.write(pixels.data)
            file.flush()

        return _timed(append, 100)


def read_journal() -> list[float]:
    """Return seconds a reading of a cache's journal."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photos.jsonl"
        entry = {"size": 100_000, "mtime": 1_700_000_000_000_000_000, "crc": 4_000_000_000, "reason": ""}
        lines = [cache_files.journal_line({"path": f"train/class/{i:09}.jpg", "row": i, **entry}) for i in range(LINES)]
        path.write_bytes(b"".join(lines))
        assert len(cache_files.read_journal(path.parent)) == LINES
        return _timed(lambda: cache_files.read_journal(path.parent), 10)


def _timed(call: Callable[[], object], times: int) -> list[float]:
    """Return the seconds of each call, after a tenth as many that are not counted."""
    seconds = []
    for _ in range(times + times // 10):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds[times // 10 :]


def _spread(seconds: list[float]) -> tuple[float, str]:
    tenths = statistics.quantiles(seconds, n=10)
    return statistics.median(seconds), f"{tenths[0] * 1e6:,.0f} to {tenths[-1] * 1e6:,.0f}"


if __name__ == "__main__":
    main()
