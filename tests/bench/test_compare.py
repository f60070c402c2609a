from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.compare.__main__ import Ratio, alternate, options, speed_ratio, summary, table  # noqa: E402


def pairs(slowdown: float, n: int, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of slices on a machine that drifts by half, jitters by 15% and is held up in every tenth slice."""
    rng = np.random.default_rng(seed)
    drift = 1 + 0.5 * np.sin(np.arange(n) / 20)
    base, head = (drift * np.exp(0.15 * rng.standard_normal(n)) * (1 + 3 * (rng.random(n) < 0.1)) for _ in range(2))
    return base.tolist(), (slowdown * head).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_is_seen_through_drift_and_outliers_and_no_change_is_quiet(seed: int) -> None:
    slower = speed_ratio(*pairs(1.2, 150, seed))
    assert slower.verdict(0.05) == "slower"
    assert slower.low < 1 / 1.2 < slower.high
    assert speed_ratio(*pairs(1 / 1.2, 150, seed)).verdict(0.05) == "faster"
    assert speed_ratio(*pairs(1.0, 150, seed)).verdict(0.05) in ("the same", "no clear difference")


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    found = [speed_ratio(*pairs(1.1, 30, seed)) for seed in range(300)]
    assert 0.91 < np.mean([ratio.low <= 1 / 1.1 <= ratio.high for ratio in found]) < 0.99


def test_hodges_lehmann_of_a_hand_worked_case() -> None:
    """Log ratios 0, 1, 5: their pairwise averages are 0, 0.5, 1, 2.5, 3, 5."""
    found = speed_ratio([1.0, math.e, math.e**5], [1.0, 1.0, 1.0])
    assert math.log(found.ratio) == pytest.approx(1.75)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((0, 5))
    assert found.n == 3


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.80, 0.94, "slower"),
        (0.80, 0.96, "no clear difference"),
        (0.96, 1.04, "the same"),
        (1.06, 1.20, "faster"),
        (0.98, 1.20, "no clear difference"),
    ],
)
def test_verdicts_of_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Ratio((low + high) / 2, low, high, 10).verdict(0.05) == verdict


def test_slices_alternate_in_counterbalanced_order() -> None:
    order: list[str] = []

    def probe(name: str, seconds: float) -> object:
        def run(what: str, units: int) -> float:
            order.append(name)
            return seconds

        return run

    taken: tuple[list[float], list[float]] = ([], [])
    sides: Any = [probe("A", 1.0), probe("B", 2.0)]
    alternate(sides, "step", 1, taken, 0, least=8, lasting=0.0)
    assert "".join(order) == "ABBA" * 4
    assert taken == ([1.0] * 8, [2.0] * 8)
    order.clear()
    alternate(sides, "step", 1, taken, 1, least=8, lasting=0.0)
    assert "".join(order) == "BAAB" * 4


def test_the_table_names_what_is_slower_and_what_the_machine_hid() -> None:
    args = options().parse_args(["old", "new", "--threads", "1"])
    facts = {"engine": "eager", "precision": "bf16", "device": "cpu", "torch": "2"}
    found = {
        "facts": [facts, facts],
        "units": {"step": 2, "decode": 50, "start": 1},
        "rounds": 3,
        "seconds": {
            "step": ([0.1] * 20, [0.125] * 20),
            "decode": ([0.1, 0.2] * 8, [0.2, 0.1] * 8),
            "start": ([3.0] * 12, [2.0] * 12),
        },
    }
    result = json.loads(json.dumps(summary(found, ("old", "new"), args)))
    assert [row["verdict"] for row in result["rows"]] == ["slower", "no clear difference", "faster"]
    assert result["rows"][0]["images_per_second"] == pytest.approx({"base": 640, "head": 512})
    assert result["rows"][2]["ratio"] == pytest.approx(1.5)
    shown = "\n".join(table(result))
    assert "slower by more than 5%: training step" in shown
    assert "decoding, turbo: the machine was too busy to tell" in shown
    assert re.search(r"start-up +3\.00 s +2\.00 s +1\.500", shown)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")


@needs_git
def test_a_wrong_revision_is_one_line() -> None:
    done = run("no-such-revision")
    assert done.returncode == 2
    expected = "no revision 'no-such-revision' here: a branch, a tag or a commit, see git log\n"
    assert done.stderr == f"bench_compare: error: {expected}"


@needs_git
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_stop_it_leaves_nothing(signum: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.compare", "HEAD"]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        while process.poll() is None and not list(tmp_path.glob("*/base/*")):
            time.sleep(0.05)
        process.send_signal(signum)
        assert process.wait(60) == code
    assert list(tmp_path.iterdir()) == []


@needs_git
@pytest.mark.long
def test_a_real_planted_slowdown_of_the_step_is_caught(tmp_path: Path) -> None:
    """Exit 4 for a commit whose step takes a fifth longer, which is on no branch."""
    tree, out = tmp_path / "tree", tmp_path / "out.json"

    def git(*arguments: str, at: Path = tree) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=at).stdout.strip()

    git("worktree", "add", "--detach", str(tree), at=ROOT)
    try:
        step = tree / "fastcnn" / "training" / "step.py"
        text = step.read_text(encoding="utf-8")
        first, last = "        functions = functions or self.functions\n", "batch.labels, buffers)\n"
        assert text.count(first) == text.count(last) == 1
        text = text.replace(first, f"        import time\n        began = time.perf_counter()\n{first}")
        text = text.replace(last, f"{last}        time.sleep(0.2 * (time.perf_counter() - began))\n")
        step.write_text(text, encoding="utf-8")
        git("commit", "--no-verify", "-qam", "slower")
        commit = git("rev-parse", "HEAD")
    finally:
        git("worktree", "remove", "--force", str(tree), at=ROOT)
    done = run("HEAD", commit, "--only", "step", "--json", str(out))
    assert done.returncode == 4, done.stdout + done.stderr
    assert json.loads(out.read_text())["rows"][0]["ratio"] == pytest.approx(1 / 1.2, rel=0.1)


@needs_git
@pytest.mark.long
def test_a_revision_from_before_the_rooms_is_measured(tmp_path: Path) -> None:
    before, out = "cd23ba7", tmp_path / "out.json"
    known = subprocess.run(["git", "cat-file", "-e", before], capture_output=True, check=False, cwd=ROOT)
    if known.returncode:
        pytest.skip(f"needs revision {before}: a shallow clone")
    done = run(before, "HEAD", "--minutes", "0.1", "--threads", "1", "--json", str(out))
    assert done.returncode in (0, 4), done.stdout + done.stderr  # 4: slower here, which is not judged
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows] == ["step", "decode", "start"]
    assert all(row["n"] >= 12 and 0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
