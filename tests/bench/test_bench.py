from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def test_roofline_of_a_hand_worked_case() -> None:
    """Block 1 of 32 filters at 128 x 128, a photo, 2 bytes: x 98,304, y 1,048,576, pooled 262,144, index 131,072."""
    from bench.harness.roofline import floor_seconds, passes

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


def outside() -> dict[str, str]:
    """Return the environment without what tells pytest-benchmark that others run beside it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder written by all benchmarks at their smallest."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "bench", "--scale", "smoke", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=outside())
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.mark.long
def test_the_command_writes_results_pictures_and_a_report(written: Path) -> None:
    from bench.__main__ import groups
    from bench.report.record import read

    (path,) = written.glob("*.json")
    record = read(path)
    assert record.settings["scale"] == "smoke"
    assert set(record.groups) == set(groups())
    assert not record.failed
    assert record.command.startswith("python -m bench --scale smoke --out smoke")
    for row in record.rows:
        assert row.keys() == {"group", "name", "n", "median_seconds", "min_seconds", "max_seconds", "extra_info"}
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["extra_info"]["images_per_second"] > 0
        assert row["extra_info"]["over"].keys() == row["extra_info"]["baseline_seconds"].keys()
    kept = [json.loads(line) for line in (written / "rows.jsonl").read_text().splitlines()]  # as each ended
    assert [(row["group"], row["name"]) for row in kept] == [(row["group"], row["name"]) for row in record.rows]
    assert all(row["images_per_second"] > 0 for row in kept)
    report, printed = (written / "report.md").read_text(), (written / "stdout.txt").read_text()
    (run,) = record.of("train")
    assert run["extra_info"]["stages"]["warm"]["decode"] < run["extra_info"]["stages"]["cold"]["decode"]
    assert [name.partition(".")[0] for name in run["extra_info"]["over"]] == record.settings["baselines"]
    assert "from the second epoch on" in printed
    assert record.growth
    assert len(record.growth["points"]) == 2
    for name in ("throughput.png", "roofline.png", "stages.png", "growth.png"):
        assert (written / name).stat().st_size > 1000
    assert all(row["name"] in report for row in record.rows if row["group"] in ("decode", "step", "infer"))
    assert "OPS" not in printed  # pytest-benchmark's own table
    for text in (path.read_text(), report):
        for secret in (socket.gethostname(), str(ROOT), str(Path.home()), tempfile.gettempdir() + "/"):
            assert secret not in text


def test_a_text_loses_its_paths_and_nothing_else() -> None:
    from bench.report.record import without_paths

    assert without_paths("cannot read /home/me/a b/x.py: C:\\Users\\me\\y.txt, 3/4 of a/b") == (
        "cannot read a b/x.py: y.txt, 3/4 of a/b"
    )


def planted(group: str, name: str, **info: Any) -> dict[str, Any]:
    """One benchmark of three rounds, as pytest-benchmark writes it."""
    over = {"median": 2.0, "low": 1.5, "high": 2.5, "n": 3}
    return {
        "group": group,
        "name": name,
        "fullname": f"bench/suites/bench_{group}.py::{name}",
        "stats": {"median": 2.0, "min": 1.0, "max": 4.0, "rounds": 3},
        "extra_info": {
            "images_per_second": 1234.0,
            "over": {"rival": over},
            "baseline_images_per_second": {"rival": 617.0},
            "baseline_seconds": {"rival": 4.0},
            **info,
        },
    }


def found(*benchmarks: dict[str, Any], failed: Sequence[str] = ()) -> dict[str, Any]:
    """A run of benchmarks, as pytest-benchmark and bench/suites/conftest.py write it."""
    return {
        "machine_info": {
            "hardware": {"system": "Linux", "machine": "x86_64", "cores": 2, "cpu": "A CPU"},
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
            "rates": {"copy_bytes_per_second": 1e10, "fp32_flop_per_second": 1e11},
        },
        "commit_info": {"id": "abc", "dirty": True, "branch": "secret", "project": "secret"},
        "datetime": "2026-01-02T03:04:05.678+00:00",
        "settings": {"scale": "quick", "device": "cpu"},
        "skipped": [{"name": "bench/suites/bench_decode.py::late", "reason": "out of time"}],
        "failed": [{"name": name} for name in failed],
        "benchmarks": list(benchmarks),
    }


def test_a_failing_benchmark_is_named_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import __main__ as command
    from bench.report.record import read

    good, bad = planted("augment", "flip"), planted("augment", "shift")
    monkeypatch.setattr(command, "_measure", lambda args: (found(good, bad, failed=[bad["fullname"]]), 12.3))
    assert command.main(["--quick", "--photos", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert f"failed    {bad['fullname']}" in printed
    assert "left out  1 for time" in printed
    record = read(tmp_path / "out" / "2026-01-02-030405.json")
    assert [row["name"] for row in record.rows] == ["flip"]
    assert record.machine == "a-cpu-2-cores"
    assert record.command == f"python -m bench --quick --photos {tmp_path.name} --out out"
    assert record.commit == "abc+"
    assert "secret" not in json.dumps(vars(record))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| flip | 1,234 | 2.00 (1.50 to 2.50) rival | 3 |" in report
    assert "bench_decode.py::late: out of time" in report
    assert "stages.png was not drawn: train was not run" in report


def test_a_wrong_group_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    assert main(["--only", "step", "trian"]) == 2
    assert "no benchmarks 'trian'; did you mean 'train'?" in capsys.readouterr().err


def grown(num_photos: int, milliseconds: float, mib: float) -> dict[str, Any]:
    """A run over so many photos of 48 KiB."""
    seconds = {"total": milliseconds / 1e3}
    return {
        "num_photos": num_photos,
        "photo_seconds": seconds,
        "peak_memory_bytes": round(mib * 2**20),
        "bytes_per_photo": 3 * 128**2,
    }


def test_growth_of_hand_worked_cases() -> None:
    """1,024 photos more are 48 MiB by their sizes."""
    from bench.report.record import growth, photo_seconds

    assert growth([grown(1024, 3, 400)]) is None
    fine = growth([grown(2048, 3.5, 455), grown(1024, 3, 400)])
    assert fine
    assert fine["points"][1]["over_fewest"] == pytest.approx(3.5 / 3)
    assert fine["points"][1]["memory_over_sizes"] == pytest.approx(55 / 48)
    assert (fine["seconds_hold"], fine["memory_holds"]) == (True, True)
    twice = growth([grown(1024, 3, 400), grown(2048, 3.7, 496)])
    assert twice
    assert twice["points"][1]["memory_over_sizes"] == pytest.approx(2.0)
    assert (twice["seconds_hold"], twice["memory_holds"]) == (False, False)
    seconds = {"start": 9.0, "scan": 1.0, "decode": 2.0, "upload": 0.0, "train": 3.0, "eval": 4.0, "compile": 9.0}
    assert photo_seconds(seconds, 10)["total"] == pytest.approx(1.0)


def test_the_baselines_network_is_ours() -> None:
    """The same layers in the same order: SmallCNN's weights load into the plain network and give its logits."""
    import torch

    from bench.baselines.seed import small_cnn
    from fastcnn import SmallCNN

    torch.manual_seed(0)
    ours = SmallCNN(10, image_size=64).eval()
    plain = small_cnn(10, 64)
    names = [name for name in plain.state_dict() if "num_batches" not in name]
    plain.load_state_dict(dict(zip(names, ours.state_dict().values(), strict=True)), strict=False)
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(plain.eval()(images), ours(images))


