"""Cost of a process group to a step: a group of one rank, which exchanges nothing, over a process alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from bench.harness.race import Race
from bench.harness.step_setup import default_engine, make_step, random_feed, run_steps, steps_a_slice, timed_steps
from fastcnn.network.small_cnn import BatchNorm, Block
from fastcnn.network.sync_layers import SyncBatchNorm, operators
from fastcnn.system import ranks
from fastcnn.system.device import pick_precision
from fastcnn.training.engines import Engine
from fastcnn.training.step import TrainingStep


@pytest.fixture(scope="module")
def group(device: object) -> Iterator[ranks.Ranks]:
    """A group of this process alone, by NCCL on a GPU and gloo elsewhere."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
        free.close()
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            patch.setenv(name, value)
        with ranks.joined("cuda" if str(device).startswith("cuda") else "cpu") as joined:
            yield joined


@pytest.mark.parametrize("norm", ["its own batch norm", "batch norm of all ranks"])
def bench_group_of_one(race: Race, group: ranks.Ranks, norm: str) -> None:
    """The reference step with the gradient's all-reduce in it, and with batch norms that exchange statistics."""
    device, size, batch = race.device, race.scale["image_size"], race.scale["batches"][0]
    precision = pick_precision("auto", device, deterministic=False, strict=False)
    feed = random_feed(device, max(512, 2 * batch), size)

    def prepared(joined: ranks.Ranks) -> tuple[TrainingStep, Engine]:
        step = make_step(feed, race.scale["networks"][0], batch, precision, ranks=joined)
        if joined.joined and norm != "its own batch norm":
            operators()
            for block in step.network.blocks:
                assert isinstance(block, Block)
                assert isinstance(block.norm, BatchNorm)
                block.norm = SyncBatchNorm(block.norm, joined)
        return step, default_engine(step)

    alone, grouped = prepared(ranks.ALONE), prepared(group)
    count = steps_a_slice(*alone, race.scale["slice_seconds"])
    run_steps(*grouped, 3)
    baselines = {"alone": timed_steps(*alone, count)}
    race(f"group of one, {norm}", timed_steps(*grouped, count), baselines, images=batch * count, batch=batch)
