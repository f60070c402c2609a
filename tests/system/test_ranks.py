"""Two ranks against one process: the same weights, the same figures, the same cache; ranks that fail and are killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastcnn import Config, fit
from fastcnn.cli import main
from fastcnn.data_tools import write_shards
from fastcnn.errors import FastCNNError, UsageError
from fastcnn.network.masked_dropout import MaskedDropout
from fastcnn.network.small_cnn import BatchNorm, SmallCNN
from fastcnn.network.sync_layers import convert
from fastcnn.storage import checkpoint
from fastcnn.system import device, launch, ranks
from fastcnn.system.ranks import ALONE, RankLost, Ranks
from tests.system import two_ranks
from tests.system.two_ranks import CASES, EACH, PLANTED, SMALL

ROOT = str(Path(two_ranks.__file__).parents[2])
EXACT = 1e-9  # in float64: that the ranks compute the same, and only add in another order


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def port_of_group(monkeypatch: pytest.MonkeyPatch) -> int:
    """The port of the store of a group of one rank, to which the environment belongs."""
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**group, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    return int(os.environ["MASTER_PORT"])


def run_two_ranks(photos: Path, out: Path, *cases: str) -> list[str]:
    """Run cases in two ranks of a group, started as a launcher does; return what their stderr says of exit codes."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, two_ranks.__file__, str(photos), str(out), *cases]
    ranks = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT, **group, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    stderr = [rank.communicate(timeout=500)[1] for rank in ranks]
    ended = [line for text in stderr for line in text.splitlines() if line.startswith("exit ")]
    assert all(rank.returncode == 0 for rank in ranks) or len(ended) == 2, stderr
    return ended


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
def both(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """The folders of the cases as one process runs them and as two ranks do, and how a planted failure ends them."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for case in CASES:
        if case != "norm of each":  # in one process that is "norm"
            two_ranks.train(str(uneven), one, case, 1)
    return one, two, run_two_ranks(uneven, two, *CASES, PLANTED)


def figures(run: Path) -> list[dict[str, float]]:
    """A run's rows without what depends on the clock."""
    rows = checkpoint.load(run / "last.pt")["rows"]
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in rows]


