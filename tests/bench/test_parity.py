"""Training by the fast path gives what seed.py gives, and parity says so; it says too where the fast path is broken."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


# Faults of a fast path that no one would notice by looking at a run.


def unnormalised_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Evaluate pixels from 0 to 1 and not normalised ones."""
    from fastcnn.network.pixels import Normalise
    from fastcnn.training import evaluation as evaluate

    init = evaluate.EvaluationStep.__init__

    def broken(self: Any, model: Any, feed: Any, normalise: Normalise, *rest: Any, **named: Any) -> None:
        raw = Normalise((0.0,) * 3, (1.0,) * 3, normalise.image_size, normalise.dtype)
        init(self, model, feed, raw, *rest, **named)

    patch.setattr(evaluate.EvaluationStep, "__init__", broken)


def shifted_labels(patch: pytest.MonkeyPatch) -> None:
    """Take the photos of class 1 for photos of class 2, in training and in evaluation."""
    from fastcnn.data import loaders as loader

    def broken(*arguments: Any) -> loader.Feed:
        feed = loader.resident(*arguments)
        feed.labels[feed.labels == 1] = 2
        return feed

    patch.setitem(loader.LOADERS, "resident", broken)


def halved_learning_rate(patch: pytest.MonkeyPatch) -> None:
    """Train at half the learning rate."""
    from fastcnn.runs import build
    from fastcnn.training import schedules

    patch.setattr(build, "schedule", lambda *given, **named: schedules.schedule(*given, **named) / 2)


def unasked_augmentation(patch: pytest.MonkeyPatch) -> None:
    """Flip and shift the training photos."""
    from fastcnn.runs import build

    patch.setattr(build, "in_the_step", lambda config: [("flip", 0.5), ("shift", 0.0625)])


def changed_momentum(patch: pytest.MonkeyPatch) -> None:
    """Keep 0.99 of batch norm's running statistics at each step, as other frameworks do, and not 0.9."""
    from fastcnn.network.small_cnn import BatchNorm

    init = BatchNorm.__init__
    patch.setattr(BatchNorm, "__init__", lambda self, channels: init(self, channels, momentum=0.01))


Fault = Callable[[pytest.MonkeyPatch], None]


def make_gratings(folder: Path, *, classes: int = 4, photos: int = 480, seed: int = 0) -> Path:
    """Fill a folder with noisy stripes, one angle a class: a small network learns them in a few epochs of 32 px."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    for number in range(photos):
        label = number % classes
        angle = np.pi * (label + rng.uniform(0, 0.7)) / classes
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0.6, 1.2) + rng.uniform(0, 6))
        light = 110 + 30 * wave[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 45, (32, 32, 3))
        path = folder / f"class{label}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(light.clip(0, 255).astype(np.uint8)).save(path)
    return folder


OPTIONS = ["--seeds", "4", "--epochs", "3", "--image-size", "32", "--batch-size", "16", "--lr", "2e-3"]
OPTIONS += ["--val-fraction", "0.4", "--threads", "1"]


@pytest.fixture(scope="module")
def gratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 480 striped photos."""
    return make_gratings(tmp_path_factory.mktemp("data") / "gratings")


