"""Launching the ranks of a run on this machine, as `fastcnn train --devices` does through torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Sequence

from fastcnn.errors import FastCNNError
from fastcnn.system import own_module

VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # that torchrun sets


def num_ranks() -> int | None:
    """Return the number of ranks that torchrun has started, this process among them; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if set(os.environ) >= VARIABLES else None


def is_first_on_machine() -> bool:
    """Return whether this is the one process of its machine that reports what all of them find."""
    return num_ranks() is None or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"


def train(devices: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run `fastcnn train` in one process per device; return 0 or the exit code of the first that failed.

    Args:
        devices: number of processes.
        arguments: of `fastcnn train`.
        max_restarts: how often all are restarted, from the last checkpoint, after one has failed.
    """
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks report their errors themselves
    os.environ.update(own_module.environment())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each rank sets its own number; this avoids torchrun's warning
    options = ["--standalone", "--nproc-per-node", str(devices), "--max-restarts", str(max_restarts)]
    try:
        torchrun.run(torchrun.parse_args([*options, "--module", "fastcnn.cli", "train", *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        with contextlib.suppress(ValueError):
            name = signal.Signals(-failure.exitcode).name
            raise FastCNNError(
                f"rank {rank} was ended by {name}, and the others were stopped; to continue, run: "
                "fastcnn train --resume RUN, with its run folder"
            ) from None
        return FastCNNError.exit_code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
