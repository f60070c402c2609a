"""Two ranks against one process: the same weights, the same figures, the same cache; ranks that fail and are killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastcnn import Config, fit
from fastcnn.cli import main
from fastcnn.data_tools import write_shards
from fastcnn.errors import UsageError
from fastcnn.network.small_cnn import BatchNorm, SmallCNN
from fastcnn.network.sync_layers import SharedDropout, convert
from fastcnn.storage import checkpoint
from fastcnn.system import launch
from fastcnn.system.ranks import ALONE, Ranks
from tests.system import two_ranks
from tests.system.two_ranks import CASES, PLANTED, SMALL

EXACT = 1e-9  # in float64: that the ranks compute the same, and only add in another order


def torchrun(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, **more)


@pytest.fixture(scope="module")
def uneven(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """119 photos: 88 to train on, which is 5 batches and a half, and 31 to validate. Beside them 3 shards of them."""
    folder = tmp_path_factory.mktemp("uneven") / "photos"
    shutil.copytree(photos, folder)
    next(iter(sorted(folder.glob("*/*")))).unlink()
    write_shards.write(folder, f"{folder}-shards", photos_each=40)
    assert len(list(Path(f"{folder}-shards").glob("*.tar"))) == 3
    return folder


@pytest.fixture(scope="module")
def both(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the cases as one process runs them, and as two ranks do."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for case in CASES:
        two_ranks.train(str(uneven), one, case, 1)
    done = torchrun(two_ranks.__file__, str(uneven), str(two), *CASES)
    assert done.returncode == 0, done.stderr
    return one, two


def figures(run: Path) -> list[dict[str, float]]:
    """A run's rows without what depends on the clock."""
    rows = checkpoint.load(run / "last.pt")["rows"]
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in rows]


@pytest.mark.parametrize("case", [case for case in CASES if case != "norm of each"])
def test_two_ranks_train_what_one_process_does(both: tuple[Path, Path], case: str) -> None:
    one, two = (checkpoint.load(folder / case / "last.pt") for folder in both)
    assert one["step"] == two["step"] == 20
    for what in ("model", "optimizer"):
        for name, tensor in one[what].items():
            assert (tensor - two[what][name]).abs().max() <= EXACT, name
    if case == "everything":
        assert (one["average"] - two["average"]).abs().max() <= EXACT
    # Across four epochs' ends, with photos left over in training and an odd one in validation.
    for ours, theirs in zip(figures(both[0] / case), figures(both[1] / case), strict=True):
        assert theirs == pytest.approx(ours, abs=EXACT)
        assert theirs["val/accuracy"] * 31 == pytest.approx(round(theirs["val/accuracy"] * 31), abs=EXACT)
    assert one["sums"][2] == two["sums"][2] == 80
    results = [json.loads((folder / case / "result.json").read_text()) for folder in both]
    for name in ("num_train", "num_val", "best_epoch", "val_accuracy"):
        assert results[0][name] == results[1][name]
    assert results[1]["devices"] == 2
    assert yaml.safe_load((both[1] / case / "config.yaml").read_text())["devices"] == 2


def test_norms_of_each_rank_are_other_norms_and_agree_in_the_checkpoint(both: tuple[Path, Path]) -> None:
    one, two = (checkpoint.load(folder / "norm of each" / "last.pt") for folder in both)
    assert all(tensor.isfinite().all() for tensor in two["model"].values())
    assert any((tensor - two["model"][name]).abs().max() > 1e-4 for name, tensor in one["model"].items())


def test_a_cold_cache_built_by_two_ranks_is_that_of_one_process(both: tuple[Path, Path]) -> None:
    for header in (both[0] / "cache").glob("*/cache.json"):
        assert len(list((both[1] / "cache").glob("*/cache.json"))) == len(
            list((both[0] / "cache").glob("*/cache.json"))
        )
        other = both[1] / "cache" / header.parent.name
        for name in ("cache.json", "pixels.bin", "photos.jsonl"):
            if (header.parent / name).exists():  # stream has no pixels
                assert (header.parent / name).read_bytes() == (other / name).read_bytes()
        paths = [json.loads(line)["path"] for line in (other / "photos.jsonl").read_text().splitlines()]
        assert len(paths) == len(set(paths)) == 119
    assert json.loads((both[1] / "norm" / "result.json").read_text())["num_decoded"] == 119


