"""What to do where a run does not fit into memory: which loader and batch size would."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from pathlib import Path

import torch

from fastcnn.config.fields import Config
from fastcnn.data.feeds import Feed
from fastcnn.runs import state as sessions
from fastcnn.system.device import is_out_of_memory, synchronize

NUM_CLASSES = 100  # of the network that is tried: the output layer is the least of it


def release() -> None:
    """Give back what an error's traceback held, once it is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def advice(config: Config, why: str, last: Path) -> str:
    """Return what to say of a run that ran out of memory: the loader and batch size that would fit.

    why: the error's first line.
    last: the run's last checkpoint, which need not be there.
    """
    release()
    fits = largest_batch_size(config)
    what = f"out of memory on {config.device} ({why})"
    if fits is None:
        other = "use fewer --filters, a smaller --image-size or another --device"
        return f"{what}: not even one batch of {2 * config.devices} fits; {other}"
    if config.loader in ("auto", "resident") and fits == config.batch_size:
        resumed = f"fastcnn train --resume {last.parent} --loader mapped goes on" if last.is_file() else ""
        return f"{what}: --loader mapped fits with --batch-size {fits}" + (f"; {resumed}" if resumed else "")
    if fits == config.batch_size:
        return f"{what}: --batch-size {fits} fits by itself, so something else takes the memory; or try {fits // 2}"
    return f"{what}: --loader mapped --batch-size {fits} would fit"


def largest_batch_size(config: Config) -> int | None:
    """Return the largest of a run's batch size and its halves of which one step fits beside a loader's two batches.

    None where not even 2 a device do. Found by trying, one device's share here.
    """
    share = config.batch_size // config.devices
    alone = dataclasses.replace(config, devices=1, init_from=None, limit_train_batches=1, epochs=1)
    while share >= 2:
        if _fits(dataclasses.replace(alone, batch_size=share)):
            return share * config.devices
        share //= 2
        release()
    return None


def _fits(config: Config) -> bool:
    device, rows = torch.device(config.device), 2 * config.batch_size
    with contextlib.suppress(Exception):  # whatever else fails here is not what is asked
        try:
            feed = Feed(
                images=torch.zeros((rows, *[config.decoded_size] * 2, 3), dtype=torch.uint8, device=device),
                labels=torch.arange(rows, device=device) % NUM_CLASSES,
                permutation=torch.arange(rows, device=device),
                cursor=torch.zeros(1, dtype=torch.int64, device=device),
            )
            sessions.start(config, Path(), tuple(map(str, range(NUM_CLASSES))), feed).step()
            synchronize(device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
    return True
