"""What belonging to a group costs a step: a group of one rank, which exchanges nothing, over a process alone."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator

import pytest

from bench.harness.race import Race
from bench.harness.step_setup import make_step, random_feed, run_steps
from bench.harness.timing import Clocked, clocked
from fastcnn.network.small_cnn import BatchNorm, Block
from fastcnn.network.sync_layers import SyncBatchNorm, operators
from fastcnn.system import ranks
from fastcnn.system.device import pick_precision
from fastcnn.training import engines


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

    def runner(joined: ranks.Ranks) -> tuple[Clocked, int]:
        step = make_step(feed, race.scale["networks"][0], batch, precision, ranks=joined)
        if joined.joined and norm != "its own batch norm":
            operators()
            for block in step.network.blocks:
                assert isinstance(block, Block)
                assert isinstance(block.norm, BatchNorm)
                block.norm = SyncBatchNorm(block.norm, joined)
        engine, _ = engines.build("graphed" if device.type == "cuda" else "eager", step)
        run_steps(step, engine, 3)
        seconds = clocked(lambda: run_steps(step, engine, 3), device)() / 3
        num_steps = max(3, math.ceil(0.5 / seconds)) if not joined.joined else count

        def run() -> None:
            run_steps(step, engine, num_steps)
            assert math.isfinite(step.sums.read().loss)

        return clocked(run, device), num_steps

    alone, count = runner(ranks.ALONE)
    grouped, _ = runner(group)
    race(f"group of one, {norm}", grouped, {"alone": alone}, images=batch * count, batch=batch)
