"""The commands as a person runs them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastcnn.cli import main

SMALL = ["--epochs", "1", "--image_size", "32", "--filters=[8,8,8,8,8]", "--batch-size", "16"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "x", "--epoch", "3"], 2, "no option --epoch; did you mean '--epochs'?"),
        (["train", "x", "--epochs", "three"], 2, "--epochs: expected a whole number, got 'three'"),
        (["train", "x", "--activation", "rellu"], 2, "did you mean 'relu'?"),
        (["train", "x", "--batch-norm=perhaps"], 2, "expected true or false"),
        (["train", "x", "--recipe", "sed"], 2, "did you mean 'seed'?"),
        (["train", "x", "--config", "none.yaml"], 2, "cannot read the configuration none.yaml"),
        (["trian"], 2, "no command 'trian'; did you mean 'train'?"),
        (["train"], 2, "which photos?"),
        (["train", "nowhere"], 3, "does not exist"),
        (["train", "empty"], 3, "no class folders"),
        (["train", "one"], 3, "only one class"),
        (["export", "nothing"], 1, "no run nothing"),
        (["predict", "nothing.torchscript", "x.jpg"], 1, "no exported model"),
        (["predict", "nothing.torchscript"], 2, "Missing argument"),
        (["cache", "clear", "nothing"], 1, "no cache nothing"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "one" / "cat" / "1.jpg").touch()
    got, out, err = run(capsys, *arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("fastcnn: error: ")


def test_train_export_predict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, photos: Path, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "train", photos, *SMALL, "--batch_norm=False")
    assert code == 0, err
    assert "epoch 1/1" in out
    assert "val accuracy" in out
    assert yaml.safe_load(Path("runs/photos/config.yaml").read_text())["batch_norm"] is False

    code, out, _ = run(capsys, "export", "photos")
    assert code == 0
    assert "runs/photos/model.torchscript" in out

    folder = next(p for p in sorted(photos.iterdir()) if p.is_dir())
    (tmp_path / "bad.jpg").write_text("no photo")
    code, out, _ = run(capsys, "predict", "runs/photos", folder, "bad.jpg", "--top-k", "2")
    assert code == 1
    assert len(out.splitlines()) == 31
    assert out.splitlines()[-1] == "bad.jpg  not used: not an image"

    code, out, _ = run(capsys, "predict", "runs/photos/model.torchscript", folder, "--format", "csv", "--top-k", "2")
    table = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(table) == 60
    assert {row["rank"] for row in table} == {"1", "2"}

    code, out, _ = run(capsys, "predict", "runs/photos", "bad.jpg", folder, "--format", "jsonl")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert lines[0] == {"path": "bad.jpg", "error": "not an image"}
    assert 0 < lines[1]["predictions"][0]["probability"] <= 1

    first, second = sorted(folder.iterdir())[:2]
    code, out, err = run(capsys, "predict", "runs/photos", f"{folder}/*0?.jpg", "--quiet")
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines()] == sorted(map(str, folder.glob("*0?.jpg")))
    for names in (f"{first}\n{second}\nbad.jpg\n", f"{first}\0{second}\0bad.jpg\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names.encode())))
        code, out, err = run(capsys, "predict", "runs/photos", "-")
        assert code == 1
        assert [line.split("  ")[0] for line in out.splitlines()] == [str(first), str(second), "bad.jpg"]
        assert re.fullmatch(r"3 photos in .* s \(.* photos/s, \d+% of it decoding\); 1 cannot be used\n", err)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    assert run(capsys, "train", photos, *SMALL, "--quiet") == (0, "", "")


def test_print_config_trains_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 1e-4\nepochs: 3\n")
    code, out, _ = run(
        capsys, "train", "x", "--recipe", "seed", "--config", "c.yaml", "--epochs", "4", "--print-config"
    )
    values = yaml.safe_load(out)
    assert code == 0
    assert (values["lr"], values["epochs"], values["data"]) == (1e-4, 4, "x")
    assert not Path("runs").exists()


def test_cache_commands(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    run(capsys, "train", photos, *SMALL, "--cache-dir", "here", "--quiet")
    code, out, _ = run(capsys, "cache", "list", "--cache-dir", "here")
    assert code == 0
    assert "120 photos" in out
    key = out.split()[0]
    assert "photos  120" in run(capsys, "cache", "info", "--cache-dir", "here")[1]
    assert run(capsys, "cache", "clear", key, "--cache-dir", "here")[0] == 0
    assert run(capsys, "cache", "list", "--cache-dir", "here") == (0, "", "")


def test_help_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert "--dense-neurons" in out
    code, out, err = run(capsys)
    assert code == 2
    assert "train" in out + err


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(photos: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "fastcnn.cli", "train", str(photos), *SMALL[2:], "--epochs", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "saved in" in err
    assert (tmp_path / "runs" / "photos" / "last.pt").is_file()


def test_scripts_work_from_a_checkout(photos: Path, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
    start = time.time()
    done = subprocess.run(
        [sys.executable, script, photos, *SMALL, "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "photos" / "result.json").stat().st_mtime >= start


def test_bench_needs_a_checkout_and_passes_arguments_on(tmp_path: Path) -> None:
    def bench(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", "from fastcnn.cli import main; main()", "bench", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    checkout = Path(__file__).resolve().parents[2]
    shutil.copytree(checkout / "fastcnn", tmp_path / "installed" / "fastcnn")
    installed = bench(tmp_path / "installed", "--quick")
    assert installed.returncode == 1
    assert installed.stderr.startswith("fastcnn: error: bench needs a checkout")
    (tmp_path / "bench").mkdir()  # the user's own folder of that name is not run
    (tmp_path / "bench" / "__main__.py").touch()
    wrong = bench(checkout, "--only", "stepp")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean 'step'?" in wrong.stderr
