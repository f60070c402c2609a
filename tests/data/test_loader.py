"""Every loader gives the step the same photos in the same order, whatever is slow, breaks or is interrupted."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pipelines
from fastcnn import Config, fit
from fastcnn.config import DataConfig, Loader
from fastcnn.data import buffered_feed, cache, cache_folders, dataset
from fastcnn.data.buffered_feed import BatchBuffer, BufferedFeed
from fastcnn.data.cached_photos import Cache
from fastcnn.data.crops import crop_boxes
from fastcnn.data.feeds import Feed, shuffled
from fastcnn.data.index import Index, scan
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.errors import DataError, FastCNNError, FastCNNWarning
from fastcnn.storage import checkpoint

SIZE, BATCH = 32, 16


CPU = torch.device("cpu")


DECODER = pipelines.choose("auto", gpu=False)[0]  # a GPU box may lack simplejpeg


BUFFERED = ["mapped", "stream"]


SMALL: dict[str, Any] = {
    "epochs": 2,
    "image_size": 48,
    "filters": (8,),
    "batch_size": 16,
    "threads": 1,
    "deterministic": True,
    "report": False,
}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name == "feed"]


@pytest.fixture(scope="module")
def index(photos: Path) -> Index:
    return scan(photos)


@pytest.fixture(scope="module")
def decoded(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return cache.build(
        index, DataConfig(image_size=SIZE, decoder=DECODER, cache_dir=str(tmp_path_factory.mktemp("cache")))
    )


def make_feed(loader: str, index: Index, decoded: Cache, count: int = 37, **options: Any) -> Feed:
    """A feed of `count` photos in no order of the index."""
    chosen = np.random.default_rng(0).permutation(len(index))[:count]
    return LOADERS[loader](decoded, chosen, Options(**{"device": CPU, "batch_size": BATCH, **options}))


def batches(feed: Feed, num_steps: int) -> list[tuple[Tensor, Tensor]]:
    """What a step sees, by the gather that stands in it; what is past the end repeats the last, as in evaluation."""
    seen = []

    def run(steps: int) -> None:
        for _ in range(steps):
            places = feed.cursor + torch.arange(BATCH, device=feed.cursor.device)
            photos = feed.permutation.index_select(0, places.clamp(max=len(feed) - 1))
            seen.append((feed.images.index_select(0, photos).cpu(), feed.labels.index_select(0, photos).cpu()))
            feed.cursor.add_(BATCH)

    feed.drive(run, num_steps)
    return seen


def two_epochs(feed: Feed) -> list[tuple[Tensor, Tensor]]:
    count = len(feed)
    seen = []
    for epoch in (1, 2):
        with feed.start_epoch(7, epoch):
            seen += batches(feed, 1) + batches(feed, count // BATCH - 1)  # in portions, as in training
    return seen


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("count", [16, 37, 64])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_same_batches(loader: str, count: int, index: Index, decoded: Cache) -> None:
    expected = two_epochs(make_feed("resident", index, decoded, count))
    assert len(expected) == 2 * (count // BATCH)
    assert equal(two_epochs(make_feed(loader, index, decoded, count)), expected)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 37])
@pytest.mark.parametrize("loader", LOADERS)
def test_an_evaluation_sees_every_photo_once(loader: str, count: int, index: Index, decoded: Cache) -> None:
    feed, chosen = make_feed(loader, index, decoded, count), np.random.default_rng(0).permutation(len(index))[:count]
    for _ in range(2):
        seen, places = [], torch.arange(min(BATCH, count))

        def run(steps: int, seen: list[Tensor] = seen, places: Tensor = places) -> None:
            for _ in range(steps):
                photos = feed.permutation.index_select(0, (feed.cursor + places).clamp(max=count - 1))
                seen.append(feed.images.index_select(0, photos))
                feed.cursor.add_(len(places))

        with feed.start_in_order():
            feed.drive(run, -(-count // len(places)))
        assert np.array_equal(torch.cat(seen)[:count].numpy(), decoded.pixels(chosen))


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_goes_on_where_it_was(loader: str, index: Index, decoded: Cache) -> None:
    feed = make_feed(loader, index, decoded, 64)
    with feed.start_epoch(7, 1):
        whole = batches(feed, 4)
    with feed.start_epoch(7, 1, cursor=3 * BATCH):
        assert equal(batches(feed, 1), whole[3:])


@pytest.mark.parametrize("slow", ["thread", "step"])
def test_who_is_slow_changes_nothing(slow: str, index: Index, decoded: Cache) -> None:
    expected = two_epochs(make_feed("resident", index, decoded))
    feed = make_feed("mapped", index, decoded)
    assert isinstance(feed, BufferedFeed)
    fill, drive = feed.fill, feed.drive

    def slow_fill(*args: Any) -> dict[str, str]:
        args[1][:] = 0  # an early reader would see it
        time.sleep(0.02)
        return fill(*args)

    def slow_drive(run: Callable[[int], None], num_steps: int) -> None:
        def slow_run(steps: int) -> None:
            time.sleep(0.02)
            run(steps)

        drive(slow_run, num_steps)

    if slow == "thread":
        feed.fill = slow_fill
    else:
        feed.drive = slow_drive  # type: ignore[method-assign]
    assert equal(two_epochs(feed), expected)


def test_a_copy_between_host_and_device(index: Index, decoded: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the step cannot read what the thread writes. Here both are on the CPU."""

    class Apart(BatchBuffer):
        def __init__(self, images: Tensor, labels: Tensor) -> None:
            super().__init__(images, labels)
            self._keep_apart()

    monkeypatch.setattr(buffered_feed, "BatchBuffer", Apart)
    expected = two_epochs(make_feed("resident", index, decoded))
    assert equal(two_epochs(make_feed("mapped", index, decoded)), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("loader", BUFFERED)
def test_the_buffer_on_a_gpu(loader: str, index: Index, decoded: Cache) -> None:
    """Hundreds of batches: a copy that did not wait for the step, or a step that did not for its copy, would show."""
    device = torch.device("cuda", 0)
    expected = make_feed("resident", index, decoded, 120)
    ours = make_feed(loader, index, decoded, 120, device=device)
    assert isinstance(ours, BufferedFeed)
    assert ours.buffers[0].stream is not None
    for epoch in range(1, 31):
        with expected.start_epoch(3, epoch), ours.start_epoch(3, epoch):
            torch.cuda._sleep(10_000_000)  # the host runs ahead of the device
            assert equal(batches(ours, 7), batches(expected, 7))


def test_an_error_in_the_thread_is_raised_as_it_is(index: Index, decoded: Cache) -> None:
    feed = make_feed("mapped", index, decoded)

    def broken(*args: Any) -> dict[str, str]:
        raise DataError("the disk is gone")

    assert isinstance(feed, BufferedFeed)
    feed.fill = broken
    with pytest.raises(DataError, match="the disk is gone"), feed.start_epoch(7, 1):
        batches(feed, 2)
    with feed.start_epoch(7, 1):
        for _ in range(2):  # who asks again does not wait for ever
            with pytest.raises(DataError):
                batches(feed, 1)


def test_more_steps_than_batches_is_an_error(index: Index, decoded: Cache) -> None:
    feed = make_feed("mapped", index, decoded)
    with feed.start_epoch(7, 1), pytest.raises(AssertionError, match="no more batches"):
        batches(feed, 3)


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("loader", BUFFERED)
def test_an_interrupted_epoch_leaves_no_thread(loader: str, done: int, index: Index, decoded: Cache) -> None:
    feed, before = make_feed(loader, index, decoded, 64), threading.active_count()
    left = [None] * done

    def run(steps: int) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()

    with pytest.raises(KeyboardInterrupt), feed.start_epoch(7, 1):
        feed.drive(run, 4)
    assert threading.active_count() == before
    with feed.start_epoch(7, 1):  # and the next can begin
        batches(feed, 4)


def test_a_cache_that_vanishes_is_one_line(index: Index, tmp_path: Path) -> None:
    decoded = cache.build(index, DataConfig(image_size=SIZE, decoder=DECODER, cache_dir=str(tmp_path / "cache")))
    feed = make_feed("mapped", index, decoded)
    with (decoded.folder / "pixels.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(FastCNNError, match="became shorter") as caught, feed.start_epoch(7, 1):
        batches(feed, 2)
    cache_folders.clear(tmp_path / "cache", force=True)
    with pytest.raises(FastCNNError, match="No such file") as caught, feed.start_epoch(7, 1):
        batches(feed, 2)
    assert "\n" not in str(caught.value)


# stream


@pytest.fixture
def fragile(photos: Path, tmp_path: Path) -> tuple[Index, Cache]:
    """Photos that a test may damage, checked and not stored."""
    shutil.copytree(photos, tmp_path / "fragile", ignore=shutil.ignore_patterns(".*"))
    index = scan(tmp_path / "fragile")
    return index, cache.build(
        index, DataConfig(image_size=SIZE, decoder=DECODER, cache_dir=str(tmp_path / "c")), keep_pixels=False
    )


def test_photos_are_checked_and_not_stored(fragile: tuple[Index, Cache], tmp_path: Path) -> None:
    index, checked = fragile
    assert checked.usable.all()
    assert not (checked.folder / "pixels.bin").exists()
    again = cache.build(
        index, DataConfig(image_size=SIZE, decoder=DECODER, cache_dir=str(tmp_path / "c")), keep_pixels=False
    )
    assert (checked.num_decoded, again.num_decoded) == (120, 0)
    assert cache_folders.list_caches(tmp_path / "c")[0]["photos"] == 120
    stored = cache.build(index, DataConfig(image_size=SIZE, decoder=DECODER, cache_dir=str(tmp_path / "c")))
    assert stored.folder != checked.folder
    assert stored.num_decoded == 120


def test_a_photo_that_vanishes_is_replaced_in_training(fragile: tuple[Index, Cache]) -> None:
    index, checked = fragile
    feed = LOADERS["stream"](checked, np.arange(40), Options(device=CPU, batch_size=BATCH))
    order = shuffled(40, (7, 1))
    with feed.start_epoch(7, 1):
        before = batches(feed, 2)
    gone, damaged = (index.root / index.paths[order[i]] for i in (15, 20))
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.warns(FastCNNWarning, match="2 training photos were usable before") as caught, feed.start_epoch(7, 1):
        after = batches(feed, 2)
    assert len(caught) == 1
    assert index.paths[order[15]] in str(caught[0].message)
    before[0][0][15], before[0][1][15] = before[0][0][0], before[0][1][0]  # the next of its batch stands in, in turn
    before[1][0][4], before[1][1][4] = before[1][0][5], before[1][1][5]
    assert equal(before, after)
    with warnings.catch_warnings(), feed.start_epoch(7, 1):  # said once
        warnings.simplefilter("error")
        batches(feed, 2)


def test_a_photo_that_vanishes_is_an_error_in_evaluation(fragile: tuple[Index, Cache]) -> None:
    index, checked = fragile
    feed = LOADERS["stream"](checked, np.arange(40), Options(device=CPU, batch_size=BATCH))
    (index.root / index.paths[33]).unlink()
    with pytest.raises(DataError, match=f"{index.paths[33]} .*unreadable"), feed.start_in_order():
        batches(feed, 3)


def test_a_batch_without_any_photo_is_an_error(fragile: tuple[Index, Cache]) -> None:
    index, checked = fragile
    feed = LOADERS["stream"](checked, np.arange(40), Options(device=CPU, batch_size=BATCH))
    shutil.rmtree(index.root)
    with pytest.raises(DataError, match="cannot be decoded any more"), feed.start_epoch(7, 1):
        batches(feed, 2)


@pytest.mark.parametrize("decoder", pipelines.BACKENDS)
def test_training_photos_are_cropped_and_no_others(decoder: str, index: Index, decoded: Cache) -> None:
    try:
        pipelines.choose(decoder, gpu=False)
    except pipelines.DecoderUnavailable as error:
        pytest.skip(str(error))
    feed = make_feed("stream", index, decoded, crop_scale=0.35, decoder=decoder)
    plain = make_feed("stream", index, decoded, decoder=decoder)
    runs = []
    for _ in range(2):
        with feed.start_epoch(7, 1):
            runs.append(batches(feed, 2))
    assert equal(*runs)
    with feed.start_epoch(7, 2):
        assert not equal(batches(feed, 2), runs[0])
    with plain.start_epoch(7, 1):
        assert not equal(batches(plain, 2), runs[0])
    with feed.start_in_order(), plain.start_in_order():
        assert equal(batches(feed, 3), batches(plain, 3))
    chosen = np.random.default_rng(0).permutation(len(index))[:37][shuffled(37, (7, 1))][:BATCH]
    paths = [index.root / index.paths[photo] for photo in chosen]
    boxes = np.array([
        crop_boxes(7, 1, chosen[i : i + 1], np.array([[width, height]]), (0.35, 1))[0]
        for i, (width, height) in enumerate(upright_size(path) for path in paths)
    ])  # fmt: skip
    expected = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)
    pipelines.decode(paths, SIZE, expected, boxes, decoder=decoder)
    assert np.array_equal(runs[0][0][0].numpy(), expected)


def upright_size(path: Path) -> tuple[int, int]:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


# whole runs


@pytest.fixture(scope="module")
def reference(
    photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], list[tuple[float, ...]]]:
    return outcome(
        fit(Config(data=str(photos), loader="resident", **SMALL), run_dir=tmp_path_factory.mktemp("r") / "r")
    )


