"""Which loader is chosen, by the memory that pixels may take."""

from __future__ import annotations

import pytest
import torch

from fastcnn.config import Loader, resolve
from fastcnn.data.loaders import choose
from fastcnn.errors import FastCNNError, UsageError
from fastcnn.system.device import free_memory_bytes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize(
    ("loader", "needed", "on_disk", "limit", "expected", "why"),
    [
        ("auto", 500, True, 500, "resident", "take 500 MiB of the 500 MiB that --memory-limit allows"),
        ("auto", 501, True, 500, "mapped", "501 MiB, more than the 500 MiB that --memory-limit allows"),
        ("auto", 500, True, None, "resident", "of the 500 MiB that they may take of the free memory"),
        ("auto", 501, True, None, "mapped", "more than the 500 MiB"),
        ("auto", 501, False, 500, "stream", "no room on disk for the photos' 501 MiB"),
        ("auto", 1, False, None, "stream", "no room on disk"),
        ("resident", 501, False, None, "resident", ""),
        ("mapped", 1, True, 500, "mapped", ""),
        ("stream", 1, True, 500, "stream", ""),
    ],
)
def test_the_choice(
    loader: Loader,
    needed: int,
    on_disk: bool,
    limit: int | None,
    expected: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastcnn.data.loaders.free_memory_bytes", lambda device: 1000 * MIB)
    limit = limit and limit * MIB
    name, reason = choose(loader, needed * MIB, on_disk=on_disk, device=CPU, memory_limit=limit)
    assert name == expected
    assert why in reason
    assert bool(why) == bool(reason)


def test_resident_beyond_the_limit_is_an_error() -> None:
    with pytest.raises(FastCNNError, match="--loader mapped"):
        choose("resident", 2 * MIB, on_disk=True, device=CPU, memory_limit=MIB)


def test_free_memory_is_that_of_this_machine() -> None:
    assert 10 * MIB < free_memory_bytes(CPU) < 2**50


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GB", 2 * 10**9),
        ("2g", 2 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("64KiB", 2**16),
        ("1000", 1000),
        (1000, 1000),
        ("1000b", 1000),
    ],
)
def test_memory_limits(text: str | int, count: int) -> None:
    assert resolve({"memory_limit": text}).memory_limit == count


@pytest.mark.parametrize("text", ["", "none", None])
def test_no_memory_limit(text: str | None) -> None:
    assert resolve({"memory_limit": text}).memory_limit is None


@pytest.mark.parametrize("text", ["much", "-1", "0", "0.1", "GB", "1XB", "1iB", "1e9", True, "nan", "1.2.3G"])
def test_wrong_memory_limits_are_named(text: object) -> None:
    with pytest.raises(UsageError, match="--memory-limit: expected bytes as 2GB"):
        resolve({"memory_limit": text})
