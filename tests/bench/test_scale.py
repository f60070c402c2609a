"""The plan in docs/scale.md: its tables are what the model says, and the model is what it is made of."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from bench.report.record import read
from bench.scale import __main__ as command
from bench.scale import picture, rates, tables
from bench.scale.run import Plan, run
from bench.scale.simulation import simulate
from bench.scale.step import GRADIENT_BYTES, NUM_PARAMETERS, collective, slowest, step

VALUES = rates.rate_values()
DURATIONS = [
    "start",
    "checkpoint",
    "launch",
    "jitter",
    "start_gpu",
    "join",
    "collective",
    "hop_node",
    "hop_net",
    "jpeg",
]
OTHERS = {
    "cpu_step",
    "evaluate",
    "index",
    "gloo_small",
    "gloo_gradient",
    "memory",
    "host_memory",
    "disk",
    "price",
    "keep",
}
THROUGHPUTS = sorted({*VALUES} - {*DURATIONS} - OTHERS)


def test_the_document_shows_what_the_model_says() -> None:
    text = command.DOCUMENT.read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in text for name in tables.tables())
    assert command.filled(text) == text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "| 1,000,000,000 |" in capsys.readouterr().out
    assert command.main(["--wirte"]) == 2
    assert "expected --write or nothing, got --wirte" in capsys.readouterr().err


def test_the_picture(tmp_path: Any) -> None:
    picture.draw(tmp_path / "scale.png")
    assert 0 < (tmp_path / "scale.png").stat().st_size < 100_000


def test_rates_say_where_they_are_from() -> None:
    for name, rate in rates.rate_table().items():
        assert rate.low <= rate.value <= rate.high, name
        assert rate.unit, name
        places = ("`python -m bench`", "docs/notes.md", "` of revision ")
        assert (rate.kind == "measured") == any(place in rate.source for place in places), name


def test_what_is_counted() -> None:
    from fastcnn import SmallCNN

    assert sum(parameter.numel() for parameter in SmallCNN(10).parameters()) == NUM_PARAMETERS


def test_the_model_gives_what_was_measured() -> None:
    """Whole runs on two cores: start, scan, decoding, training, evaluation."""
    for row in read(rates.PUBLISHED).rows:
        info = row["extra_info"]
        if row["group"] == "train" or info.get("grows") == "photos":
            found = run(info["num_photos"], 0, VALUES, epochs=info.get("epochs", 1), batch=32)
            took = info["stages"].get("cold", info["stages"])
            assert found.seconds == pytest.approx(took["start"] + took["total"], rel=0.15)


@pytest.mark.parametrize("gpus", [1, 8, 64, 1000])
@pytest.mark.parametrize("photos", tables.PHOTOS)
def test_a_worse_rate_makes_no_run_faster(photos: int, gpus: int) -> None:
    found = run(photos, gpus, VALUES)
    for names, factor in ((THROUGHPUTS, 0.5), (DURATIONS, 2.0)):
        for name in names:
            worse = run(photos, gpus, {**VALUES, name: VALUES[name] * factor})
            assert worse.seconds >= found.seconds * (1 - 1e-9), name


@pytest.mark.parametrize("gpus", [1, 8, 64, 1000])
def test_more_photos_take_longer(gpus: int) -> None:
    runs = [run(photos, gpus, VALUES) for photos in tables.PHOTOS]
    assert all(few.seconds < many.seconds for few, many in itertools.pairwise(runs))


def test_no_rank_is_faster_than_its_parts_allow() -> None:
    """Images a second of all GPUs: never above the floor's, or what the loader reads for them."""
    for photos in tables.PHOTOS:
        for gpus in tables.GPUS:
            found = run(photos, gpus, VALUES)
            alone = step(found.batch / gpus, 1, VALUES)
            assert found.images_per_second <= found.batch / alone.seconds * (1 + 1e-9)
            if found.memory == "mapped":
                assert found.images_per_second <= gpus * VALUES["row_read"] / rates.PHOTO_BYTES * (1 + 1e-9)
            if found.memory == "stream":
                assert found.images_per_second <= gpus * VALUES["gpu_decode"] * (1 + 1e-9)


