from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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

    sys.path.insert(0, str(ROOT))
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
