"""Files from elsewhere, each as malicious as it can be: nothing in them runs, nothing is written outside.

Archives are in tests/test_data.py, checkpoints by themselves in tests/test_checkpoint.py, configurations in
tests/test_mutated.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcnn import Config, fit
from fastcnn.cli import main
from fastcnn.config import DataConfig
from fastcnn.data import cache, index, journal_files
from fastcnn.data.journal import facts
from fastcnn.errors import DataError, FastCNNError, FastCNNWarning
from fastcnn.runs.evaluate_run import evaluate_run
from fastcnn.storage import checkpoint
from tests.storage.test_checkpoint import Evil, sealed

SMALL: dict[str, Any] = {"epochs": 1, "image_size": 32, "filters": (8,), "batch_size": 16, "report": False}


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def mine(photos: Path, tmp_path: Path) -> Path:
    """A folder of photos, and beside it what nobody may touch."""
    shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "photos"


@pytest.mark.parametrize("command", [["eval"], ["export"], ["train", "--resume"], ["train", "photos", "--init-from"]])
def test_a_malicious_checkpoint(
    mine: Path, run_dir: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Through every command that opens one."""
    shutil.copytree(run_dir, "run")
    state = {**checkpoint.load(run_dir / "best.pt"), "format": checkpoint.FORMAT}
    state["network"] = Evil(os.system, f"touch {tmp_path / 'owned'}")
    before = tree(tmp_path)
    for plain in (False, True):
        for name in ("best.pt", "last.pt"):
            if plain:
                Path("run", name).write_bytes(pickle.dumps(state))
            else:
                sealed(Path("run", name), state)
        status = main([*command, "run"])
        assert status == 1
        err = capsys.readouterr().err
        assert "best.pt" in err or "last.pt" in err
        assert "weights_only" not in err
        assert sum(not line.startswith("opening ") for line in err.splitlines()) == 1
    assert tree(tmp_path) - before <= {tmp_path / "runs"}


def test_a_checkpoint_that_claims_a_large_network(run_dir: Path) -> None:
    """Nothing of its size is made."""
    shutil.copytree(run_dir, "run")
    state = {**checkpoint.load(run_dir / "best.pt"), "format": checkpoint.FORMAT}
    for name, value in (("dense_neurons", 2**40), ("filters", [2**30] * 5), ("kernel_size", 2**20 + 1)):
        changed = {part: {**state[part], name: value} for part in ("network", "config")}
        sealed(Path("run/best.pt"), {**state, **changed})
        with pytest.raises(FastCNNError, match="the checkpoint cannot be used: "):
            evaluate_run("run")
        sealed(Path("run/best.pt"), {**state, "network": changed["network"]})
        with pytest.raises(FastCNNError, match=rf"the checkpoint cannot be used: '{name}' is"):
            evaluate_run("run")


def test_a_checkpoint_that_names_folders(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, "run")
    state = {**checkpoint.load(run_dir / "best.pt"), "format": checkpoint.FORMAT}
    sealed(Path("run/best.pt"), {**state, "config": {**state["config"], "cache_dir": str(tmp_path / "elsewhere")}})
    evaluate_run("run")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "cat/../../secret", "a" * 10_000, "x\ny", "\x1b[2J"])
def test_a_malicious_split_file(mine: Path, tmp_path: Path, name: str) -> None:
    """It names photos of the folder, and nothing else is ever opened by it."""
    (tmp_path / "split.csv").write_text(f'path,label,split\n"{name}",cat,train\n')
    before = tree(tmp_path)
    with pytest.raises(DataError, match="lacks 1 of the 1 photos in ") as caught:
        fit(Config(data=str(mine), split=str(tmp_path / "split.csv"), **SMALL))
    assert str(caught.value).isprintable()
    assert tree(tmp_path) == before


def journal_line(entry: dict[str, object]) -> bytes:
    return journal_files.line({"digest": "", "row": 0, "crc": 0, "reason": "", **entry})


