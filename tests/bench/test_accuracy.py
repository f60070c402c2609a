"""Accuracy over time: what runs are compared by, that a command goes on where it stopped, and its table and picture."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def run(contender: str, seed: int, accuracy: float, cache: str = "warm", **others: Any) -> dict[str, Any]:
    """A run of two epochs as a line of accuracy.jsonl has it."""
    made: dict[str, Any] = {
        "contender": contender,
        "seed": seed,
        "cache": cache,
        "data": "photos",
        "image_size": 32,
        "num_train": 80,
        "num_held_out": 20,
        "settings": [],
        "seconds": 20.0,
        "processor_seconds": 40.0,
        "train_seconds": 10.0,
        "accuracy": accuracy,
    }
    made |= others
    ends = [(made["seconds"] / 2, accuracy / 2), (made["seconds"] - 1, accuracy)]
    epochs = [{"seconds": end, "processor_seconds": 2 * end, "accuracy": reached} for end, reached in ends]
    return {**made, "epochs": epochs}


def planted() -> list[dict[str, Any]]:
    """Three seeds of a script and three recipes, the last of them below the target."""
    return [
        line
        for seed, shift in enumerate((0.0, 0.02, 0.04))
        for line in (
            run("seed.py:10", seed, 0.71 + shift, "cold", seconds=200.0, train_seconds=150.0),
            run("seed:10", seed, 0.7 + shift, "cold", seconds=30.0),
            run("seed:10", seed, 0.7 + shift),
            run("strong:2", seed, 0.73 + shift, "cold", seconds=14.0, train_seconds=2.0),
            run("strong:2", seed, 0.73 + shift, seconds=4.0, train_seconds=2.0 + seed / 10),
            run("strong:1", seed, 0.5 + shift, seconds=2.0, train_seconds=1.0),
        )
    ]


def test_figures_of_hand_worked_runs(tmp_path: Path) -> None:
    """The target is seed's mean after its last epoch; ratios and differences are in pairs, with Student's t."""
    from bench.accuracy.contenders import parsed
    from bench.accuracy.figures import rows
    from bench.report.plots import draw
    from bench.report.record import own_record
    from bench.report.tables import TABLES

    contenders = [parsed(text, 10) for text in ("seed.py", "seed", "strong:2", "strong:1", "tuned.py")]
    extra = run("strong:2", 9, 0.1)  # of a seed that was not asked for
    found = {row["name"]: row for row in rows([*planted(), extra], contenders, range(3))}
    assert list(found) == ["seed.py, 10 epochs", "seed, 10 epochs", "strong, 2 epochs", "strong, 1 epoch"]
    info = found["strong, 2 epochs"]["extra_info"]
    assert info["target"] == pytest.approx(0.72)
    assert info["reached"]
    assert info["over_target"]["mean"] == pytest.approx(0.03)
    assert info["accuracy"]["high"] - 0.75 == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)
    assert info["train_ratio"]["mean"] == pytest.approx((10 / 2 * 10 / 2.1 * 10 / 2.2) ** (1 / 3))
    assert info["train_ratio"]["low"] > 4
    assert info["commands"]["warm"]["seconds_ratio"]["mean"] == pytest.approx(200 / 4)  # seed.py keeps nothing
    assert info["commands"]["cold"]["seconds_ratio"]["mean"] == pytest.approx(200 / 14)
    assert not found["strong, 1 epoch"]["extra_info"]["reached"]
    record = own_record(list(found.values()), command="python -m bench --only accuracy", settings={}, seconds=1.0)
    lines = {line[1]: line for line in TABLES["accuracy"].lines(record)}
    assert "the target" in lines["seed, 10 epochs"]
    assert "below the target" in lines["strong, 1 epoch"]
    assert "+3.0 (+3.0 to +3.0)" in lines["strong, 2 epochs"]
    assert draw(record, tmp_path)["accuracy.png"] == ""
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strng", "did you mean 'strong'"),
        ("strong:0", "1 epoch or more"),
        ("strong:x", "expected strong:EPOCHS"),
        ("strong,precision", "expected OPTION=VALUE"),
        ("strong,lrr=1", "did you mean 'lr'"),
    ],
)
def test_a_wrong_contender_is_explained(text: str, message: str) -> None:
    from bench.__main__ import main
    from bench.accuracy.contenders import parsed
    from fastcnn.errors import UsageError

    with pytest.raises(UsageError, match=message):
        parsed(text, 10)
    assert main(["--only", "accuracy", "--contenders", text]) == 2


SIZES = [("seed", 96), ("strong,image_size=160", 160), ("small", 64), ("seed.py", 96)]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_a_recipe_of_smaller_photos_keeps_them(
    text: str, size: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.accuracy import contenders
    from bench.accuracy.experiment import Experiment
    from fastcnn.data.index import scan

    shipped = contenders.read_recipe
    monkeypatch.setattr(contenders, "recipe_names", lambda: ["seed", "small", "strong"])
    monkeypatch.setattr(
        contenders, "read_recipe", lambda name: {"image_size": 64, "epochs": 3} if name == "small" else shipped(name)
    )
    contender = contenders.parsed(text, 10)
    assert contender.epochs == {"small": 3, "strong,image_size=160": 13}.get(text, 10)
    here = Path()
    how = {"image_size": 96, "device": "cpu", "machine": "a-machine", "try_compile": False}
    words = Experiment(data=here, index=scan(photos), **how).command(contender, here, 0, here)
    assert [word for word in words if word.startswith("--image-size=")][-1] == f"--image-size={size}"


def test_options_of_accuracy_are_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    assert main(["--seeds", "0-1"]) == 2
    assert main(["--only", "accuracy", "step"]) == 2
    assert main(["--only", "accuracy", "--seeds", "3-1"]) == 2
    assert "expected FIRST-LAST, as in 100-107, got '3-1'" in capsys.readouterr().err


# Ends two epochs as a baseline does, with a process of its own that computes.
SCRIPT = """
import json, subprocess, sys
rows = []
for epoch in (1, 2):
    subprocess.run([sys.executable, "-S", "-c", "sum(range(10**7))"])
    rows.append({"epoch": epoch, "train_seconds": 0.5, "val_accuracy": epoch / 4})
    print(json.dumps(rows[-1]), flush=True)
