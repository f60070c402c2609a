"""Runs that are out of memory or disk: what is kept, and what is said."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcnn import Config, fit
from fastcnn.data import cache, cache_files, cache_folders
from fastcnn.data import loaders as loader
from fastcnn.errors import FastCNNError, FastCNNWarning, UsageError
from fastcnn.runs import trackers
from fastcnn.runs.failures import largest_batch_size
from fastcnn.runs.fit import resolve_machine
from fastcnn.storage import checkpoint
from fastcnn.system import stopwatch
from fastcnn.system.ranks import ALONE
from fastcnn.training.step import TrainingStep
from tests.runs.small_runs import SMALL, assert_equal, figures, go_on


def exhausted(*arguments: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page more")


def test_auto_steps_down_to_mapped(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.LOADERS, "resident", exhausted)
    with pytest.warns(FastCNNWarning, match=r"loader mapped: resident ran out of memory \(CUDA out of memory.*GiB\.\)"):
        run = fit(Config(data=str(photos), **SMALL))
    assert run.summary["loader"] == "mapped"
    assert "ran out of memory" in run.summary["loader_reason"]
    with pytest.raises(FastCNNError, match="--strict"):
        fit(Config(data=str(photos), strict=True, **SMALL))


def test_resident_out_of_memory_names_what_fits(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.LOADERS, "resident", exhausted)
    with pytest.raises(
        FastCNNError, match=r"out of memory on cpu .*: use --loader mapped, which fits with --batch-size 16$"
    ):
        fit(Config(data=str(photos), loader="resident", **SMALL))


@pytest.mark.parametrize(
    ("most", "said"), [(5, "use --loader mapped --batch-size 4, which fits"), (1, "not even one batch of 2 fits")]
)
def test_a_batch_out_of_memory_names_what_fits(
    photos: Path, most: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainingStep.__call__

    def step(self: TrainingStep, functions: object = None) -> None:
        if self.batch_size > most:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        plain(self)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    with pytest.raises(FastCNNError, match=f"out of memory on cpu .*{said}"):
        fit(Config(data=str(photos), **SMALL))


def test_other_errors_are_not_taken_for_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setitem(loader.LOADERS, "resident", wrong)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        fit(Config(data=str(photos), **SMALL))


def test_the_batch_that_fits_is_tried(photos: Path) -> None:
    assert largest_batch_size(resolve_machine(Config(data=str(photos), **SMALL), ALONE)) == 16


def test_a_disk_that_is_full_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, row: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trackers.CsvTracker, "epoch", full)
        with pytest.raises(FastCNNError) as caught:
            fit(Config(data=str(photos), **SMALL), run_dir="run")
    assert str(caught.value) == (
        "cannot write run: No space left on device; saved in run/last.pt; to continue, run: fastcnn train --resume run"
    )
    assert len(figures(go_on("run"))) == 2


def test_a_cache_that_is_deleted_meanwhile_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clear(self: object, row: object) -> None:
        cache_folders.clear("cache", force=True)

    with monkeypatch.context() as patch:
        patch.setattr(trackers.CsvTracker, "epoch", clear)
        with pytest.raises(FastCNNError, match=r"cannot read the cache .*: No such file or directory") as caught:
            fit(Config(data=str(photos), loader="mapped", cache_dir="cache", **SMALL), run_dir="my run")
    assert str(caught.value).endswith(
        "No such file or directory; saved in my run/last.pt; to continue, run: fastcnn train --resume 'my run'"
    )
    assert len(figures(go_on("my run"))) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no room; the last few bytes too."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("stage", ["scan", "decode", "upload", "train", "checkpoint", "eval", "report", "export"])
def test_a_disk_that_fills_up_in_a_stage(
    config: Config, whole: Path, small_disk: Path, stage: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clear error (or the run finished, with a warning), the last checkpoint loads, and with room it goes on."""
    config = Config(
        **{
            **config.to_dict(),
            "cache_dir": str(small_disk / "cache"),
            "checkpoint_every": "2",
            "report": True,
            "export": ("torchscript",),
        }
    )
    plain, entered, folder = stopwatch.Stopwatch.stage, 0, small_disk / "run"

    @contextlib.contextmanager
    def filling(self: stopwatch.Stopwatch, name: str) -> Iterator[None]:
        nonlocal entered
        entered += name == stage
        if name == stage and entered == times:
            fill(small_disk)
        with plain(self, name):
            yield

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FastCNNWarning)
        patch.setattr(stopwatch.Stopwatch, "stage", filling)
        patch.setattr(cache, "check_space", lambda *arguments: None)  # it fills up after that
        patch.setattr(cache_files, "CHUNK", 20)
        said = ""
        try:
            fit(config, run_dir=folder)
        except FastCNNError as error:
            said = str(error)
    assert "\n" not in said
    assert "No space left on device" in said or "no export" in said or entered < times
    print(stage, times, said)
    (small_disk / "ballast").unlink(missing_ok=True)
    if (folder / "last.pt").is_file():
        checkpoint.load(folder / "last.pt")
    if (folder / "config.yaml").is_file():
        with contextlib.suppress(UsageError):  # it was finished
            go_on(folder)
    else:
        fit(config, run_dir=folder)
    assert_equal(folder, whole)


@pytest.mark.long
def test_a_cache_without_room_is_said_before_anything_is_decoded(config: Config, small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(FastCNNError, match=r"cannot write the cache|the cache needs 0 MiB"):
        fit(Config(**{**config.to_dict(), "cache_dir": str(small_disk), "loader": "resident"}))


@pytest.mark.long
def test_a_read_only_cache_is_used_where_it_is_whole(config: Config, whole: Path, small_disk: Path) -> None:
    config = Config(**{**config.to_dict(), "cache_dir": str(small_disk)})
    fit(config, run_dir="first")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = fit(config, run_dir="second")
    assert run.summary["num_decoded"] == 0
    assert_equal(run.run_dir, whole)
    with pytest.raises(FastCNNError, match=r"cannot write the cache .*; choose another with --cache-dir"):
        fit(Config(**{**config.to_dict(), "image_size": 40}), run_dir="third")
    assert not Path("third").exists()
