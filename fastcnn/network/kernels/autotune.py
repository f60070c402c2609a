"""Launches of the fused kernels: grids, tile sizes, and the fastest tiles found on this GPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fastcnn.network.kernels.tiles import INTERPRETED
from fastcnn.storage import files
from fastcnn.storage.paths import user_cache_folder


class Maps(NamedTuple):
    """Shapes of a block: images, and height and width of its pooled maps."""

    photos: int
    height: int
    width: int
    into: int
    """Input channels."""
    out: int
    """Output channels."""


@dataclass(frozen=True)
class Tile:
    """Tile of pooled pixels and channels that a program computes at a time."""

    rows: int
    """Rows of pooled pixels."""
    columns: int
    channels: int
    """Channels of the result."""
    chunk: int
    """Channels of the operand that are loaded at a time."""
    warps: int = 4
    stages: int = 3
    """Loop iterations that are loaded ahead."""

    def num_tiles(self, maps: Maps) -> int:
        """Return the number of tiles that cover the pooled maps."""
        return -(-maps.photos * maps.height // self.rows) * -(-maps.width // self.columns)

    def num_programs(self, maps: Maps, most: int) -> int:
        """Return the number of programs that share the tiles, `most` or fewer, none of them idle."""
        num_tiles = self.num_tiles(maps)
        return -(-num_tiles // -(-num_tiles // most))

    def covering(self, maps: Maps, most: int) -> dict[str, int]:
        """Return the kernel arguments by which at most `most` programs cover the pooled maps, each a run of tiles."""
        num_tiles = self.num_tiles(maps)
        return {
            "num_rows": maps.photos * maps.height,
            "height": maps.height,
            "width": maps.width,
            "num_tiles": num_tiles,
            "per_program": -(-num_tiles // most),
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "CHANNELS": self.channels,
        }


class Launch(NamedTuple):
    """Kernel with its grid and arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """Launch the kernel, or record it: see `recording`."""
        if _records is None:
            self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)
        else:
            _records.append(self)


_records: list[Launch] | None = None
_record_every_tile = False


@contextlib.contextmanager
def recording(every_tile: bool = False) -> Iterator[list[Launch]]:
    """Yield a list that collects the launches, of every candidate tile if asked for; nothing is launched."""
    global _records, _record_every_tile
    _records, _record_every_tile = [], every_tile
    try:
        yield _records
    finally:
        _records = None


def run(kind: str, maps: Maps, dtype: torch.dtype, prepare: Callable[[Tile], Launch]) -> Launch:
    """Launch a kernel with the fastest tile for these shapes on this GPU, and return the launch."""
    tiles = candidates(kind, maps, dtype)
    if _records is not None and _record_every_tile:
        _records.extend(prepare(tile) for tile in tiles[1:])
    launch = prepare(tiles[0])
    device = next(value.device for value in launch.arguments.values() if isinstance(value, torch.Tensor))
    if device.type == "cuda" and len(tiles) > 1 and not torch.are_deterministic_algorithms_enabled():
        launch = prepare(_fastest(kind, maps, dtype, tiles, prepare, device))
    launch.run()
    return launch


def candidates(kind: str, maps: Maps, dtype: torch.dtype) -> list[Tile]:
    """Return candidate tiles, the default first. None of them spills registers (`python -m bench.kernels`)."""
    columns = min(8, triton.next_power_of_2(maps.width))
    computed, other = (maps.into, maps.out) if kind == "input_gradient" else (maps.out, maps.into)
    narrow, wide = (max(16, min(most, triton.next_power_of_2(computed))) for most in (32, 64))
    chunk = 32 if other % 32 == 0 else 16
    if INTERPRETED:  # an operation takes the interpreter as long for many values as for one
        total = maps.photos * maps.height * maps.width
        return [Tile(max(2, triton.next_power_of_2(total // (3 * columns))), columns, narrow, chunk)]
    tiles = [
        Tile(max(1, windows // columns), columns, narrow, chunk, warps, stages)
        for windows, warps, stages in (SIZES_32 if dtype == torch.float32 else SIZES_16)[kind]
    ]
    if wide > narrow and dtype != torch.float32:
        tiles.append(Tile(max(1, 16 // columns), columns, wide, chunk, 8, 2))
    return tiles


# (windows, warps, stages) of each kernel's candidates.
SIZES_16 = {
    "first_forward": [(32, 4, 3), (16, 4, 3), (64, 8, 3)],
    "first_weight_gradient": [(16, 4, 2), (32, 8, 2), (16, 4, 1)],
    "block_forward": [(32, 4, 3), (64, 8, 3)],
    "weight_gradient": [(16, 4, 2), (32, 8, 2), (16, 4, 1)],
    "input_gradient": [(32, 4, 3), (16, 4, 2), (64, 8, 3)],
}
SIZES_32 = {
    "first_forward": [(16, 8, 2), (8, 4, 1)],
    "first_weight_gradient": [(16, 8, 2), (8, 4, 1)],
    "block_forward": [(16, 8, 1), (8, 8, 1), (8, 8, 2)],
    "weight_gradient": [(8, 4, 1)],
    "input_gradient": [(16, 8, 2), (8, 4, 1)],
}


def precision(dtype: torch.dtype) -> str:
    """Return Triton's name for the precision of products of this dtype."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def most_programs(device: torch.device) -> int:
    """Return the number of forward programs that fill the device."""
    return 4 * num_processors(device)


def reducers(device: torch.device, maps: Maps) -> int:
    """Return the number of programs of a weight gradient; each writes a partial sum, so no more than useful."""
    return max(1, min(num_processors(device), maps.photos * maps.height * maps.width // 64))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors; on a CPU, where the interpreter runs programs one by one, 3."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 3


_known: dict[str, dict[str, Any]] = {}


def _fastest(
    kind: str,
    maps: Maps,
    dtype: torch.dtype,
    tiles: list[Tile],
    prepare: Callable[[Tile], Launch],
    device: torch.device,
) -> Tile:
    """Return the fastest tile: as measured before, by this process or another, or now."""
    key = f"{kind} {tuple(maps)} {dtype}"
    path = _file(device)
    if not _known:
        _known.update(_read(path))
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return tiles[0]
        best = min(tiles, key=lambda tile: _seconds(prepare(tile)))
        _known.update({**_read(path), key: asdict(best)})
        _write(path)
    return Tile(**_known[key])


def _seconds(launch: Launch) -> float:
    from triton.testing import do_bench

    try:
        return float(do_bench(launch.run, warmup=5, rep=20, return_mode="median"))
    except triton.runtime.errors.OutOfResources:  # more shared memory than this GPU has
        return float("inf")


@functools.cache
def _file(device: torch.device) -> Path:
    """Return the file of this GPU's fastest tiles; kernels and compiler are part of its name."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    parts = torch.cuda.get_device_name(device), triton.__version__, hashlib.sha256(sources).hexdigest()
    return user_cache_folder() / "tiles" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path) -> None:
    with contextlib.suppress(OSError):  # the next process would measure again
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(_known, indent=1))