print(json.dumps({"epochs": rows}))
"""


def test_a_command_is_watched_epoch_by_epoch() -> None:
    from bench.accuracy.runs import CommandFailed, watched

    found = watched([sys.executable, "-S", "-c", SCRIPT], {}, None)
    first, last = found["epochs"]
    assert (found["accuracy"], first["accuracy"], found["train_seconds"]) == (0.5, 0.25, 1.0)
    assert 0 < first["seconds"] < last["seconds"] <= found["seconds"]
    if sys.platform == "linux":
        assert 0 < first["processor_seconds"] < last["processor_seconds"] <= found["processor_seconds"] + 0.02
    with pytest.raises(CommandFailed, match="no photos here"):
        watched([sys.executable, "-S", "-c", "import sys; sys.exit('a first line\\nno photos here')"], {}, None)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run; they fail where a contender's name has "tuned", and end at once elsewhere."""
    from bench.accuracy import runs

    ran: list[list[str]] = []

    def watched(words: list[str], *rest: object) -> dict[str, Any]:
        ran.append(words)
        if "bench.baselines.tuned" in words:
            raise runs.CommandFailed("out of memory")
        figures = run("", 0, 0.5)
        names = ("seconds", "processor_seconds", "train_seconds", "accuracy", "epochs")
        return {name: figures[name] for name in names}

    monkeypatch.setattr(runs, "watched", watched)
    monkeypatch.setattr(runs, "fastest_settings", lambda name, *rest, **named: ["--workers=0"])
    return ran