def assert_near(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> None:
    """fp32 sums in another order: losses within 1%, accuracies within two photos; one of 31 is more than 1%, too."""
    for row, other in zip(ours, theirs, strict=True):
        for key, expected in other.items():
            photos = {"train/accuracy": 80, "val/accuracy": 31}.get(key)
            assert row[key] == pytest.approx(expected, rel=1e-2, abs=2.01 / photos if photos else None), key


def test_two_photos_of_31_are_near_and_three_are_not() -> None:
    row = {"val/accuracy": 10 / 31, "val/loss": 1.0}
    assert_near([{"val/accuracy": 12 / 31, "val/loss": 1.009}], [row])
    for other in ({"val/accuracy": 13 / 31, "val/loss": 1.0}, {"val/accuracy": 10 / 31, "val/loss": 1.02}):
        with pytest.raises(AssertionError):
            assert_near([other], [row])


def assert_equal(one: Path, two: Path, steps: int = 10) -> None:
    """One process and two ranks: the same weights, optimizer and figures."""
    first, second = (checkpoint.load(folder / "last.pt") for folder in (one, two))
    assert first["step"] == second["step"] == steps
    for what in ("model", "optimizer"):
        for name, tensor in first[what].items():
            assert (tensor - second[what][name]).abs().max() <= EXACT, name
    if first["average"] is not None:
        assert (first["average"] - second["average"]).abs().max() <= EXACT
    # Across the epochs' ends, with photos left over in training and an odd one in validation.
    for ours, theirs in zip(figures(one), figures(two), strict=True):
        assert theirs == pytest.approx(ours, abs=EXACT)
        assert theirs["val/accuracy"] * 31 == pytest.approx(round(theirs["val/accuracy"] * 31), abs=EXACT)
    assert first["sums"][2] == second["sums"][2] == 80
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for name in ("num_train", "num_val", "best_epoch", "val_accuracy"):
        assert results[0][name] == results[1][name]
    assert results[1]["devices"] == 2
    assert yaml.safe_load((two / "config.yaml").read_text())["devices"] == 2


@pytest.mark.parametrize("case", [case for case in CASES if case != "norm of each"])
def test_two_ranks_train_what_one_process_does(both: tuple[Path, Path, list[str]], case: str) -> None:
    assert_equal(both[0] / case, both[1] / case)


@pytest.mark.long
def test_each_option_and_loader_by_itself(uneven: Path, tmp_path: Path) -> None:
    for case in EACH:
        two_ranks.train(str(uneven), tmp_path / "one", case, 1)
    assert run_two_ranks(uneven, tmp_path / "two", *EACH) == []
    for case, settings in EACH.items():
        assert_equal(tmp_path / "one" / case, tmp_path / "two" / case, 5 * settings.get("epochs", SMALL["epochs"]))


def test_norms_of_each_rank_are_other_norms_and_agree_in_the_checkpoint(both: tuple[Path, Path, list[str]]) -> None:
    one, two = (checkpoint.load(folder / "last.pt") for folder in (both[0] / "norm", both[1] / "norm of each"))
    assert all(tensor.isfinite().all() for tensor in two["model"].values())
    assert any((tensor - two["model"][name]).abs().max() > 1e-4 for name, tensor in one["model"].items())


def test_a_cold_cache_built_by_two_ranks_is_that_of_one_process(both: tuple[Path, Path, list[str]]) -> None:
    for header in (both[0] / "cache").glob("*/cache.json"):
        assert len(list((both[1] / "cache").glob("*/cache.json"))) == len(
            list((both[0] / "cache").glob("*/cache.json"))
        )
        other = both[1] / "cache" / header.parent.name
        for name in ("cache.json", "pixels.bin", "photos.jsonl"):
            if (header.parent / name).exists():  # stream has no pixels
                one, two = ((folder / name).read_bytes() for folder in (header.parent, other))
                assert one == two if name != "photos.jsonl" else sorted(one.split(b"\n")) == sorted(two.split(b"\n"))
        assert not list(other.glob("photos.*.jsonl"))
        paths = [json.loads(line)["path"] for line in (other / "photos.jsonl").read_text().splitlines()]
        assert len(paths) == len(set(paths)) == 119
    assert json.loads((both[1] / "norm" / "result.json").read_text())["num_decoded"] == 119


def test_a_rank_that_fails_stops_the_others_and_only_its_error_is_told(both: tuple[Path, Path, list[str]]) -> None:
    assert sorted(both[2]) == ["exit 3: ", "exit 3: planted in rank 1"]


def children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process:
                found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_a_rank_killed_in_mid_run_starts_again_from_the_checkpoint(uneven: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 6, "augment": "flip,mixup", "dropout": 0.2, "cache_dir": str(tmp_path / "cache")}
    config = Config(**settings, data=str(uneven))
    whole = fit(config, run_dir="whole")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "fastcnn.cli", "train", "--config", "config.yaml", "--devices", "2"]
    with subprocess.Popen(
        [*command, "--max-restarts", "1", "--checkpoint-every", "2", "--run-dir", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    ) as run:
        assert run.stdout
        seen = []
        for line in run.stdout:
            seen.append(line)
            if line.startswith("epoch 2/6"):
                os.kill(children(run.pid)[-1], signal.SIGKILL)
                break
        seen += list(run.stdout)
    assert run.returncode == 0, "".join(seen)
    assert sum(line.startswith("restart 1: continuing in ") for line in seen) == 1
    assert figures(Path("run")) == [pytest.approx(row, abs=EXACT) for row in figures(whole.run_dir)]
    assert len(figures(Path("run"))) == 6
    assert json.loads(Path("run/result.json").read_text())["finished"] is True


@pytest.mark.long
def test_what_cannot_be_used_is_told_once_and_the_exit_code_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "data" / "only").mkdir(parents=True)
    command = [sys.executable, "-m", "fastcnn.cli", "train", "data", "--devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("fastcnn: error: only one class, 'only', in ")


@pytest.mark.parametrize(("exit_code", "ended"), [(3, 3), (-signal.SIGKILL, "rank 1 was ended by SIGKILL")])
def test_the_exit_code_is_that_of_the_rank_that_failed(
    monkeypatch: pytest.MonkeyPatch, exit_code: int, ended: int | str
) -> None:
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def failing(arguments: Any) -> None:
        assert arguments.nproc_per_node == "2"
        failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="")
        raise ChildFailedError("fastcnn.cli", {1: failure})

    monkeypatch.setattr(torchrun, "run", failing)
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    if isinstance(ended, int):
        assert launch.train(2, ["data"]) == ended
    else:
        with pytest.raises(FastCNNError, match=ended):
            launch.train(2, ["data"])


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


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--devices", "4", "--device", "cuda"], 1, "torch sees no NVIDIA GPU here"),
        (["--devices", "2"], 2, "differs from the 4 processes of torchrun: leave it out"),
    ],
)
def test_what_is_wrong_on_all_ranks_is_told_by_the_first(
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    exit_code: int,
    message: str,
) -> None:
    if exit_code == 1 and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.num_ranks() == 4
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        status = main(["train", str(photos), *options])
        assert status == exit_code
        assert capsys.readouterr().err.count(message) == (rank == "0")


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
    assert_near(figures(Path("run")), figures(whole.run_dir))


