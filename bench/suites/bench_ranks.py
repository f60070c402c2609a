"""Cost of a process group to a step: a group of one rank, which exchanges nothing, over a process alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from bench.harness.race import Race
from bench.harness.step_setup import race_steps, reference_step
from fastcnn.network.small_cnn import BatchNorm, Block
from fastcnn.network.sync_layers import SyncBatchNorm, operators
from fastcnn.system import ranks


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
    grouped = reference_step(race, ranks=group)
    if norm != "its own batch norm":
        operators()
        for block in grouped.network.blocks:
            assert isinstance(block, Block)
            assert isinstance(block.norm, BatchNorm)
            block.norm = SyncBatchNorm(block.norm, group)
    race_steps(race, f"group of one, {norm}", grouped, "alone", reference_step(race))