def test_a_rank_that_fails_stops_the_others_and_only_its_error_is_told(uneven: Path, tmp_path: Path) -> None:
    done = torchrun(two_ranks.__file__, str(uneven), str(tmp_path), PLANTED)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("said: ") and line != "said: "]
    assert said == ["said: planted in rank 1"]


def children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process:
                found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_a_rank_killed_in_mid_run_starts_again_from_the_checkpoint(uneven: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 12, "augment": "flip,mixup", "dropout": 0.2, "cache_dir": str(tmp_path / "cache")}
    config = Config(**settings, data=str(uneven))
    whole = fit(config, run_dir="whole")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "fastcnn.cli", "train", "--config", "config.yaml", "--devices", "2"]
    with subprocess.Popen(
        [*command, "--max-restarts", "1", "--checkpoint-every", "2", "--run-dir", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(two_ranks.__file__).parents[2])},
    ) as run:
        assert run.stdout
        seen = []
        for line in run.stdout:
            seen.append(line)
            if line.startswith("epoch  2/12"):
                os.kill(children(run.pid)[-1], signal.SIGKILL)
                break
        seen += list(run.stdout)
    assert run.returncode == 0, "".join(seen)
    assert sum(line.startswith("restart 1: going on in ") for line in seen) == 1
    assert figures(Path("run")) == [pytest.approx(row, abs=EXACT) for row in figures(whole.run_dir)]
    assert len(figures(Path("run"))) == 12
    assert json.loads(Path("run/result.json").read_text())["finished"] is True


def test_what_cannot_be_used_is_told_once_and_the_exit_code_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "data" / "only").mkdir(parents=True)
    command = [sys.executable, "-m", "fastcnn.cli", "train", "data", "--devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("fastcnn: error: only one class, 'only', in ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told_once(photos: Path) -> None:
    command = [sys.executable, "-m", "fastcnn.cli", "train", str(photos), "--device", "cuda", "--devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("torch sees no NVIDIA GPU here") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 33}, "--batch-size 33 cannot be divided among 2 devices: use 32"),
        ({"batch_size": 34, "augment": "mixup"}, "--augment mixup takes images in pairs: .* a multiple of 4"),
    ],
)
def test_batches_that_cannot_be_shared(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**options, devices=2)


def test_fit_needs_a_launcher_for_several_devices(photos: Path) -> None:
    with pytest.raises(UsageError, match="--devices 2: `fastcnn train` or torchrun starts them"):
        fit(Config(data=str(photos), devices=2))


def test_under_torchrun_devices_are_the_ranks(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.num_ranks() == 4
    for rank, lines in (("1", 0), ("0", 1)):  # what is wrong on all of them is told by the first
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(photos), "--devices", "2"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("torchrun has started 4; leave it out") == lines


@pytest.mark.cuda
def test_a_captured_step_holds_its_all_reduce(uneven: Path, tmp_path: Path) -> None:
    """One rank of an NCCL group trains what a process alone does, captured."""
    config = Config(**{**SMALL, "precision": "fp32"}, data=str(uneven), engine="graphed", device="cuda")
    whole = fit(config, run_dir="whole")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    ours = ["--module", "fastcnn.cli", "train", "--config", "config.yaml", "--device", "cuda", "--run-dir", "run"]
    subprocess.run([*command, *ours], check=True, timeout=500)
    assert json.loads(Path("run/result.json").read_text())["engine"] == "graphed"
    assert figures(Path("run")) == [pytest.approx(row, rel=1e-2) for row in figures(whole.run_dir)]


def test_alone_a_rank_talks_to_nobody() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.sum_(values) is values
    assert ALONE.broadcast(lambda: 3) == 3
    assert ALONE.highest(1, 2) == [1, 2]
    assert ALONE.interleaved(values, 2) is values
    assert ALONE.is_first_to("speak")
    model = SmallCNN(3, filters=(2,) * 5, image_size=32)
    convert(model, ALONE, batch_norm=True)
    assert all(type(block.norm) is BatchNorm for block in model.blocks)  # type: ignore[union-attr]


def test_dropout_takes_the_rows_of_the_whole_batchs_mask() -> None:
    x = torch.ones(8, 5)
    torch.manual_seed(3)
    whole = torch.nn.functional.dropout(x, 0.4)
    for rank in range(2):
        torch.manual_seed(3)
        ours = SharedDropout(0.4, Ranks(rank=rank, count=2))(x[rank * 4 : rank * 4 + 4])
        assert torch.equal(ours, whole[rank * 4 : rank * 4 + 4])
