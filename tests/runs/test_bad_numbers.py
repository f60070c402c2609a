"""Runs whose losses, weights or figures are no finite numbers."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcnn import Config, export_run, fit
from fastcnn.cli.app import main
from fastcnn.errors import FastCNNError, FastCNNWarning
from fastcnn.inference import artefact
from fastcnn.runs.evaluate_run import evaluate_run
from fastcnn.runs.loop import merit
from fastcnn.storage import checkpoint
from fastcnn.training import optimizers
from fastcnn.training import step as training_step
from tests.runs.small_runs import SMALL, STEPS, figures, go_on


def planted(monkeypatch: pytest.MonkeyPatch, steps: Callable[[int], bool]) -> list[Tensor]:
    """Let the loss of the steps that `steps` names (from 0) be NaN; return those batches' labels."""
    plain, batches, number = training_step.forward, list[Tensor](), -1

    def forward(model: Any, normalise: Any, images: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        nonlocal number
        number += 1
        if not steps(number):
            return plain(model, normalise, images, targets, *rest)
        batches.append(targets)
        for buffer in model.buffers():
            buffer.fill_(float("nan"))  # as batch norms' own statistics become
        losses, predictions = plain(model, normalise, images, targets, *rest)
        return losses * float("nan"), predictions

    monkeypatch.setattr(training_step, "forward", forward)
    return batches


def test_a_loss_that_is_no_number_stops_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(data=str(photos), lr=0.002, **SMALL)
    with monkeypatch.context() as patch:
        batches = planted(patch, lambda number: number >= STEPS + 2)
        with pytest.raises(FastCNNError) as caught:
            fit(config, run_dir="run")
    with Path("run/not_finite.csv").open(newline="") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    state = checkpoint.load(Path("run/last.pt"))
    assert [state["classes"].index(name.partition("/")[0]) for name in names] == batches[0].tolist()
    said = str(caught.value)
    assert said.startswith(
        f"the loss of step {STEPS + 3} (epoch 2) is not a finite number, at learning rate 0.002 "
        f"and with {names[0]}, {names[1]}, {names[2]} and 13 more (run/not_finite.csv)"
    )
    assert "try a lower --lr, --clip-norm 1 or --precision fp32, or --on-nan skip" in said
    assert said.endswith(
        "; run/last.pt was saved before it: --init-from run begins a new run with it; "
        "to continue, run: fastcnn train --resume run"
    )
    assert "\n" not in said
    assert state["step"] == STEPS
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(figures(go_on("run"))) == 2


def test_a_stop_by_a_signal_saves_no_bad_state(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(data=str(photos), checkpoint_every="1", **SMALL)
    planted(monkeypatch, lambda number: number >= 2)
    with pytest.raises(FastCNNError, match=r"the loss of step 3 \(epoch 1\)"):
        fit(config, run_dir="run")
    state = checkpoint.load(Path("run/last.pt"))
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_on_nan_skip_leaves_the_step_out_and_counts_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda number: number in (2, STEPS + 1))
    with pytest.warns(FastCNNWarning, match="skipped 1 of 6 steps of epoch .: ") as caught:
        run = fit(Config(data=str(photos), on_nan="skip", **SMALL))
    assert len(caught) == 2
    assert run.summary["skipped_steps"] == 2
    assert all(np.isfinite(list(row.values())).all() for row in run.metrics)
    state = checkpoint.load(run.run_dir / "last.pt")
    assert state["skipped"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_skipped_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training.test_step import make_feed, make_model, make_step

    planted(monkeypatch, lambda number: number == 1)
    step = make_step(make_model(), make_feed(16), 4)
    step.skip_nan = True
    step()
    before = [tensor.clone() for tensor in (step.parameters.values, *step.parameters.model.buffers(), step.sums.values)]
    step()
    after = [step.parameters.values, *step.parameters.model.buffers(), step.sums.values]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert (int(step.step_count), int(step.skipped), int(step.optimizer.num_updates)) == (2, 1, 1)
    step()
    assert not torch.equal(step.parameters.values, before[0])


def test_a_run_without_one_good_step_ends(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda number: True)
    with pytest.raises(FastCNNError, match="no step of epoch 1 had a finite loss: try a lower --lr"):
        fit(Config(data=str(photos), on_nan="skip", **SMALL))


@pytest.mark.filterwarnings("default::fastcnn.errors.FastCNNWarning")
@pytest.mark.parametrize(("on_nan", "limit"), [("skip", None), ("stop", 1)])
def test_an_epoch_without_a_validation_figure_is_no_result(
    on_nan: str, limit: int | None, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if limit is None else [f"--limit-train-batches={limit}"]
    options = ["--image-size=32", "--filters=8", "--batch-size=16", "--epochs=1", "--export=torchscript"]
    status = main(["train", str(photos), "--run-dir=run", "--lr=1e20", f"--on-nan={on_nan}", *options, *more])
    assert status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastcnn: error: the validation loss of epoch 1 is not a finite number")
    assert "try a lower --lr" in last
    assert not [name for name in ("best.pt", "last.pt", "result.json") if Path("run", name).exists()]


def test_weights_that_are_no_numbers_stop_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(Config(data=str(photos), **SMALL), run_dir="run")
    before = Path("run/best.pt").read_bytes()

    plain, calls = optimizers.Adam._update, itertools.count(1)

    def update(self: optimizers.Adam, skip: Tensor | None) -> None:
        plain(self, skip)
        if next(calls) == STEPS:  # the last of the epoch: no loss tells of it
            self.parameters.values[0] = math.inf

    monkeypatch.setattr(optimizers.Adam, "_update", update)
    with pytest.raises(FastCNNError, match=r"weights became NaN or infinite in epoch 3: .*fastcnn train --resume run$"):
        go_on("run", epochs=3)
    assert Path("run/best.pt").read_bytes() == before


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_that_would_break_the_weights_is_left_out(optimizer: str) -> None:
    from tests.training.test_step import make_feed, make_model, make_step

    step = make_step(make_model(), make_feed(16), 4)
    step.optimizer, step.skip_nan = optimizers.OPTIMIZERS[optimizer](step.parameters, 1e-2), True
    step.lr_schedule[0] = math.inf
    before = [tensor.clone() for tensor in (step.parameters.values, *step.optimizer.moments.values(), step.sums.values)]
    step()
    after = [step.parameters.values, *step.optimizer.moments.values(), step.sums.values]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert (int(step.step_count), int(step.skipped), int(step.optimizer.num_updates)) == (1, 1, 0)
    step()
    assert (int(step.skipped), int(step.optimizer.num_updates)) == (1, 1)


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_weights_without_finite_results_are_refused(value: float, run_dir: Path) -> None:
    shutil.copytree(run_dir, "bad")
    state = checkpoint.load(Path("bad/best.pt"))
    for name, tensor in state["model"].items():
        if name.endswith("weight"):
            tensor.mul_(value)
    checkpoint.save(Path("bad/best.pt"), state)
    with pytest.raises(FastCNNError, match=r"not (a )?finite number.*lower --lr"):
        evaluate_run("bad")
    with pytest.raises(FastCNNError, match=r"not finite numbers.*lower --lr"):
        export_run("bad")
    assert not Path("bad/model.torchscript").exists()
    if math.isnan(value):
        with pytest.raises(FastCNNError, match=r"--init-from .*not finite numbers"):
            fit(Config(data=state["config"]["data"], init_from="bad", **SMALL))


def test_a_file_that_gives_no_numbers_predicts_nothing() -> None:
    model = artefact.Artefact(Path("m.onnx"), "", {"classes": ["a"]}, lambda images: np.full((1, 1), np.nan, "f4"))
    with pytest.raises(FastCNNError, match=r"m.onnx gives probabilities that are not finite numbers"):
        model.probabilities(np.zeros((1, 4, 4, 3), np.uint8))


def test_no_epoch_without_figures_is_the_best() -> None:
    rows = [{"val/accuracy": accuracy, "val/loss": loss} for accuracy, loss in [(0.9, math.nan), (0.8, math.inf)]]
    good = {"val/accuracy": 0.1, "val/loss": 9.0}
    assert max([*rows, good], key=merit) is good