def test_alone_a_rank_talks_to_nobody() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.sum_(values) is values
    assert ALONE.broadcast(lambda: 3) == 3
    assert ALONE.maximum(1, 2) == [1, 2]
    assert ALONE.gather_interleaved(values, 2) is values
    assert ALONE.is_first_to("speak")
    model = SmallCNN(3, filters=(2,) * 5, image_size=32)
    convert(model, ALONE, batch_norm=True)
    assert all(type(block.norm) is BatchNorm for block in model.blocks)  # type: ignore[union-attr]


def test_dropout_takes_the_rows_of_the_whole_batchs_mask() -> None:
    x = torch.ones(8, 5)
    torch.manual_seed(3)
    whole = torch.nn.functional.dropout(x, 0.4)
    for rank in range(2):
        dropout = MaskedDropout(0.4, x.clone(), Ranks(rank=rank, count=2), torch.Generator().manual_seed(3))
        dropout.draw()
        rows = slice(rank * 4, rank * 4 + 4)
        assert torch.equal(dropout(x[rows]), whole[rows])
        assert torch.equal(dropout.eval()(x[rows]), x[rows])


@pytest.mark.usefixtures("port_of_group")
def test_graphs_go_before_the_group_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for graphs that hold its work (pytorch #115388): they are reset first, after an error too."""
    order: list[str] = []

    class Graph:
        def reset(self) -> None:
            order.append("graph")

    graph = Graph()
    device._captured.add(graph)
    leave = torch.distributed.destroy_process_group
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: (order.append("group"), leave()))
    with pytest.raises(UsageError), ranks.joined("cpu"):
        raise UsageError("wrong")
    assert order == ["graph", "group"]


def test_a_rank_that_is_at_its_next_run_finds_the_others(port_of_group: int) -> None:
    """It may look for the store while the first rank is still leaving the last run."""
    with ranks.joined("cpu"):
        pass
    early = torch.distributed.TCPStore("127.0.0.1", port_of_group, is_master=False)  # type: ignore[attr-defined]
    early.set("early", "")
    with ranks.joined("cpu") as own:
        own.keep("told", "yes")
        assert own.store.underlying_store.check(["early"])


def test_ranks_that_do_not_come_are_not_waited_for(port_of_group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "JOIN_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(RankLost, match="the ranks do not find each other"), ranks.joined("cpu"):
        pass
