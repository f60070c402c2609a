"""The commands as a person runs them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastcnn.cli import main
from fastcnn.config import SECTIONS, option_name
from fastcnn.runs import trackers

CHECKOUT = Path(__file__).resolve().parents[2]
SMALL = ["--epochs", "1", "--image_size", "32", "--filters=[8,8,8,8,8]", "--batch-size", "16"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


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
        (["train", "x", "--learning_rate", "0.1"], 2, "no option --learning-rate; did you mean '--lr'?"),
        (["train", "x", "--bs=8"], 2, "no option --bs; did you mean '--batch-size'?"),
        (["train", "x", "--hflip"], 2, "no option --hflip; did you mean '--augment=flip'?"),
        (["train", "x", "--BATCH-SIZE=8"], 2, "did you mean '--batch-size'?"),
        (["train", "x", "--device", "gpu"], 2, "did you mean 'cuda'?"),
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
    error = [line for line in err.splitlines() if not line.startswith("opening ")]
    assert len(error) == 1
    assert error[0].startswith("fastcnn: error: ")


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that `fastcnn train` was run in, and what it printed. Read-only."""
    folder, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        status = main(["train", str(photos), *SMALL, "--batch_norm=False", "--no-report", "--cache-dir", "cache"])
    assert status == 0
    return folder, printed.getvalue()


def test_train(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert "epoch 1/1" in printed
    assert "val accuracy" in printed
    assert yaml.safe_load((folder / "runs/photos/config.yaml").read_text())["batch_norm"] is False


@pytest.mark.usefixtures("verified_here")
def test_export_predict(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    photos: Path,
    trained: tuple[Path, str],
    tmp_path: Path,
) -> None:
    shutil.copytree(trained[0] / "runs", "runs")
    folder = next(p for p in sorted(photos.iterdir()) if p.is_dir())
    code, before, err = run(capsys, "predict", "photos", folder)
    assert code == 0
    assert "runs/photos was not exported: its best.pt is, to a temporary file\n" in err
    assert not list(Path("runs/photos").glob("model*"))

    code, out, _ = run(capsys, "export", "photos")
    assert code == 0
    assert "runs/photos/model.torchscript" in out
    assert run(capsys, "predict", "photos", folder)[1] == before

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
        assert re.fullmatch(
            r"opening runs/photos/model.torchscript\n"
            r"3 photos in .* s \(.* photos/s, \d+% of it decoding\) after .* s of start-up; 1 cannot be used\n",
            err,
        )


def test_resume_quietly(capsys: pytest.CaptureFixture[str], trained: tuple[Path, str]) -> None:
    shutil.copytree(trained[0] / "runs", "runs")
    assert run(capsys, "train", "--resume", "photos", "--epochs", "2", "--quiet") == (0, "", "")
    assert json.loads(Path("runs/photos/result.json").read_text())["epochs"] == 2


def test_words_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--activation", "ReLU", "--optimizer=SGD", "--recipe", "Seed", "--decoder", "Pillow", "--augment", "Flip"]
    switches = ["--batch-norm", "No", "--report=off", "--strict", "YES", "--deterministic=On"]
    code, out, _ = run(capsys, "train", *words, *switches, "photos", "--print-config")
    values = yaml.safe_load(out)
    assert code == 0
    assert [values[name] for name in ("data", "activation", "optimizer", "decoder", "augment")] == [
        *("photos", "relu", "sgd", "pillow"),
        ["flip=0.5"],
    ]
    assert [values[name] for name in ("batch_norm", "report", "strict", "deterministic")] == [False, False, True, True]


def test_the_package_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastcnn", "train", "--lr0=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "fastcnn: error: no option --lr0; did you mean '--lr'?\n")


def test_print_config_trains_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 1e-4\nepochs: 3\n")
    code, out, _ = run(
        capsys, "train", "x", "--recipe", "seed", "--config", "c.yaml", "--epochs", "4", "--print-config"
    )
    values = yaml.safe_load(out)
    assert code == 0
    assert (values["lr"], values["epochs"], values["data"]) == (1e-4, 4, "x")
    assert not Path("runs").exists()


def test_cache_commands(capsys: pytest.CaptureFixture[str], photos: Path, trained: tuple[Path, str]) -> None:
    shutil.copytree(trained[0] / "cache", "here")
    code, out, _ = run(capsys, "cache", "list", "--cache-dir", "here")
    assert code == 0
    key, images, size, _, _, folder = out.splitlines()[1].split()
    assert (images, size, folder) == ("120", "32x32", str(photos))
    assert "images  120" in run(capsys, "cache", "info", "--cache-dir", "here")[1]
    assert run(capsys, "cache", "clear", key, "--cache-dir", "here")[0] == 0
    assert run(capsys, "cache", "list", "--cache-dir", "here") == (0, f"no caches in {Path('here').resolve()}\n", "")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    sections = re.split(r"^(\w+) options:$", out, flags=re.MULTILINE)
    assert sections[1::2] == ["Command", "Data", "Model", "Optimization", "Run"]
    for section, options in zip(SECTIONS.values(), sections[4::2], strict=True):
        for name, option in section.__pydantic_fields__.items():
            assert name == "data" or option_name(name) in options
            assert name == "data" or option.default is not None or "Default: " in str(option.description), name
    assert "Optimizer: adam, adamw" in out
    for command in ("sweep", "eval", "export", "verify", "predict", "serve", "doctor", "data", "cache"):
        assert run(capsys, command, "--help")[0] == 0
    code, out, err = run(capsys)
    assert code == 2
    assert "train" in out + err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(
    photos: Path, sent: signal.Signals, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process; test_faults.py sends one to a command's own."""
    plain = trackers.CsvTracker.epoch

    def epoch(self: trackers.CsvTracker, row: dict[str, float]) -> None:
        plain(self, row)
        signal.raise_signal(sent)

    monkeypatch.setattr(trackers.CsvTracker, "epoch", epoch)
    status, _, err = run(capsys, "train", photos, *SMALL[2:], "--epochs", "100000", "--no-report")
    assert status == code, err
    assert "saved in" in err
    assert Path("runs/photos/last.pt").is_file()


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process_saves_and_stops(photos: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    options = [*SMALL[2:], "--epochs", "100000", "--no-report"]
    command = [sys.executable, "-m", "fastcnn.cli", "train", str(photos), *options]
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


def test_scripts_work_from_a_checkout(tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "scripts" / "train.py"), "photos", "--lr", "0.5", "--print-config"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["lr"] == 0.5


def test_bench_passes_arguments_on(tmp_path: Path) -> None:
    """That bench needs a checkout, tests/bench/test_parity.py sees with parity, which is started alike."""
    (tmp_path / "bench").mkdir()  # the user's own folder of that name is not run
    (tmp_path / "bench" / "__main__.py").touch()
    command = [sys.executable, "-P", "-m", "fastcnn.cli", "bench", "--only", "stepp"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    wrong = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean 'step'?" in wrong.stderr


def test_main_returns_the_exit_code_as_a_notebook_needs() -> None:
    assert main(["--version"]) == 0
    assert main(["train"]) == 2
    ended = subprocess.run([sys.executable, "-m", "fastcnn", "train"], capture_output=True, check=False)
    assert ended.returncode == 2
