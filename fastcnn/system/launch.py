"""Starting the ranks of a run on this machine: torchrun, from within `fastcnn train --devices`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from fastcnn.errors import FastCNNError

VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # a launcher sets them


def num_ranks() -> int | None:
    """Return how many ranks a launcher has started, of which this process is one; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if set(os.environ) >= VARIABLES else None


def speaks() -> bool:
    """Return whether this process tells the user of what is the same on all ranks of its machine."""
    return num_ranks() is None or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"


def train(devices: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run `fastcnn train` with these arguments in so many processes; return the exit code of the first that failed.

    max_restarts: how often all are started again after one has failed; they go on from the last checkpoint.
    """
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # ranks say themselves what went wrong
    package = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each rank sets its own; unset, torchrun says that it sets it
    options = ["--standalone", "--nproc-per-node", str(devices), "--max-restarts", str(max_restarts)]
    try:
        torchrun.run(torchrun.parse_args([*options, "--module", "fastcnn.cli", "train", *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        with contextlib.suppress(ValueError):
            name = signal.Signals(-failure.exitcode).name
            raise FastCNNError(f"rank {rank} was ended by {name}, and the others were stopped") from None
        return FastCNNError.exit_code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
