"""Whatever bytes a file holds, its reader takes them or raises FastCNNError, in little memory."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcnn import Config
from fastcnn.config import DataConfig, read_yaml, resolve
from fastcnn.data import cache, cache_folders, index, split, split_file
from fastcnn.errors import FastCNNError, FastCNNWarning
from fastcnn.network.small_cnn import SmallCNN, restore
from fastcnn.storage import checkpoint
from fastcnn.system.device import peak_memory_bytes
from pipelines import Member

MEMORY = 300 * 2**20  # more than any of them takes, less than a bomb

Read = Callable[[bytes], object]
"""Puts the bytes where the reader finds them, and reads them."""


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return a few changes to some bytes: bits flipped, parts cut out, doubled, moved or put in."""
    kinds = ("flip", "flip", "cut", "double", "move", "put", "number")
    places = st.integers(0, 2**32)
    changes = draw(
        st.lists(st.tuples(st.sampled_from(kinds), places, places, st.binary(max_size=8)), min_size=1, max_size=4)
    )

    def edit(data: bytes) -> bytes:
        for kind, place, other, new in changes:
            if not data:
                return new
            start, length = place % len(data), other % min(64, len(data))
            part = data[start : start + length]
            if kind == "flip":
                data = data[:start] + bytes([data[start] ^ 1 << other % 8]) + data[start + 1 :]
            elif kind == "cut":
                data = data[:start] + data[start + (length if other % 2 else len(data)) :]
            elif kind == "double":
                data = data[:start] + part * (2 + other % 5) + data[start + length :]
            elif kind == "move":
                data = data[: other % len(data)] + part + data[other % len(data) :]
            elif kind == "put":
                data = data[:start] + new + data[start:]
            else:
                data = data[:start] + str(other**2).encode() + data[start + length :]
        return data

    return edit


def listed(photos: Path, folder: Path) -> tuple[bytes, Read]:
    found, path = index.scan(photos), folder / "split.csv"
    found = found.take(np.arange(len(found)) % 10 == 0)
    split_file.write_split(path, found, split.draw_split(found, 0.2, 0))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        split_file.read_split(path, found)

    return path.read_bytes(), read


def names(photos: Path, folder: Path) -> tuple[bytes, Read]:
    """File names of a folder of photos; what is read is written as split.csv, and read again."""

    def read(data: bytes) -> None:
        root = folder / "named"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name in filter(None, data.split(b"\n")):
            path = Path(os.fsdecode(os.fsencode(root) + b"/" + name.replace(b"\0", b"").replace(b"..", b"")))
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        found = index.scan(root)
        splits = split.draw_split(found, 0.5, 0)
        split_file.write_split(folder / "split.csv", found, splits)
        assert (split_file.read_split(folder / "split.csv", found)[1] == splits).all()

    return (
        b"train/cat/1.jpg\ntrain/cat/2.jpg\ntrain/dog/1.jpg\ntrain/dog/2.jpg\ntest/cat/3.jpg\ntest/dog/3.jpg\nval/cat/4.jpg\nval/dog/4.jpg",
        read,
    )


