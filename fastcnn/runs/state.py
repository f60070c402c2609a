"""One run: its fixed context, and the state that training changes and checkpoints keep."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcnn.config import Config
from fastcnn.data.feeds import SamplingWeights
from fastcnn.errors import FastCNNError, first_line
from fastcnn.network.small_cnn import SmallCNN, all_finite
from fastcnn.storage import checkpoint
from fastcnn.system.console import Console
from fastcnn.system.device import pick_device
from fastcnn.system.generators import Generators
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.system.stopwatch import Stopwatch
from fastcnn.training.step import TrainingStep


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Configuration, folder, processes, console and stopwatch of one run."""

    config: Config
    """Resolved for this machine; "auto" is left only for the decoder, the loader and the engine."""
    run_dir: Path
    resuming: bool
    """Whether the folder holds an earlier part of this run."""
    has_checkpoint: bool
    """Whether that part has saved a step in `last.pt`."""
    ranks: Ranks
    console: Console
    stopwatch: Stopwatch

    @property
    def device(self) -> torch.device:
        """Device that this process trains on."""
        return pick_device(self.config.device, self.ranks.local_rank)


@dataclass
class RunState:
    """Network, training step and figures of one run."""

    config: Config
    run_dir: Path
    classes: tuple[str, ...]
    model: SmallCNN
    step: TrainingStep
    generators: Generators
    ranks: Ranks = ALONE
    sampling_weights: SamplingWeights = None
    """Probability of drawing each training image. None: every image once per epoch."""
    engine_reason: str = ""
    """Why `--engine auto` chose its engine."""
    epoch: int = 0
    """Number of finished epochs."""
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Figures of the finished epochs, as in metrics.csv."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Figures of the best epoch so far."""

    @property
    def steps_done(self) -> int:
        """Steps already taken in an interrupted epoch; 0 at the beginning of an epoch."""
        step = self.step
        return int(step.feed.cursor) // step.batch_size % step.num_steps

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Let the model hold the weights to evaluate and export: their moving average, if the run keeps one."""
        average = self.step.average
        return contextlib.nullcontext() if average is None else self.step.parameters.holding(average)

    def average_batch_norms(self) -> None:
        """Set the statistics of batch norms that each rank keeps for itself to their mean over the ranks."""
        if self.ranks.count > 1 and not self.config.sync_batch_norm:
            for buffer in self.model.buffers():
                self.ranks.sum_(buffer).div_(self.ranks.count)

    def save(self, name: str) -> None:
        """Write a checkpoint into the run folder. All ranks call this; the first one writes."""
        step, own = self.step, self.generators
        sums = self.ranks.sum_(step.sums.values.clone())
        self.average_batch_norms()
        if not self.ranks.first:
            return
        fields = {
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "network": self.model.options,
            "model": self.model.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "average": step.average,
            "loss_scale": step.loss_scale.state_dict() if step.loss_scale else {},
            "epoch": self.epoch,
            "cursor": int(step.feed.cursor),
            "step": int(step.step_count),
            "skipped": int(step.skipped),
            "sums": sums,
            "best": self.best,
            "rows": self.rows,
            "rng": own.cpu.get_state(),
            "device_rng": own.device.get_state() if own.device is not own.cpu else None,
        }
        checkpoint.save(self.run_dir / name, fields)

    def save_best(self) -> None:
        """Write `best.pt`: like `last.pt`, but with the weights that are evaluated and exported."""
        with self.averaged():
            self.save("best.pt")

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises FastCNNError if it does not belong to this run."""
        try:
            self._restore(saved)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FastCNNError(
                f"{self.run_dir / 'last.pt'} does not belong to this run ({first_line(error)}): begin a new one"
            ) from None

    def _restore(self, saved: dict[str, Any]) -> None:
        step, rows = self.step, list(saved["rows"])
        epoch, steps_done = divmod(saved["step"], step.num_steps)
        position = saved["cursor"] % (step.num_steps * step.batch_size)
        if not epoch == saved["epoch"] == len(rows) or position != steps_done * step.batch_size:
            raise ValueError(f"{saved['step']} steps, {saved['epoch']} epochs and {len(rows)} rows of figures")
        if saved["step"] > len(step.lr_schedule):
            raise ValueError(f"{saved['step']} steps of {len(step.lr_schedule)}")
        if not all_finite(saved["model"].values()):
            raise ValueError("its weights are not finite numbers")
        self.model.load_state_dict(saved["model"])
        step.parameters.refresh()
        values = {**saved["optimizer"], **saved["loss_scale"], "average": saved["average"]}
        tensors = {**step.optimizer.state_dict(), "average": step.average}
        tensors |= step.loss_scale.state_dict() if step.loss_scale else {}
        with torch.no_grad():
            for key, tensor in tensors.items():
                if tensor is not None and values.get(key) is not None:
                    _copy(key, tensor, values[key])
            _copy("sums", step.sums.values, saved["sums"] if self.ranks.first else torch.zeros_like(saved["sums"]))
        step.step_count.fill_(saved["step"])
        step.skipped.fill_(saved["skipped"])
        step.feed.cursor.fill_(saved["cursor"])
        self.epoch, self.rows, self.best = saved["epoch"], rows, dict(saved["best"])
        self.generators.restore(saved["rng"], saved["device_rng"])


def _copy(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape:
        raise ValueError(f"{name} is {tuple(value.shape)} there and {tuple(tensor.shape)} here")
    tensor.copy_(value)
