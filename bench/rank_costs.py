"""Costs of ranks that need no GPU: gradients exchanged between two processes, a cache's rows and its journal.

    python -m bench.rank_costs

prints medians over many calls, with the fastest and the slowest tenth: on a machine that others use they lie apart.
"""

from __future__ import annotations

import statistics
import tempfile
import timeit
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bench.scale.rates import PHOTO_BYTES
from bench.scale.step import GRADIENT_BYTES, STATISTICS_BYTES
from fastcnn.data import journal_files
from fastcnn.data.cache_files import CHUNK, read_row

ROWS, ROWS_A_READ = 16384, 256
LINES = 50_000


def main() -> None:
    """Print the seconds and the rates of exchanges by gloo, of rows in the page cache and of a journal."""
    for measure in (_exchanges, _reading, _appending, _journal):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder))


def _exchanges(folder: Path) -> None:
    for num_bytes in (STATISTICS_BYTES, GRADIENT_BYTES):
        spawn(_rank, (folder / f"store {num_bytes}", num_bytes), nprocs=2)


def _rank(rank: int, store: Path, num_bytes: int) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    flat = torch.zeros(num_bytes // 4)
    seconds = _timed(lambda: dist.all_reduce(flat), 1000)
    if rank == 0:
        _report(f"all_reduce of {num_bytes:,} bytes, gloo, 2 processes", seconds, num_bytes / 1e9, "GB/s")
    dist.destroy_process_group()


def _reading(folder: Path) -> None:
    """Report reads of rows in a random order, as `Cache.read` does them."""
    out = np.empty((ROWS_A_READ, PHOTO_BYTES), np.uint8)
    order = np.random.default_rng(0)
    path = folder / "pixels.bin"
    path.write_bytes(out.tobytes() * (ROWS // ROWS_A_READ))
    with path.open("rb", buffering=0) as file:

        def read() -> None:
            for pixels, row in zip(out, np.sort(order.integers(ROWS, size=ROWS_A_READ)), strict=True):
                read_row(file, row, pixels)

        seconds = _timed(read, 200)
    _report(f"{ROWS_A_READ} random rows read from the page cache", seconds, out.nbytes / 1e9, "GB/s")


def _appending(folder: Path) -> None:
    """Report appends of a chunk of rows to a file, as `cache.build` does them."""
    pixels = np.random.default_rng(0).integers(256, size=(CHUNK, PHOTO_BYTES), dtype=np.uint8)
    with (folder / "pixels.bin").open("wb") as file:

        def append() -> None:
            file.seek(0)  # what was written before is in memory: the disk is not measured
            for row in pixels:
                zlib.crc32(row.data)
            file.write(pixels.data)
            file.flush()

        seconds = _timed(append, 100)
    _report(f"{CHUNK} rows appended, with a CRC-32 each", seconds, pixels.nbytes / 1e9, "GB/s")


def _journal(folder: Path) -> None:
    stamp = {"size": 100_000, "mtime": 1_700_000_000_000_000_000, "ctime": 1_700_000_000_000_000_000, "inode": 10**7}
    entry = {**stamp, "digest": "0" * 32, "crc": 4_000_000_000, "reason": ""}
    lines = [journal_files.line({"path": f"train/class/{i:09}.jpg", "row": i, **entry}) for i in range(LINES)]
    (folder / "photos.jsonl").write_bytes(b"".join(lines))
    assert len(journal_files.read(folder)) == LINES
    _report(f"{LINES:,} lines of a journal", _timed(lambda: journal_files.read(folder), 10), LINES, "photos/s")


def _timed(call: Callable[[], object], times: int) -> list[float]:
    """Return the seconds of each call, after a tenth as many that are not counted."""
    return timeit.repeat(call, number=1, repeat=times + times // 10)[times // 10 :]


def _report(what: str, seconds: list[float], amount: float, unit: str) -> None:
    middle, tenths = statistics.median(seconds), statistics.quantiles(seconds, n=10)
    spread = f"{middle * 1e6:,.0f} us ({tenths[0] * 1e6:,.0f} to {tenths[-1] * 1e6:,.0f})"
    print(f"{what}: {spread}, {amount / middle:,.2f} {unit}, n = {len(seconds):,}")


if __name__ == "__main__":
    main()