def test_where_the_pixels_are() -> None:
    places = {(p, g): run(p, g, VALUES).memory for p in tables.PHOTOS for g in tables.GPUS}
    assert places[10**6, 1] == "resident"
    assert places[10**7, 1] == "mapped"
    assert places[10**7, 8] == "sharded"
    assert places[10**9, 8] == "stream"
    assert places[10**9, 64] == "mapped"
    again = run(10**7, 8, VALUES, Plan(dealt_once=True))
    assert again.stage("load") == pytest.approx(run(10**7, 8, VALUES).stage("load") / 10, rel=1e-6)


def test_a_collective_takes_the_faster_of_ring_and_tree() -> None:
    one = {"collective": 0.0, "hop_node": 1.0, "hop_net": 10.0, "link_node": 1.0, "link_net": 1.0}
    assert collective(8, 1, one) == 0
    assert collective(0, 8, one) == 2 * 3  # a tree of three levels, up and down
    assert collective(0, 8, one, ways=1) == 3
    assert collective(8e6, 8, one) == 2 * 7 * (1 + 1e6)  # a ring: each link carries an eighth
    assert collective(0, 64, one) == 2 * 3 + 2 * 3 * 10
    sizes = [collective(size, 64, VALUES) for size in (0, 1e3, 1e6, 1e9)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64, 1000])
def test_the_slowest_of_many(ranks: int) -> None:
    """Blom's approximation against the integral of x over the maximum's density, by the trapezoidal rule."""
    step, expected = 1e-3, 0.0
    for i in range(-8000, 8000):
        x = i * step
        below, density = 0.5 * (1 + math.erf(x / math.sqrt(2))), math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        expected += x * ranks * below ** (ranks - 1) * density * step
    assert slowest(ranks) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("stages", [[3.0], [1.0, 3.0], [3.0, 1.0], [2.0, 5.0, 1.0]])
@pytest.mark.parametrize("exchange", [None, 0.5])
def test_simulated_without_jitter_is_the_closed_form(stages: list[float], exchange: float | None) -> None:
    """Once through all stages, and from then on one batch each time the slowest is done."""
    rests = [*stages[:-1], stages[-1] + (exchange or 0)]
    took = simulate(stages, 50, ranks=4, exchange=exchange)
    assert took == pytest.approx(sum(rests) + 49 * max(rests))


def test_without_a_second_buffer_nothing_overlaps() -> None:
    assert simulate([2.0, 3.0], 10, exchange=1.0, depth=1) == pytest.approx(10 * 6.0)


@pytest.mark.parametrize("gpus", [1, 8, 64, 1000])
def test_simulated_stragglers_are_the_expected_ones(gpus: int) -> None:
    one = step(256, gpus, VALUES)
    took = simulate([one.compute], 400, ranks=gpus, exchange=one.exchange, jitter=[VALUES["jitter"]])
    assert took / 400 == pytest.approx(one.seconds, rel=0.01)


def test_jitter_ranks_and_short_buffers_cost_time() -> None:
    def took(ranks: int = 16, jitter: float = 0.3, depth: int = 2) -> float:
        return simulate([0.9, 1.0], 300, ranks=ranks, exchange=0.0, jitter=[jitter, 0.0], depth=depth)

    assert 300 < took(jitter=0.0) < took(jitter=0.1) < took() < took(jitter=0.6)
    assert took(ranks=1) < took() < took(ranks=256)
    assert took(depth=8) < took() < took(depth=1)
    assert took() == took()  # the seed's


def test_the_step_says_what_bounds_it() -> None:
    assert step(8, 1, VALUES).bottleneck == "launches"
    assert step(2048, 1, VALUES).bottleneck == "compute"
    assert step(32, 64, VALUES).bottleneck == "exchange"
    assert step(32, 64, VALUES, feed=1.0).bottleneck == "feed"
    apart = step(32, 64, VALUES, sync_batch_norm=False)
    assert dataclasses.replace(step(32, 64, VALUES), exchange=0) == dataclasses.replace(apart, exchange=0)
    assert apart.exchange == collective(GRADIENT_BYTES, 64, VALUES)