@pytest.fixture(scope="module")
def healthy(gratings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, str]:
    """Exit code, results file and last lines of a parity run of the fast path as it is."""
    import contextlib
    import io

    from bench.parity import __main__ as parity

    out, printed = tmp_path_factory.mktemp("healthy"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = parity.main([str(gratings), *OPTIONS, "--out", str(out)])
    return code, out / "parity-gratings-32.json", printed.getvalue()


@pytest.mark.long
def test_the_fast_path_is_not_different(healthy: tuple[int, Path, str]) -> None:
    code, path, printed = healthy
    theirs, ours = json.loads(path.read_text())["rows"]
    info = ours["extra_info"]
    assert (code, info["verdict"] == "different") == (0, False), printed
    assert (theirs["name"], ours["name"], ours["n"]) == ("seed.py", "fast path", 4)
    assert theirs["extra_info"]["mean_accuracy"] > 0.5
    assert [len(found["train_losses"]) for found in info["runs"].values()] == [3] * 4
    assert set(info["measures"]) == {"accuracy", "held_out_losses", "train_losses"}
    assert path.with_suffix(".png").stat().st_size > 10_000
    (line,) = [line for line in printed.splitlines() if line.startswith(info["verdict"])]
    assert "4 seeds, 192 held-out photos" in line
    assert ("would do" in line) == (info["verdict"] == "undecided")


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", [unnormalised_evaluation, shifted_labels, halved_learning_rate, unasked_augmentation, changed_momentum]
)
def test_a_broken_fast_path_is_different(
    fault: Fault, healthy: tuple[int, Path, str], gratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.parity import __main__ as parity

    with_baseline_only(healthy[1], tmp_path)
    fault(monkeypatch)
    assert parity.main([str(gratings), *OPTIONS, "--out", str(tmp_path)]) == 4
    record = json.loads((tmp_path / healthy[1].name).read_text())
    assert record["settings"]["verdict"] == "different"
    info = record["rows"][1]["extra_info"]
    assert "different" in [one["verdict"] for one in info["measures"].values()]
    assert info["wrong_labels"] == (120 if fault is shifted_labels else 0)


def with_baseline_only(path: Path, folder: Path) -> None:
    """Put a results file into a folder, without the fast path's runs: seed.py's need not be made again."""
    record = json.loads(path.read_text())
    (folder / path.name).write_text(json.dumps({**record, "rows": record["rows"][:1]}))


def test_the_same_command_goes_on_where_it_stopped(
    gratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.parity import __main__ as parity
    from bench.parity import arms
    from fastcnn.runs.failures import RunInterrupted

    found: arms.Found = {"accuracy": 0.9, "train_losses": [0.1] * 3, "held_out_losses": [0.2] * 3, "seconds": 1.0}

    trained, plainly = list[int](), list[int]()

    def plain(experiment: arms.Experiment, seed: int) -> arms.Found:
        plainly.append(seed)
        return found

    def fast(experiment: arms.Experiment, seed: int) -> arms.Found:
        trained.append(seed)
        if seed == 2 and trained == [0, 1, 2]:
            raise KeyboardInterrupt
        return found

    def stopped(*_: Any) -> arms.Found:
        raise RunInterrupted(signal.SIGTERM, tmp_path)

    monkeypatch.setattr(arms, "fast", fast)
    monkeypatch.setattr(arms, "plain", plain)
    command = [str(gratings), *OPTIONS, "--out", str(tmp_path)]
    assert parity.main(command) == 130
    parity.main(command)
    parity.main(command)
    assert (plainly, trained) == ([0, 1, 2, 3], [0, 1, 2, 2, 3])
    monkeypatch.setattr(parity, "INGREDIENTS", {"decoder turbo": stopped})
    assert parity.main([*command, "--ingredients"]) == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert parity.main([*command, "--epochs", "5"]) == 1
    assert "holds runs with another epochs" in capsys.readouterr().err


def test_seed_py_trains_alike_whether_it_decodes_once_or_always(gratings: Path) -> None:
    from bench.baselines import seed
    from bench.parity import arms

    options = ["--epochs", "1", "--image-size", "32", "--batch-size", "16"]
    args = seed.arguments("").parse_args([str(gratings), *options])
    with arms.prepared(
        gratings, val_fraction=0.9, note=print, epochs=1, batch_size=16, lr=1e-3, schedule="onecycle", image_size=32,
        threads=None,
    ) as experiment:  # fmt: skip
        once = arms.plain(experiment, 0)
        sets = (seed.Photos(photos, 32) for photos in (experiment.train, experiment.held_out))
        train, held_out = sets
        (row,) = seed.training_on(args, 0, 4, train, held_out, schedule="onecycle").epochs(1)
    assert (once["accuracy"], once["train_losses"]) == (row["val_accuracy"], [row["train_loss"]])
    assert once["held_out_losses"] == [row["val_loss"]]


def test_both_sides_start_alike() -> None:
    """The same initial weights, learning rates and input: what parity takes for granted."""
    import torch

    from bench.baselines import seed
    from fastcnn import SmallCNN
    from fastcnn.network.pixels import Normalise
    from fastcnn.training.schedules import schedule

    torch.manual_seed(3)
    plain = seed.small_cnn(10, 64)
    torch.manual_seed(3)
    ours = SmallCNN(10, image_size=64)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, 40, cycle_momentum=False)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(schedule("onecycle", 1e-3, 40), torch.tensor(rates), rtol=1e-4, atol=1e-9)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64)
    expected = (pixels.permute(0, 3, 1, 2) / 255 - seed.MEAN) / seed.STD
    torch.testing.assert_close(normalise(pixels), expected, rtol=0, atol=1e-5)


