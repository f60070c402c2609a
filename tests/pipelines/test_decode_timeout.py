"""Photos on which the decoder hangs: found, told, and not waited for again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines
from fastcnn.cli import main
from fastcnn.config import Config, DataConfig
from fastcnn.data import cache
from fastcnn.data.cached_photos import Cache
from fastcnn.data.index import scan
from pipelines import Verdict, workers
from pipelines.shared_memory import shared
from pipelines.workers import Workers
from tests.pipelines.test_pipelines import camera, encoded

SIZE = 32
PHOTOS = [encoded(camera(60, 40, seed)) for seed in range(20)]


def decode(decoding: Workers, sources: list[bytes]) -> tuple[np.ndarray, list[Verdict]]:
    out = shared((len(sources), SIZE, SIZE, 3))
    return out, decoding.decode(sources, SIZE, out)


def write(folder: Path, contents: list[bytes]) -> Path:
    for i, content in enumerate(contents):
        (folder / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"class {i % 2}" / f"{i:03}.jpg").write_bytes(content)
    return folder


def test_a_photo_on_which_the_decoder_hangs_is_found(planted: str) -> None:
    """In time that the interpreter is free, or holding its lock, as C code may."""
    sources = [*PHOTOS[:7], PHOTOS[7] + b"slow", *PHOTOS[8:19], PHOTOS[19] + b"stuck"]
    with Workers(planted, timeout=2) as decoding:
        got, verdicts = decode(decoding, sources)
        assert decode(decoding, PHOTOS)[1] == [Verdict()] * 20
    hung = Verdict("decoder hung", "longer than 2 s")
    assert verdicts == [hung if i in (7, 19) else Verdict() for i in range(20)]
    right = np.zeros_like(got)
    pipelines.decode(PHOTOS, SIZE, right, decoder="pillow")
    right[[7, 19]] = 0
    assert np.array_equal(got, right)


def test_several_workers_of_which_one_hangs(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "THREADS", 1)
    with Workers(planted, threads=2, timeout=1) as decoding:
        _, verdicts = decode(decoding, [PHOTOS[0], PHOTOS[1] + b"slow"])
    assert [verdict.reason for verdict in verdicts] == ["", "decoder hung"]


def test_many_photos_may_together_take_longer_than_one(planted: str) -> None:
    """Only what stands still hangs; here each photo takes an eighth of the limit."""
    with Workers(planted, timeout=1.6) as decoding:
        begun = time.perf_counter()
        _, verdicts = decode(decoding, [photo + b"a while" for photo in PHOTOS[:10]])
        assert time.perf_counter() - begun > 1.9
    assert all(verdict.ok for verdict in verdicts)


@pytest.mark.long
def test_a_photo_that_hung_is_asked_again_by_a_run_that_gives_it_more_time(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "data", [PHOTOS[0], PHOTOS[1] + b"slow"])
    monkeypatch.setitem(pipelines.BACKENDS, "pillow", "planted_decoder")

    def build(seconds: float) -> Cache:
        config = DataConfig(image_size=SIZE, decoder="pillow", cache_dir="cache", decode_timeout=seconds)
        return cache.build(scan(data), config)

    built = build(1)
    assert built.reasons == {1: "decoder hung"}
    assert build(1).num_decoded == 0
    again = build(1.5)
    assert again.num_decoded == 1
    assert again.reasons == built.reasons


@pytest.mark.long
@pytest.mark.filterwarnings("default:1 of 20 photos cannot be used")
def test_the_limit_is_an_option_of_the_commands(
    planted: str, exports: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        status = main([*map(str, arguments)])
        return status, "".join(capsys.readouterr())

    assert Config().decode_timeout == workers.DECODE_TIMEOUT
    for name in ("pillow", "turbo"):
        monkeypatch.setitem(pipelines.BACKENDS, name, "planted_decoder")
    data = write(Path("data"), [*PHOTOS[:19], PHOTOS[19] + b"slow"])
    limit = ["--decode-timeout", 1]
    code, told = run("data", "check", data, *limit)
    assert code == 0
    assert "class 1/019.jpg: decoder hung (longer than 1 s)" in told
    code, told = run("predict", exports("torchscript"), data, *limit)
    assert code == 1
    assert "class 1/019.jpg  not used: decoder hung" in told
    small = [
        "--decoder",
        "pillow",
        "--image-size",
        32,
        "--filters",
        4,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--no-report",
        "--run-dir",
        "run",
    ]
    code, told = run("train", data, *small, *limit)
    assert code == 0, told
    assert "class 1/019.jpg,decoder hung" in Path("run/bad_images.csv").read_text()
    code, told = run("eval", "run", *limit)
    assert code == 0, told
    for wrong in ("soon", 0, "nan"):
        code, told = run("train", data, "--decode-timeout", wrong)
        assert code == 2
        assert "--decode-timeout" in told