def test_readme_and_docs_show_the_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    import readme_tables

    assert readme_tables.published(readme_tables.PUBLISHED)
    assert any("<!-- table: " in path.read_text(encoding="utf-8") for path in readme_tables.documents())
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().err


def test_tables_say_what_is_not_measured() -> None:
    import readme_tables

    from bench.report.record import record

    step = planted("step", "eager", **dict.fromkeys(("share_of_matrix_rate", "share_of_floor"), 0.5))
    step["extra_info"] |= {"share_of_copy_bandwidth": 0.25, "build_seconds": 0.0}
    one = record(found(step), command="python -m bench --quick", settings={}, seconds=1.0)
    text = readme_tables.filled("before <!-- table: step -->\nold<!-- end --> after", [one])
    assert "| A CPU, 2 cores | eager | 1,234 | 2.00 (1.50 to 2.50) rival | 0.50 | 0.25 | 0.50 | 0.00 | 3 |" in text
    assert "| an NVIDIA GPU | not measured |" in text
    assert "A CPU, 2 cores: `python -m bench --quick`, 2026-01-02; torch 2.13.0, python 3.11.7." in text
    assert readme_tables.filled(text, [one]) == text
    assert "old" not in text
    with pytest.raises(ValueError, match="no table nothing"):
        readme_tables.filled("<!-- table: nothing -->\n<!-- end -->", [one])


def test_recipes_are_compared_in_pairs() -> None:
    """Differences of 3, 4 and 5 points: 4 on average, and Student's t for two degrees of freedom."""
    from bench.recipes import compared

    def run(accuracy: float, rate: float) -> dict[str, float]:
        return {"accuracy": accuracy, "images_per_second": rate, "num_held_out": 100, "seconds": 1.0}

    runs = {"seed": [run(a, 500) for a in (0.7, 0.6, 0.5)], "strong": [run(a, 400) for a in (0.73, 0.64, 0.55)]}
    seed, strong = compared(runs, "photos")
    assert "difference" not in seed["extra_info"]
    info = strong["extra_info"]
    assert info["difference"]["mean"] == pytest.approx(0.04)
    assert info["difference"]["high"] - 0.04 == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert info["speed"] == pytest.approx(0.8)
    assert info["standard_deviation"] == pytest.approx(0.09)
    assert strong["n"] == 3