def test_held_out_is_every_photo_of_the_held_out_folders(gratings: Path, tmp_path: Path) -> None:
    from bench.parity.arms import listing

    for split, classes in (("train", (0, 1)), ("validation", (0, 1)), ("test", (1,))):
        for label in classes:
            shutil.copytree(gratings / f"class{label}", tmp_path / split / f"class{label}")
    classes, train, held_out = listing(tmp_path, 0.2)
    assert classes == ["class0", "class1"]
    assert (len(train), len(held_out)) == (240, 360)
    assert {path.relative_to(tmp_path).parts[0] for path, _ in held_out} == {"validation", "test"}
    _, train, held_out = listing(gratings, 0.25)
    assert (len(train), len(held_out)) == (360, 120)


def test_verdicts_of_a_hand_worked_case() -> None:
    """Differences of 3, 4 and 5: 4 on average, and 2.920 / sqrt(3) on each side of it, by Student's t for 2 degrees."""
    from bench.parity.equivalence import compare, needed, overall

    found = {margin: compare([3.0, 4.0, 5.0], margin) for margin in (2.0, 3.0, 5.0, 6.0)}
    assert found[2.0].low == pytest.approx(4 - 1.6858, abs=1e-3)
    assert found[2.0].high == pytest.approx(4 + 1.6858, abs=1e-3)
    assert [one.verdict for one in found.values()] == ["different", "undecided", "undecided", "equivalent"]
    assert found[6.0].p < 0.05 < found[5.0].p
    assert found[3.0].p < 0.95 < found[2.0].p
    assert compare([-3.0, -4.0, -5.0], 2.0).verdict == "different"
    # (2.920 + 1.886) / sqrt(3) is more than 2, the margin, and (2.353 + 1.638) / sqrt(4) is not.
    assert needed(1.0, 2.0) == 4
    assert found[3.0].needed == 3
    assert found[2.0].needed is None
    assert needed(1.0, 1e-3) is None
    assert compare([1.0], 2.0).verdict == "undecided"
    assert [compare([0.5, 0.5], margin).verdict for margin in (1.0, 0.1)] == ["equivalent", "different"]
    assert overall(["equivalent", "undecided"]) == "undecided"
    assert overall(["different", "undecided"]) == "different"
    assert overall(["equivalent", "equivalent"]) == "equivalent"


