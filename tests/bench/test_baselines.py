from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.accuracy.contenders import PEERS, PEERS_PYTHON

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SMALL = ["--epochs", "1", "--image-size", "32", "--batch-size", "16"]


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a baseline's command on the photos and returns its JSON lines."""

    def command(name: str, *arguments: object) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, [photos, *SMALL, *arguments])])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # by another test
            runpy.run_module(f"bench.baselines.{name}", run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return command


def test_the_seed_baseline_trains(run: Run, run_dir: Path) -> None:
    row, last = run("seed", "--split", run_dir / "split.csv", "--workers", 0)
    assert last["epochs"] == [row]
    assert row["images_per_second"] > 0
    assert 0 <= row["val_accuracy"] <= 1


@pytest.mark.parametrize("on_gpu", [False, True])
def test_workers_are_probed_on_the_device_that_trains(
    on_gpu: bool, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the very step: probed on a CPU, 0 workers may look as fast as any, and every ratio to seed.py be too high."""
    import torch

    from bench.baselines import seed

    devices: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)

    def training_step(model: object, optimizer: object, device: torch.device, _: object) -> Callable[..., float]:
        return lambda images, labels: devices.append(device.type) or 0.0

    monkeypatch.setattr(seed, "training_step", training_step)
    assert seed.training(seed.arguments("").parse_args([str(photos), *SMALL]), 0).rate() > 0
    assert set(devices) == {"cuda" if on_gpu else "cpu"}


def test_the_tuned_baseline_trains_with_the_settings_given(run: Run, run_dir: Path) -> None:
    given = ["--workers", 0, "--amp", "off", "--channels-last", "on", "--compile", "off"]
    row, last = run("tuned", "--split", run_dir / "split.csv", *given)
    assert last["settings"] == {"workers": 0, "amp": "off", "channels_last": "on", "compile": "off"}
    assert last["epochs"] == [row]
    assert row["images_per_second"] > 0
    assert 0 <= row["val_accuracy"] <= 1


def test_the_tuned_baseline_probes_only_what_is_left_open(run: Run) -> None:
    (found,) = run("tuned", "--probe", "--workers", 0, "--amp", "off", "--compile", "off")
    assert {**found, "channels_last": None} == {"workers": 0, "amp": "off", "channels_last": None, "compile": "off"}
    assert found["channels_last"] in ("on", "off")


def test_the_tuned_baseline_starts_from_the_seeds_network_and_computes_its_loss(photos: Path) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from bench.baselines import seed, tuned

    args = seed.arguments("").parse_args([str(photos), *SMALL])
    trainer = tuned.Trainer(args, workers=0, amp="off", channels_last="on", compile="off")
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


def test_the_cached_baseline_trains_in_the_layout_given_or_the_faster(run: Run, run_dir: Path) -> None:
    row, last = run("cached", "--split", run_dir / "split.csv", "--channels-last", "on")
    assert last["settings"] == {"channels_last": "on"}
    assert last["epochs"] == [row]
    assert row["images_per_second"] > 0
    assert 0 <= row["val_accuracy"] <= 1
    (found,) = run("cached", "--probe")
    assert found["channels_last"] in ("on", "off")


@pytest.mark.parametrize("channels_last", ["off", "on"])
def test_the_cached_baseline_sees_the_seeds_photos_and_computes_its_loss(channels_last: str, photos: Path) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from bench.baselines import cached, seed

    args = seed.arguments("").parse_args([str(photos), *SMALL])
    classes, train, _ = seed.photos_of(args)
    trainer = cached.trainer(args, len(classes), channels_last)
    torch.manual_seed(args.seed)
    plain = seed.small_cnn(len(classes), args.image_size)
    pixels = cached.decode(train, args)
    images, labels = next(trainer.batches(pixels, 16, shuffle=False))
    expected = torch.stack([seed.Photos(train, args.image_size)[number][0] for number in range(16)])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert labels.tolist() == [label for _, label in train[:16]]
    loss = trainer.step(images, labels)
    torch.testing.assert_close(loss, cross_entropy(plain(expected), labels), rtol=1e-4, atol=1e-5)
    shuffled = list(trainer.batches(pixels, 16, shuffle=True))
    assert {len(labels) for _, labels in shuffled} == {16}
    assert len(shuffled) == len(train) // 16


@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("fp32", False), ("bf16", False)])
def test_the_plain_loop_takes_tf32_only_by_that_name(precision: str, allowed: bool) -> None:
    """Ours in fp32 is strict; torch's own default is not, for convolutions."""
    import torch

    from bench.baselines import loops

    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cublas.allow_tf32
    try:
        cudnn.allow_tf32 = cublas.allow_tf32 = not allowed
        loops.random_steps("plain", 8, 32, (4,), 4, precision)()
        assert (cudnn.allow_tf32, cublas.allow_tf32) == (allowed, allowed)
    finally:
        cudnn.allow_tf32, cublas.allow_tf32 = before


def test_the_cached_loop_steps_over_epochs() -> None:
    from bench.baselines import loops

    step = loops.random_steps("cached", 8, 32, (4,), 4, "fp32")
    for _ in range(3):
        step()


@pytest.mark.long
@pytest.mark.parametrize("peer", PEERS)
def test_the_peers_train_on_the_split_and_probe(peer: str, photos: Path, run_dir: Path) -> None:
    if not PEERS_PYTHON.exists():
        pytest.skip("scripts/peers.sh has not made the peers' environment")

    def run(*arguments: object) -> list[dict[str, Any]]:
        words = [str(PEERS_PYTHON), "-m", f"bench.baselines.{PEERS[peer]}", str(photos), *SMALL, *map(str, arguments)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    row, last = run("--split", run_dir / "split.csv", "--workers", 0)
    assert last["epochs"] == [row]
    assert row["images_per_second"] > 0
    assert 0 <= row["val_accuracy"] <= 1
    (found,) = run("--probe", "--workers", 0)
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
