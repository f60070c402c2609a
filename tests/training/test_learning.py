"""What training does over many steps: rates, losses that are no numbers, loss scale, averages, memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcnn import Config, fit
from fastcnn.errors import FastCNNError
from fastcnn.storage import checkpoint
from fastcnn.training.optimizers import LossScale
from fastcnn.training.schedules import schedule
from tests.training.steps import (
    CPU,
    LR,
    PHOTOS,
    make_augment,
    make_feed,
    make_step,
)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("name", ["constant", "cosine", "onecycle"])
def test_schedules_are_positive_rates(name: str, num_steps: int) -> None:
    rates = schedule(name, LR, num_steps)
    assert rates.shape == (num_steps,)
    assert rates.isfinite().all()
    assert (rates > 0).all()
    assert rates.max() <= LR * 1.0001


def test_the_first_bad_loss_freezes_the_weights() -> None:
    step = make_step()
    step()
    values = step.parameters.values.clone()
    step.parameters.model.output.bias.data[0] = float("nan")
    before = step.parameters.values.clone()
    for _ in range(3):
        step()
    assert float(step.skipped) == 3
    assert float(step.optimizer.num_updates) == 1
    assert torch.equal(step.parameters.values.nan_to_num(9), before.nan_to_num(9))
    assert not torch.equal(values, before)


def test_a_run_that_diverges_says_where(photos: Path) -> None:
    config = Config(data=str(photos), epochs=2, image_size=32, filters=(8,), batch_size=16, lr=1e30)
    with pytest.raises(
        FastCNNError, match=r"the loss of step \d+ \(epoch \d\) is not a finite number.* try a lower --lr"
    ):
        fit(config)


def test_loss_scale() -> None:
    scale = LossScale(CPU, interval=3)
    zero, one = torch.zeros(()), torch.ones(())
    scale.update(one)
    assert float(scale.scale) == 2.0**15
    for _ in range(3):
        scale.update(zero)
    assert float(scale.scale) == 2.0**16
    scale.update(zero)
    scale.update(one)
    for _ in range(2):
        scale.update(zero)
    assert float(scale.scale) == 2.0**15


def test_fp16_skips_an_overflow_and_learns_on() -> None:
    step = make_step(dtype=torch.float16, lr_schedule=torch.full((50,), LR))
    assert step.loss_scale is not None
    step.loss_scale.scale.fill_(2.0**40)
    values = step.parameters.values.clone()
    step()
    assert torch.equal(step.parameters.values, values)
    assert float(step.loss_scale.scale) == 2.0**39
    step.loss_scale.scale.fill_(2.0**8)
    step()
    assert not torch.equal(step.parameters.values, values)
    assert float(step.skipped) == 0
    assert float(step.optimizer.num_updates) == 1


def test_augmentations() -> None:
    images = make_feed().images
    photos, labels = torch.arange(PHOTOS), make_feed().labels
    flip, shift = make_augment(["flip"]), make_augment(["shift"])
    flipped = flip(images, photos, labels, flip.draw(PHOTOS, (0, 1))).images
    mirrored = (flipped == images.flip(2)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 10 < mirrored.sum() < 50
    shifted = shift(images, photos, labels, shift.draw(PHOTOS, (0, 1))).images
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.uint8
    inside = shifted[:, 8:24, 8:24]
    found = [
        any(
            torch.equal(inside[i], images[i, 8 + dy : 24 + dy, 8 + dx : 24 + dx])
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        )
        for i in range(len(images))
    ]
    assert all(found)


def test_the_average_is_what_is_evaluated_and_kept(photos: Path) -> None:
    config = Config(
        data=str(photos), epochs=2, image_size=32, filters=(8,), batch_size=16, ema=0.9, schedule="cosine",
        augment=("flip", "shift"), clip_norm=1.0, precision="fp32", report=False,
    )  # fmt: skip
    run = fit(config)
    last, best = (checkpoint.load(run.run_dir / name) for name in ("last.pt", "best.pt"))
    bias = last["model"]["blocks.4.norm.bias"]  # the buffer's end
    average = last["average"][-len(bias) :]
    assert not torch.equal(bias, average)
    if best["epoch"] == last["epoch"]:
        assert torch.equal(best["model"]["blocks.4.norm.bias"], average)


def test_runs_in_one_process_do_not_touch_each_other(photos: Path) -> None:
    config = Config(
        data=str(photos), epochs=2, image_size=32, filters=(8,), batch_size=16, deterministic=True, report=False
    )
    first = checkpoint.load(fit(config).run_dir / "last.pt")["model"]
    other = {"image_size": 48, "filters": (4,), "batch_size": 24, "activation": "gelu", "dropout": 0.2}
    fit(Config(data=str(photos), epochs=1, report=False, **other))  # type: ignore[arg-type]
    again = checkpoint.load(fit(config).run_dir / "last.pt")["model"]
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.long
def test_memory_over_runs_is_flat(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcnn.reporting.plots.png", lambda *_: b"")  # seconds a run, and no tensors
    config = Config(data=str(photos), epochs=1, image_size=32, filters=(8,), batch_size=16)

    def tensors() -> int:
        gc.collect()
        return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if issubclass(type(t), Tensor))

    fit(config)
    used = []
    for _ in range(3):
        fit(config)
        used.append(tensors())
    assert used[-1] <= used[0] + 100_000