def with_checksums(data: bytes) -> bytes:
    """Return an archive with the right checksum in whatever looks like a header."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    for block in blocks:
        if len(block) == 512 and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def shard(name: str, *, sealed: bool = False) -> Callable[[Path, Path], tuple[bytes, Read]]:
    """A shard and its classes; what is read is photos whose bytes are in the archive."""

    def make(photos: Path, folder: Path) -> tuple[bytes, Read]:
        root = folder / "shards"
        root.mkdir()
        (root / "classes.txt").write_text("cat\ndog\n")
        with tarfile.open(root / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            members = {"1.jpg": b"one", "1.cls": b"0", f"{'long' * 50}/2.jpg": b"", f"{'long' * 50}/2.cls": b"1"}
            members |= {"caf\udce9.png": b"3", "caf\udce9.cls": b"0", "4.jpg": b"4" * 600, "4.cls": b"1"}
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        path = root / name

        def read(data: bytes) -> None:
            path.write_bytes(with_checksums(data) if sealed else data)
            found = index.scan(root)
            splits = split.draw_split(found, 0.5, 0)
            split_file.write_split(folder / "split.csv", found, splits)
            assert (split_file.read_split(folder / "split.csv", found)[1] == splits).all()
            size = (root / "0.tar").stat().st_size
            assert all(isinstance(s, Member) and s.offset + s.size <= size for s in found.sources())

        return path.read_bytes(), read

    return make


def configuration(photos: Path, folder: Path) -> tuple[bytes, Read]:
    import yaml

    path = folder / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        resolve(read_yaml(path))

    return yaml.safe_dump(Config(data=str(photos), filters=(8, 16, 32, 64, 128)).to_dict()).encode(), read


def cache_file(name: str) -> Callable[[Path, Path], tuple[bytes, Read]]:
    def make(photos: Path, folder: Path) -> tuple[bytes, Read]:
        found = index.scan(photos)
        some = found.take(np.arange(len(found)) % 20 == 0)
        everything = np.arange(len(some))
        config = DataConfig(image_size=32, decoder="turbo", cache_dir=str(folder / "cache"))
        built = cache.build(some, config)
        right, path = built.pixels(everything), built.folder / name

        def read(data: bytes) -> None:
            path.write_bytes(data)
            cache_folders.list_caches(folder / "cache")
            again = cache.build(some, config)
            assert (again.pixels(everything) == right).all()

        return path.read_bytes(), read

    return make


def checkpoint_file(*, sealed: bool) -> Callable[[Path, Path], tuple[bytes, Read]]:
    """The file as it is, or what is in it, under a checksum that is right."""

    def make(photos: Path, folder: Path) -> tuple[bytes, Read]:
        model = SmallCNN(2, filters=[1] * 5, dense_neurons=2, image_size=32)
        config = Config(filters=(1,), dense_neurons=2, image_size=32).to_dict()
        state = {
            **{"config": config, "classes": ["cat", "dog"], "network": model.options, "model": model.state_dict()},
            **{"optimizer": {"lr": torch.tensor(0.1)}, "average": None, "loss_scale": {}, "epoch": 1, "cursor": 0},
            **{"step": 3, "skipped": 0, "sums": torch.zeros(3), "best": {"epoch": 1}, "rows": [{"epoch": 1.0}]},
            **{"rng": torch.zeros(8, dtype=torch.uint8), "device_rng": None},
        }
        path = folder / "last.pt"
        checkpoint.save(path, state)
        data = path.read_bytes()
        if sealed:
            buffer = io.BytesIO()
            torch.save({**state, "format": checkpoint.FORMAT}, buffer)
            data = buffer.getvalue()

        def read(data: bytes) -> None:
            if sealed:
                with contextlib.suppress(AssertionError):  # it has no end to put a checksum behind
                    data = checkpoint._sealed(io.BytesIO(data)).getvalue()
            path.write_bytes(data)
            restore(checkpoint.load(path))

        return data, read

    return make


READERS: dict[str, Callable[[Path, Path], tuple[bytes, Read]]] = {
    "split.csv": listed,
    "file names": names,
    "shard": shard("0.tar"),
    "shard, its checksums right": shard("0.tar", sealed=True),
    "classes.txt": shard("classes.txt"),
    "config.yaml": configuration,
    "cache.json": cache_file("cache.json"),
    "photos.jsonl": cache_file("photos.jsonl"),
    "pixels.bin": cache_file("pixels.bin"),
    "last.pt": checkpoint_file(sealed=False),
    "last.pt, its checksum right": checkpoint_file(sealed=True),
}


@pytest.mark.parametrize("count", [5, pytest.param(800, marks=pytest.mark.long)])
@pytest.mark.parametrize("reader", READERS)
def test_mutated_bytes(reader: str, count: int, photos: Path, tmp_path: Path) -> None:
    original, read = READERS[reader](photos, tmp_path)
    read(original)
    before, refused = peak_memory_bytes(torch.device("cpu")), 0

    @settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)
    @given(edits())
    def check(edit: Callable[[bytes], bytes]) -> None:
        nonlocal refused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastCNNWarning)
            try:
                read(edit(original))
            except FastCNNError as error:
                assert "\n" not in str(error)  # noqa: PT017
                refused += 1

    check()
    print(f"{reader}: {count} examples, {refused} refused")
    assert peak_memory_bytes(torch.device("cpu")) - before < MEMORY


# A few lines that grow to gigabytes where they are believed.

YAML_BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "filters: *i",
    "merged": "a: &a {x: 1}\n"
    + "".join(
        f"{name}: &{name} {{<<: [{','.join([f'*{last}'] * 9)}]}}\n"
        for last, name in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "nested": "[" * 50_000,
    "itself": "filters: &a [*a]",
    "large": "# " + "x" * 2**19,
    "digits": "epochs: 0x" + "f" * 10_000,
    "python": "!!python/object/apply:os.system ['touch owned']",
    "python name": "epochs: !!python/name:os.system",
    "tagged": "epochs: !!int ''",
    "wrongly tagged": "strict: !!bool maybe",
    "key": "? [a, b]\n: 1",
    "number for a name": "1: 2",
}


@pytest.mark.parametrize("what", YAML_BOMBS)
def test_a_malicious_configuration_is_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(YAML_BOMBS[what])
    before = peak_memory_bytes(torch.device("cpu"))
    with pytest.raises(FastCNNError) as caught:
        resolve(read_yaml(path))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert [child.name for child in tmp_path.iterdir()] == ["config.yaml"]
    assert peak_memory_bytes(torch.device("cpu")) - before < MEMORY