def test_noise_alone_is_hardly_ever_called_different(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from bench.parity import equivalence
    from bench.parity.equivalence import compare

    monkeypatch.setattr(equivalence, "needed", lambda *_: None)  # most of the time, and no part of a verdict
    rng = np.random.default_rng(0)
    verdicts = [compare(list(rng.normal(0, 2, 4)), 1.0).verdict for _ in range(100)]
    assert verdicts.count("different") <= 3
    at_the_margin = [compare(list(rng.normal(1, 0.5, 4)), 1.0).verdict for _ in range(100)]
    assert at_the_margin.count("different") <= 10  # 5 are expected
    assert at_the_margin.count("equivalent") <= 10


def test_what_has_learned_nothing_is_no_proof() -> None:
    from bench.parity import __main__ as parity

    def found(accuracy: float) -> dict[str, Any]:
        return {"accuracy": accuracy, "train_losses": [1.0], "held_out_losses": [1.0], "seconds": 1.0}

    args = parity._parser().parse_args(["data", "--seeds", "2"])
    for accuracy, verdict in ((0.25, "undecided"), (0.5, "equivalent")):
        runs = {name: {seed: found(accuracy) for seed in (0, 1)} for name in ("seed.py", "fast path")}
        assert parity.row_of(args, "fast path", runs, 0.25)["extra_info"]["verdict"] == verdict


def test_one_epoch_beyond_the_margin_is_enough() -> None:
    """The second of eight epochs has a loss that is 22% to 28% higher, and the mean over the epochs one of 3%."""
    from bench.parity import __main__ as parity

    def found(second: float) -> dict[str, Any]:
        losses = {"train_losses": [1.0] * 8, "held_out_losses": [1.0, second] + [1.0] * 6}
        return {"accuracy": 0.7, "seconds": 1.0, **losses}

    args = parity._parser().parse_args(["data", "--seeds", "4"])
    for growth, verdict in ((1.25, "different"), (1.05, "equivalent")):
        ours = {seed: found(growth + step) for seed, step in enumerate((-0.03, -0.01, 0.01, 0.03))}
        runs = {"seed.py": dict.fromkeys(range(4), found(1.0)), "fast path": ours}
        info = parity.row_of(args, "fast path", runs, 0.25)["extra_info"]
        assert info["verdict"] == verdict
        assert [one["verdict"] for one in info["measures"].values()] == ["equivalent"] * 3
        beyond = [one["verdict"] == "different" for one in info["epochs"]["held_out_losses"]]
        assert beyond == [False, verdict == "different"] + [False] * 6


@pytest.mark.parametrize("name", ["channels_last", "pool_first"])
def test_an_ingredient_is_the_same_network(name: str) -> None:
    import torch

    from bench.baselines.seed import small_cnn
    from bench.parity import arms

    torch.manual_seed(0)
    plain = small_cnn(4, 32)
    torch.manual_seed(0)
    changed = getattr(arms, name)(4, 32)
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(changed(images), plain(images), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [["pooling before the activation", "precision fp16", "engine graphed"], None],
)
def test_ingredients_have_an_interval_or_a_reason(
    names: list[str] | None, healthy: tuple[int, Path, str], gratings: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch

    from bench.parity import __main__ as parity
    from bench.parity import arms

    names = [*names, "fast path"] if names else list(arms.INGREDIENTS)
    monkeypatch.setattr(parity, "INGREDIENTS", {name: arms.INGREDIENTS[name] for name in names})
    shutil.copy(healthy[1], tmp_path)
    assert parity.main([str(gratings), *OPTIONS, "--seeds", "2", "--out", str(tmp_path), "--ingredients"]) == 0
    record = json.loads((tmp_path / "parity-gratings-32-ingredients.json").read_text())
    measured, skipped = [row["name"] for row in record["rows"]], [one["name"] for one in record["skipped"]]
    assert sorted(measured + skipped) == sorted(["seed.py", *names])
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in names)
    for row in record["rows"][1:]:
        assert row["extra_info"]["measures"]["accuracy"]["low"] <= row["extra_info"]["measures"]["accuracy"]["high"]
    if not torch.cuda.is_available():
        assert {"precision fp16", "engine graphed"} <= set(skipped)
        assert "not measured: fp16 is for NVIDIA GPUs" in printed


def test_a_wrong_option_gets_a_line(gratings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.parity import __main__ as parity

    assert parity.main([str(gratings), "--seeds", "1"]) == 2
    assert capsys.readouterr().err == (
        "fastcnn parity: error: --seeds: expected 2 or more: one seed says nothing of the spread, got 1\n"
    )
    assert parity.main([str(tmp_path / "nothing")]) == 3
    assert "no folder" in capsys.readouterr().err


@pytest.mark.long
def test_parity_is_a_command_of_a_checkout(tmp_path: Path) -> None:
    def parity(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-P",
            "-c",
            "from fastcnn.cli import main; import sys; sys.exit(main())",
            "parity",
            *arguments,
        ]
        environment = {"PYTHONPATH": str(root), "PATH": ""}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    shutil.copytree(ROOT / "fastcnn", tmp_path / "installed" / "fastcnn")
    installed = parity(tmp_path / "installed", "photos")
    assert installed.returncode == 1
    assert installed.stderr == (
        "fastcnn: error: parity needs a checkout, and this is an installed package: run fastcnn parity in a clone\n"
    )
    helped = parity(ROOT, "--help")
    assert helped.returncode == 0
    assert "--margin POINTS" in helped.stdout


def test_the_benchmarks_page_has_the_published_parity() -> None:
    """That the tables are those of the results files, tests/test_bench.py sees."""
    from bench.report.record import read

    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    published = sorted((ROOT / "bench" / "results" / "published").glob("parity-*.json"))
    assert published
    for path in published:
        record = read(path)
        assert record.command in " ".join(text.split())
        for name, reason in ((one["name"], one["reason"]) for one in record.skipped):
            assert f"| {name} | not measured: {reason} |" in text
