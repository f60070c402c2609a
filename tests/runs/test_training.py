"""What a run does beyond plain epochs: resuming, starting from weights, ending early, making up for rare classes."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcnn import Config, fit
from fastcnn.data.feeds import shuffled
from fastcnn.errors import FastCNNError, FastCNNWarning, UsageError
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.runs import loop
from fastcnn.runs.build import class_weights, load_initial_weights
from fastcnn.runs.failures import RunInterrupted
from fastcnn.runs.resume import resumed_config
from fastcnn.storage import checkpoint

SMALL: dict[str, Any] = {"image_size": 32, "filters": (8,), "batch_size": 16, "deterministic": True, "report": False}


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """An uninterrupted run, and its configuration."""
    config = Config(
        data=str(photos), epochs=3, schedule="onecycle", augment=("flip", "mixup"), ema=0.9, dropout=0.2, **SMALL
    )  # fmt: skip
    return config, fit(config, run_dir=tmp_path_factory.mktemp("whole") / "run").run_dir


# An epoch has 6 steps, as a rule in portions of 1, 2 and 3: within it, at its end, in the second, at the very end.
@pytest.mark.parametrize("stop_at", [1, 3, 5, 9])
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    whole: tuple[Config, Path], stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, uninterrupted = whole
    plain, calls = loop.run_steps, 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        for state in plain(*args):
            calls += 1
            if calls == stop_at:
                signal.raise_signal(signal.SIGTERM)
            yield state

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_steps", stopping)
        with pytest.raises(RunInterrupted):
            fit(config, run_dir="cut")
    resumed = fit(resumed_config("cut", {}), resume="cut")
    assert resumed.run_dir == Path("cut")
    for name in ("last.pt", "best.pt"):
        one, other = (checkpoint.load(folder / name) for folder in (uninterrupted, resumed.run_dir))
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
        assert torch.equal(one["average"], other["average"])
        assert one["best"]["epoch"] == other["best"]["epoch"]
    assert rows(uninterrupted) == rows(resumed.run_dir)
    assert json.loads((resumed.run_dir / "result.json").read_text())["epochs"] == 3


def test_a_finished_run_goes_on_with_more_epochs(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    with pytest.raises(UsageError, match="has its 2 epochs: give more with --epochs"):
        resumed_config("run", {})
    fit(resumed_config("run", {"epochs": 3}), resume="run")
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1", "2", "3"]
    assert rows(tmp_path / "run")[:2] == rows(run_dir)
    assert (tmp_path / "run" / "batch.png").read_bytes() == (run_dir / "batch.png").read_bytes()


def test_a_resumed_run_changes_nothing_else(run_dir: Path) -> None:
    with pytest.raises(UsageError, match="--lr cannot change"):
        resumed_config(run_dir, {"lr": 1})
    with pytest.raises(FastCNNError, match="no run nothing"):
        resumed_config("nothing", {})


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_an_edited_configuration_is_heeded_or_refused(run_dir: Path, has_checkpoint: bool, tmp_path: Path) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    if not has_checkpoint:
        (run / "last.pt").unlink()
    (run / "config.yaml").write_text(text.replace("epochs: 2\n", "epochs: 3\n").replace("lr: 0.001\n", "lr: 1.0e-3\n"))
    assert resumed_config("run", {}).epochs == 3
    assert resumed_config("run", {"epochs": 4}).epochs == 4
    (run / "config.yaml").write_text(text.replace("lr: 0.001\n", "lr: 0.5\n"))
    if has_checkpoint:
        with pytest.raises(UsageError, match="has been edited, and --lr cannot change: put back lr: "):
            resumed_config("run", {"epochs": 3})
    else:  # it begins again
        assert resumed_config("run", {}).lr == 0.5


def test_patience_ends_a_run_early(photos: Path) -> None:
    run = fit(Config(data=str(photos), epochs=50, patience=1, lr=0.3, optimizer="sgd", limit_train_batches=1, **SMALL))
    best = run.summary["best_epoch"]
    assert run.summary["epochs"] == best + 1 < 50
    assert len(run.metrics) == best + 1


def test_a_dry_run_takes_as_many_steps_as_asked(photos: Path) -> None:
    run = fit(Config(data=str(photos), epochs=2, limit_train_batches=2, **SMALL))
    assert checkpoint.load(run.run_dir / "last.pt")["step"] == 4


def test_init_from_finds_a_run_beside_a_folder_of_its_name(photos: Path, run_dir: Path) -> None:
    shutil.copytree(run_dir, "runs/first")
    Path("first").mkdir()  # no run
    config = Config(data=str(photos), init_from="first", epochs=1, limit_train_batches=1, **SMALL)
    assert fit(config, run_dir="second").summary["epochs"] == 1
    assert "init_from: first\n" in Path("second/config.yaml").read_text()


def test_init_from_takes_the_weights_and_another_output_layer(photos: Path, run_dir: Path, tmp_path: Path) -> None:
    plain = {**SMALL, "epochs": 1, "limit_train_batches": 1, "lr": 1e-9}
    same = fit(Config(data=str(photos), init_from=str(run_dir), **plain))
    first, second = (checkpoint.load(folder / "best.pt")["model"] for folder in (run_dir, same.run_dir))
    weights = [name for name in first if "running" not in name]
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in weights)

    fewer = tmp_path / "three"
    shutil.copytree(photos, fewer)
    shutil.rmtree(sorted(path for path in fewer.iterdir() if path.is_dir())[0])
    with pytest.warns(FastCNNWarning, match="the output layer starts from random weights"):
        other = fit(Config(data=str(fewer), init_from=str(run_dir / "best.pt"), **plain))
    found = checkpoint.load(other.run_dir / "best.pt")["model"]
    assert found["output.weight"].shape[0] == 3
    assert torch.allclose(found["dense.weight"], first["dense.weight"], atol=1e-6)

    with pytest.raises(FastCNNError, match=r"blocks\.0\.conv\.weight is \(8, 3, 3, 3\) there and \(4, 3, 3, 3\) here"):
        fit(Config(data=str(photos), init_from=str(run_dir), **{**plain, "filters": (4,)}))


def test_the_output_layer_of_init_from_goes_by_the_names_of_the_classes(run_dir: Path) -> None:
    saved = checkpoint.load(run_dir / "best.pt")
    model, classes = SmallCNN(**saved["network"]), saved["classes"]
    load_initial_weights(model, classes[::-1], str(run_dir))
    assert torch.equal(model.output.weight, saved["model"]["output.weight"].flip(0))
    assert torch.equal(model.output.bias, saved["model"]["output.bias"].flip(0))
    own = torch.randn_like(model.output.weight)
    model.output.weight.data = own.clone()
    with pytest.warns(FastCNNWarning, match="has other classes: the output layer starts from random weights"):
        load_initial_weights(model, [*classes[:-1], "another"], str(run_dir))
    assert torch.equal(model.output.weight, own)
    assert torch.equal(model.state_dict()["blocks.0.conv.weight"], saved["model"]["blocks.0.conv.weight"])


def test_balanced_sampling_draws_classes_alike() -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    weights = class_weights(labels, 3).numpy()[labels]
    assert weights.mean() == pytest.approx(1)
    sampling_weights = weights.astype(np.float64) / weights.astype(np.float64).sum()
    drawn = shuffled(1000, (0, 1), sampling_weights)
    counts = np.bincount(labels[drawn])
    assert counts.sum() == 1000
    assert counts.min() > 270
    assert np.array_equal(drawn, shuffled(1000, (0, 1), sampling_weights))
    assert sorted(shuffled(1000, (0, 1))) == list(range(1000))


@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_balance_helps_the_rare_class(photos: Path, tmp_path: Path, balance: str) -> None:
    folder = tmp_path / "rare"
    shutil.copytree(photos, folder)
    rare = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    for photo in sorted(rare.iterdir())[8:]:
        photo.unlink()
    common = {**SMALL, "data": str(folder), "epochs": 2}
    plain, balanced = (checkpoint.load(fit(Config(**common, **extra)).run_dir / "last.pt")["model"]
                       for extra in ({}, {"balance": balance}))  # fmt: skip
    difference = balanced["output.bias"] - plain["output.bias"]
    assert difference[0] > difference[1:].max()


def test_label_smoothing_and_mixes_leave_the_validation_loss_alone(photos: Path) -> None:
    """Of untrained weights that loss is near log(4), whatever the training's targets are."""
    run = fit(Config(data=str(photos), epochs=1, lr=1e-9, label_smoothing=0.5, augment=("cutmix",), **SMALL))
    assert run.metrics[0]["val/loss"] == pytest.approx(np.log(4), rel=0.2)


@pytest.mark.long
def test_a_larger_cache_is_evaluated_and_exported_alike(photos: Path) -> None:
    from fastcnn import export_run

    run = fit(Config(data=str(photos), epochs=1, cache_size=48, augment=("flip", "crop"), **SMALL))
    assert export_run(run.run_dir).is_file()
