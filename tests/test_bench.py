from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def test_roofline_of_a_hand_worked_case() -> None:
    """Block 1 of 32 filters at 128 x 128, a photo, 2 bytes: x 98,304, y 1,048,576, pooled 262,144, index 131,072."""
    from bench.roofline import floor_seconds, passes

    found = {one.name: one for one in passes((32,) * 5)}
    assert found["gather and normalise"].bytes == 3 * 128 * 128 * 3
    assert found["block 1: convolution"].bytes == 98_304 + 1_048_576
    assert found["block 1: convolution"].flops == 2 * 9 * 3 * 32 * 128 * 128
    assert found["block 1: activation, pooling, statistics"].bytes == 1_048_576 + 262_144 + 131_072
    assert found["block 1: gradient through norm, activation, pooling"].bytes == 2 * 262_144 + 131_072 + 1_048_576
    assert "block 1: input gradient" not in found
    assert found["block 2: input gradient"].flops == 2 * 9 * 32 * 32 * 64 * 64
    assert found["output: forward, weight and input gradient"].flops == 6 * 128 * 10
    total = passes((32,) * 5)
    assert sum(one.flops for one in total) == pytest.approx(0.358e9, rel=0.005)
    assert sum(one.bytes for one in passes((32,) * 5, batch=64)) < 64 * sum(one.bytes for one in total)
    pair = [found["block 1: convolution"], found["block 1: normalise"]]
    assert floor_seconds(pair, 1e6, 1e12) == pytest.approx((1_146_880 + 524_288) / 1e6)
    assert floor_seconds(pair, 1e12, 1e6) == pytest.approx(28_311_552 / 1e6 + 524_288 / 1e12)


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_gpu_proof_runs_small_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "scripts" / "gpu_proof.sh"), str(tmp_path), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_proof.json").read_text())
    rows = {row["engine"]: row for row in results["steps"]}
    assert {"eager", "plain"} <= set(rows)
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert results["machine"]["copy_bytes_per_second"] > 0
    assert results["start"]["eager, warm"]["decode"] < results["start"]["eager, cold"]["decode"]
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert "best engine" in done.stdout


def test_the_seed_baseline_runs(photos: Path, run_dir: Path) -> None:
    script = ROOT / "bench" / "baselines" / "seed.py"
    command = [
        sys.executable,
        script,
        photos,
        "--epochs",
        "1",
        "--image-size",
        "32",
        "--workers",
        "0",
        "--batch-size",
        "16",
    ]
    done = subprocess.run([*command, "--split", run_dir / "split.csv"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[0])
    assert row["images_per_second"] > 0
    assert 0 <= row["val_accuracy"] <= 1


def test_the_baselines_network_is_ours() -> None:
    """The same layers in the same order: SmallCNN's weights load into the plain network and give its logits."""
    import torch

    from bench.baselines.loops import network
    from bench.baselines.seed import small_cnn
    from fastcnn import SmallCNN

    torch.manual_seed(0)
    ours = SmallCNN(10, image_size=64).eval()
    for plain in (network(10, (32,) * 5, 64), small_cnn(10, 64)):
        names = [name for name in plain.state_dict() if "num_batches" not in name]
        plain.load_state_dict(dict(zip(names, ours.state_dict().values(), strict=True)), strict=False)
        images = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(plain.eval()(images), ours(images))


def test_the_readme_shows_the_measured_figures() -> None:
    from bench.cpu_ratio import table

    found = json.loads((ROOT / "bench" / "results" / "cpu_ratio.json").read_text())
    assert "\n".join(table(found)) in (ROOT / "README.md").read_text()