def outcome(run: Any) -> tuple[dict[str, Tensor], list[tuple[float, ...]]]:
    names = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
    return checkpoint.load(run.run_dir / "last.pt")["model"], [
        tuple(row[name] for name in names) for row in run.metrics
    ]


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_trains_the_same_model_to_the_bit(loader: Loader, photos: Path, reference: Any) -> None:
    run = fit(Config(data=str(photos), loader=loader, **SMALL))
    weights, scores = outcome(run)
    assert scores == reference[1]
    assert all(torch.equal(weights[name], reference[0][name]) for name in weights)
    assert run.summary["loader"] == loader


def test_auto_picks_what_fits_and_says_so(photos: Path, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(Config(data=str(photos), memory_limit="100KB", **SMALL))
    assert run.summary["loader"] == "mapped"
    assert "--memory-limit" in run.summary["loader_reason"]
    assert outcome(run)[1] == reference[1]
    monkeypatch.setattr("fastcnn.data.dataset.fits_on_disk", lambda *arguments, **options: False)
    config = Config(data=str(photos), **SMALL)
    with pytest.warns(FastCNNWarning, match="loader stream: there is no room on disk"):
        assert dataset.prepare(config).loader == "stream"
    with pytest.raises(FastCNNError, match=r"there is no room on disk .*because of --strict"):
        fit(Config(data=str(photos), strict=True, **SMALL))
    monkeypatch.undo()
    assert dataset.prepare(config).loader == "resident"


def test_the_disk_has_room_for_what_is_there(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(image_size=SIZE, decoder=DECODER, cache_dir=str(tmp_path / "c"))
    assert cache.fits_on_disk(index, config)
    full = shutil._ntuple_diskusage(1, 1, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert not cache.fits_on_disk(index, config)
    monkeypatch.undo()
    cache.build(index, config)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert cache.fits_on_disk(index, config)
