"""Checkpoints: whole or refused, and nothing in them runs, writes or takes more memory than the file is large."""

from __future__ import annotations

import errno
import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcnn.errors import FastCNNError
from fastcnn.storage import checkpoint

State = dict[str, Any]


@pytest.fixture(scope="module")
def state() -> State:
    """The smallest checkpoint."""
    return {
        "config": {"epochs": 2, "data": "photos"},
        "classes": ["cat", "dog"],
        "network": {"filters": [4, 4, 4, 4, 4]},
        "model": {"weight": torch.arange(500.0)},
        "optimizer": {"lr": torch.tensor(0.1)},
        "average": None,
        "loss_scale": {},
        "epoch": 1,
        "cursor": 0,
        "step": 3,
        "skipped": 0,
        "sums": torch.zeros(3),
        "best": {"epoch": 1, "val/accuracy": 0.5},
        "rows": [{"epoch": 1, "val/accuracy": 0.5}],
        "rng": torch.get_rng_state(),
        "device_rng": None,
    }


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def sealed(path: Path, state: object) -> Path:
    """Write whatever it is as `checkpoint.save` would: an attacker can make a checksum as well as we can."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(checkpoint._sealed(buffer).getvalue())
    return path


def test_what_is_saved_is_loaded(tmp_path: Path, state: State) -> None:
    checkpoint.save(tmp_path / "last.pt", state)
    found = checkpoint.load(tmp_path / "last.pt")
    assert all(equal(found[name], state[name]) for name in state if name != "config")
    assert found["config"]["epochs"] == 2
    assert torch.load(tmp_path / "last.pt", weights_only=True)["classes"] == ["cat", "dog"]  # by torch alone, too
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.long)])
def test_every_flipped_bit_is_noticed(tmp_path: Path, run_dir: Path, count: int) -> None:
    data = (run_dir / "last.pt").read_bytes()
    path = tmp_path / "last.pt"
    for bit in random.Random(0).sample(range(8 * len(data)), count):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(FastCNNError, match=r"damaged: its checksum is wrong|does not end in a checksum"):
            checkpoint.load(path)
    path.write_bytes(data)
    assert checkpoint.load(path)["epoch"] == 2


def test_every_cut_is_noticed(tmp_path: Path, run_dir: Path) -> None:
    data = (run_dir / "last.pt").read_bytes()
    for length in [0, 1, 22, 1000, len(data) // 2, len(data) - 100, len(data) - 1]:
        (tmp_path / "last.pt").write_bytes(data[:length])
        with pytest.raises(FastCNNError, match="is cut short"):
            checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [b"no zip", b"PK\x03\x04 cut short"])
def test_what_is_none_is_one_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FastCNNError, match="no checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(FastCNNError) as caught:
        checkpoint.load(tmp_path / "last.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(FastCNNError, match="cannot read the checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(("format", "what"), [(checkpoint.FORMAT + 1, "upgrade fastcnn"), (1, "start a new run")])
def test_another_version(tmp_path: Path, state: State, format: int, what: str) -> None:
    with pytest.raises(FastCNNError, match=rf"has format {format}, this fastcnn reads {checkpoint.FORMAT}: .*{what}"):
        checkpoint.load(sealed(tmp_path / "last.pt", {**state, "format": format}))


def full(content: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "last.pt", state)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FastCNNError, match=r"No space left on device; the one before it is kept; .*--resume"):
        checkpoint.save(tmp_path / "last.pt", {**state, "epoch": 2})
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_kill_while_saving_keeps_the_old_checkpoint(tmp_path: Path, state: State) -> None:
    checkpoint.save(tmp_path / "last.pt", state)
    half = tmp_path / ".last.pt.partial"
    half.write_bytes(b"half of it")
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    checkpoint.save(tmp_path / "last.pt", {**state, "epoch": 1, "step": 4})
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert not half.exists()


# From elsewhere: the checksum is right, and what is in it is not.


class Evil:
    """Pickles as a call of anything."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("where", ["format", "config", "classes", "model", "rows", "rng", "more"])
@pytest.mark.parametrize("how", ["touch", "system", "eval", "getattr"])
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, state: State, where: str, how: str) -> None:
    owned = tmp_path / "owned"
    evil = {
        "touch": Evil(Path.touch, owned),
        "system": Evil(os.system, f"touch {owned}"),
        "eval": Evil(eval, f"open({str(owned)!r}, 'w')"),
        "getattr": Evil(getattr, "owned", "upper"),
    }[how]
    content = {**state, "format": checkpoint.FORMAT, where: evil}
    with pytest.raises(FastCNNError, match="not a checkpoint that can be read"):
        checkpoint.load(sealed(tmp_path / "last.pt", content))
    content = {**state, "format": checkpoint.FORMAT, "config": {"data": evil}}
    with pytest.raises(FastCNNError, match="not a checkpoint that can be read"):
        checkpoint.load(sealed(tmp_path / "last.pt", content))
    assert not owned.exists()


def bomb() -> list[object]:
    """Lists in lists: a few lines of pickle, 2 ** 50 elements to whoever walks through them."""
    laughs: list[object] = [0]
    for _ in range(50):
        laughs = [laughs, laughs]
    return laughs


WRONG: dict[str, Any] = {  # tensors are made when they are needed: other tests count those that there are
    "epoch": -1,
    "step": 2**70,
    "cursor": True,
    "classes": ["cat", 1],
    "model": {"weight": [1.0]},
    "optimizer": lambda: {"lr": torch.ones(3).to_sparse()},
    "sums": lambda: torch.zeros(1).expand(10**13),
    "average": lambda: torch.zeros(3, device="meta"),
    "rng": "x",
    "rows": [{"epoch": "1"}],
    "best": {1: 2.0},
    "network": {"filters": bomb()},
    "config": {"filters": [[1]]},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_checkpoint_of_ours_holds_is_refused(tmp_path: Path, state: State, name: str) -> None:
    value = WRONG[name]() if callable(WRONG[name]) else WRONG[name]
    content = {**state, "format": checkpoint.FORMAT, name: value}
    with pytest.raises(FastCNNError, match=r"is not a checkpoint of fastcnn"):
        checkpoint.load(sealed(tmp_path / "last.pt", content))
    del content[name]
    with pytest.raises(FastCNNError, match=rf"'{name}' is missing"):
        checkpoint.load(sealed(tmp_path / "last.pt", content))


def test_a_configuration_is_checked_and_makes_no_folders(tmp_path: Path, state: State) -> None:
    for config in ({"lr": "much"}, {"filters": [-1]}, {"epochs": 2**63}):
        content = {**state, "format": checkpoint.FORMAT, "config": config}
        if "epochs" not in config:
            with pytest.raises(FastCNNError, match=r"is not a checkpoint of fastcnn: --"):
                checkpoint.load(sealed(tmp_path / "last.pt", content))
    content = {**state, "format": checkpoint.FORMAT, "config": {"cache_dir": str(tmp_path / "anywhere")}}
    assert checkpoint.load(sealed(tmp_path / "last.pt", content))["config"]["cache_dir"] is None


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path, state: State) -> None:
    buffer = io.BytesIO()
    torch.save({**state, "format": checkpoint.FORMAT, "sums": torch.zeros(10**6)}, buffer)
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "last.pt").write_bytes(checkpoint._sealed(packed).getvalue())
    with pytest.raises(FastCNNError, match="it is compressed"):
        checkpoint.load(tmp_path / "last.pt")
