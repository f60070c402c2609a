from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SMALL = ["--epochs", "1", "--image-size", "32", "--batch-size", "16"]


def run(name: str, photos: Path, *arguments: object) -> list[dict[str, object]]:
    """Run a baseline as a command and return its JSON lines."""
    command = [sys.executable, "-m", f"bench.baselines.{name}", photos, *SMALL, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_tuned_baseline_trains_with_the_settings_given(photos: Path, run_dir: Path) -> None:
    given = ["--workers", 0, "--amp", "off", "--channels-last", "on", "--compile", "off"]
    row, last = run("tuned", photos, "--split", run_dir / "split.csv", *given)
    assert last["settings"] == {"workers": 0, "amp": False, "channels_last": True, "compile": False}
    assert last["epochs"] == [row]
    assert row["images_per_second"] > 0  # type: ignore[operator]
    assert 0 <= row["val_accuracy"] <= 1  # type: ignore[operator]


def test_the_tuned_baseline_probes_only_what_is_left_open(photos: Path) -> None:
    (found,) = run("tuned", photos, "--probe", "--workers", 0, "--amp", "off", "--compile", "off")
    assert {**found, "channels_last": None} == {"workers": 0, "amp": False, "channels_last": None, "compile": False}
    assert found["channels_last"] in (True, False)


def test_the_tuned_baseline_starts_from_the_seeds_network_and_computes_its_loss(photos: Path) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from bench.baselines import seed, tuned

    args = seed.arguments("").parse_args([str(photos), *SMALL])
    trainer = tuned.Trainer(args, {"workers": 0, "amp": False, "channels_last": True, "compile": False})
    torch.manual_seed(args.seed)
    classes, _, val = seed.photos_of(args)
    plain = seed.small_cnn(len(classes), args.image_size)
    for ours, theirs in zip(trainer.model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    images, labels = next(iter(trainer.batches(trainer.val_loader)))
    expected = torch.stack([seed.Photos(val, args.image_size)[number][0] for number in range(len(labels))])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    loss, _ = trainer.loss(images, labels)
    torch.testing.assert_close(loss, cross_entropy(plain(expected), labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "package"), [("timm_loader", "timm"), ("ultralytics_classify", "ultralytics")])
def test_the_peers_train_on_the_split_and_probe(name: str, package: str, photos: Path, run_dir: Path) -> None:
    pytest.importorskip(package)
    row, last = run(name, photos, "--split", run_dir / "split.csv", "--workers", 0)
    assert last["epochs"] == [{key: value for key, value in row.items() if key != "workers"}]
    assert row["images_per_second"] > 0  # type: ignore[operator]
    assert 0 <= row["val_accuracy"] <= 1  # type: ignore[operator]
    (found,) = run(name, photos, "--probe", "--workers", 0)
    assert found == {"workers": 0}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_sees_the_photos_that_the_seed_does(photos: Path) -> None:
    pytest.importorskip("timm")  # it leaves the files that it opens to the garbage collector
    import torch

    from bench.baselines import seed, timm_loader

    args = seed.arguments("").parse_args([str(photos), *SMALL])
    _, train, val = seed.photos_of(args)
    device = torch.device("cpu")
    images, labels = next(iter(timm_loader.make_loader(val, args, 0, device, training=False)))
    expected = torch.stack([seed.Photos(val, 32)[number][0] for number in range(len(labels))])
    upright = (images - expected).abs().mean((1, 2, 3)) < 0.05  # but for those that EXIF turns
    assert upright.float().mean() > 0.8
    assert labels.tolist() == [label for _, label in val[: len(labels)]]
    assert len(list(timm_loader.make_loader(train, args, 0, device, training=True))) == len(train) // 16