def test_a_command_goes_on_where_it_stopped(
    photos: Path, tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.accuracy import contenders as all_contenders
    from bench.accuracy import runs
    from bench.accuracy.contenders import parsed
    from bench.accuracy.experiment import Experiment
    from fastcnn.data.index import scan

    monkeypatch.setattr(all_contenders, "PEERS_PYTHON", tmp_path / ".peers" / "bin" / "python")
    how = {"image_size": 32, "device": "cpu", "machine": "a-machine", "try_compile": False}
    experiment = Experiment(data=photos, index=scan(photos), **how)
    contenders = [parsed(text, 1) for text in ("seed.py", "tuned.py", "seed", "strong:3,lr=0.01", "timm_train")]
    path, notes = tmp_path / "out" / "accuracy.jsonl", list[str]()
    measured = runs.measure(experiment, contenders, range(2), path, note=notes.append)
    lines = path.read_text().splitlines()
    expected = [
        (contender, seed, cache)
        for seed in (0, 1)
        for contender, caches in (
            ("seed.py:1", ["cold"]),  # it keeps nothing
            ("seed:1", ["cold", "warm"]),
            ("strong:3,lr=0.01", ["cold", "warm"]),
        )
        for cache in caches
    ]
    assert [(one["contender"], one["seed"], one["cache"]) for one in map(json.loads, lines)] == expected
    assert len(commands) == 1 + len(lines)  # tuned.py was not tried again
    assert measured.failed == ["tuned.py:1"]
    assert "tuned.py:1: failed: out of memory" in notes
    assert [one["name"] for one in measured.skipped] == ["timm_train"]
    assert any(note.startswith("timm_train: left out: ") for note in notes)
    # Cut off in its last line, a warm run: that is made anew, after one that fills the caches.
    path.write_text("\n".join(lines)[:-20])
    commands.clear()
    del contenders[1]
    again = runs.measure(experiment, contenders, range(2), path, note=notes.append)
    last_epochs = [[word for word in words if word.startswith("--epochs")][-1] for words in commands]
    assert last_epochs == ["--epochs=1", "--epochs=3"]
    assert len(again.runs) == len(lines)
    commands.clear()
    assert len(runs.measure(experiment, contenders, range(2), path, note=notes.append).runs) == len(lines)
    assert not commands
    other = dataclasses.replace(experiment, image_size=64)  # another experiment in the same file begins anew
    late = runs.measure(other, contenders, range(2), path, seconds=-1, note=notes.append)
    assert not late.runs
    assert {one["reason"] for one in late.skipped[1:]} == {"out of time"}


def test_all_photos_that_are_not_trained_on_are_held_out(tmp_path: Path) -> None:
    import numpy as np
    from make_dataset import make

    from bench.accuracy.experiment import write_held_out
    from bench.baselines.seed import read_split
    from fastcnn.data.index import scan

    make(tmp_path / "photos", classes=2, photos=6, seed=0)
    index = scan(tmp_path / "photos")
    splits = np.array([0, 1, 2, 0, 1, 2], np.uint8)
    assert write_held_out(tmp_path / "split.csv", index, splits) == 4
    _, train, val = read_split(tmp_path / "split.csv", tmp_path / "photos")
    assert (len(train), len(val)) == (2, 4)


@pytest.mark.long
def test_the_command_trains_and_reports(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--only", "accuracy", "--scale", "smoke", "--seeds", "0-1"]
    command += ["--photos", str(photos), "--out", str(tmp_path), "--contenders", "seed.py", "seed", "cached.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "accuracy.jsonl").read_text().splitlines()]
    assert [line["cache"] for line in lines] == ["cold", "cold", "warm", "cold"] * 2
    assert all(line["processor_seconds"] > 0 and 0 < line["train_seconds"] < line["seconds"] for line in lines)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert str(photos) not in (tmp_path / "accuracy.jsonl").read_text() + (tmp_path / "report.md").read_text()