@pytest.mark.parametrize(
    "entry",
    [{"row": row} for row in (-1, -2, 10**6, 2**63, -(2**80))]
    + [{"row": row, "reason": "corrupt"} for row in (0, -(2**80))],
)
def test_a_malicious_cache(mine: Path, tmp_path: Path, entry: dict[str, object]) -> None:
    """Its checksums are right, and its rows are elsewhere: they are decoded again."""
    found = index.scan(mine)
    built = cache.build(found, DataConfig(image_size=32, decoder="turbo", cache_dir="cache"))
    right, journal = built.pixels(found.labels * 0), built.folder / "photos.jsonl"
    known = {**facts(found, 0), "crc": zlib.crc32(b"")}
    journal.write_bytes(journal.read_bytes() + journal_line({**known, **entry}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastCNNWarning)
        again = cache.build(found, DataConfig(image_size=32, decoder="turbo", cache_dir="cache"))
    assert again.num_decoded == 1
    assert (again.pixels(found.labels * 0) == right).all()


HEADERS: dict[str, bytes] = {
    "pickle": pickle.dumps(Evil(os.system, "touch owned")),
    "nested": b"[" * 10**6,
    "types": json.dumps({"root": {"a": []}, "image_size": [1], "decoder": None}).encode(),
    "digits": b'{"format": ' + b"9" * 10**5 + b"}",
    "list": b"[1, 2]",
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_malicious_cache_header(mine: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = index.scan(mine)
    folder = cache.build(found, DataConfig(image_size=32, decoder="turbo", cache_dir="cache")).folder
    (folder / "cache.json").write_bytes(HEADERS[what])
    before = tree(tmp_path)
    for command in ("list", "info"):
        status = main(["cache", command, "--cache-dir", "cache"])
        assert not status
    with pytest.warns(FastCNNWarning, match="decoding every photo again"):
        cache.build(found, DataConfig(image_size=32, decoder="turbo", cache_dir="cache"))
    assert tree(tmp_path) == before


IMAGES: dict[str, Callable[[Path], bytes]] = {
    "PostScript": lambda owned: (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {owned}) (w) file\n".encode()
    ),
    "PDF": lambda owned: b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(" + os.fsencode(owned) + b")>>>>endobj\n",
    "SVG": lambda owned: f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{owned}"/></svg>'.encode(),
    "pickle": lambda owned: pickle.dumps(Evil(os.system, f"touch {owned}")),
    "MVG": lambda owned: f"push graphic-context\nimage over 0,0 9,9 'https://x\"|touch {owned}\"'\n".encode(),
    "script": lambda owned: f"#!/bin/sh\ntouch {owned}\n".encode(),
}


@pytest.mark.parametrize("decoder", ["turbo", "pillow"])
@pytest.mark.parametrize("what", IMAGES)
def test_a_malicious_image(mine: Path, tmp_path: Path, what: str, decoder: str) -> None:
    """Named .jpg among photos: formats that run things are not even tried."""
    owned = tmp_path / "owned"
    (next(mine.iterdir()) / "evil.jpg").write_bytes(IMAGES[what](owned))
    before = tree(tmp_path)
    found = index.scan(mine)
    built = cache.build(found, DataConfig(image_size=32, decoder=decoder, cache_dir="cache"))
    (reason,) = built.reasons.values()
    assert reason in ("not an image", "unsupported format")
    assert tree(tmp_path) - before == {tmp_path / "cache"} | tree(tmp_path / "cache")


def test_nothing_of_ours_unpickles() -> None:
    """What we read ourselves is JSON, CSV, YAML and pixels."""
    root = Path(index.__file__).parents[1]
    for path in [*root.rglob("*.py"), *(root.parent / "pipelines").rglob("*.py")]:
        code = path.read_text(encoding="utf-8")
        for word in ("pickle.load", "allow_pickle=True", "yaml.load(", "weights_only=False", "shell=True", "marshal"):
            assert word not in code, f"{path}: {word}"
