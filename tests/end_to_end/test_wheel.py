"""The wheel has all of the package, and an environment with nothing else trains, exports and predicts."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fastcnn", "pipelines")


def tracked(*folders: str) -> list[str]:
    """Return the paths that git knows in folders of the checkout."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "--", *folders]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without what the tests' environment adds; return what it printed."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        check=False,
        cwd=cwd,
        env={**env, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_setup_names_every_data_file() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, lines in setup["options.package_data"].items()
        for pattern in lines.split()
    ]
    for path in tracked(*PACKAGES):
        assert path.endswith(".py") or any(fnmatch.fnmatch(path, pattern) for pattern in patterns), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes of what git tracks, by way of the sdist."""
    if not importlib.util.find_spec("build") or not importlib.util.find_spec("pyproject_hooks"):
        pytest.skip("needs the package build (scripts/env.sh installs it)")
    source = tmp_path_factory.mktemp("source")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_file():
            shutil.copy(ROOT / path, source / path)
    run(sys.executable, "-m", "build", "--outdir", source / "made", source, cwd=source.parent)
    assert len(list((source / "made").glob("*.tar.gz"))) == 1
    (made,) = (source / "made").glob("*.whl")
    return made


@pytest.mark.long
def test_the_wheel_has_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (licence,) = (name for name in names if name.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert set(tracked(*PACKAGES)) <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


@pytest.mark.long
def test_an_empty_environment_trains_exports_and_predicts(wheel: Path, photos: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    run(binaries / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    installed = run(binaries / "python", "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    assert "pytest" not in installed
    assert "onnx" not in installed
    fastcnn = binaries / "fastcnn"
    run(fastcnn, "train", photos, "--epochs", "1", "--image-size", "32", "--run-dir", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()
    run(fastcnn, "export", "run", cwd=tmp_path)
    printed = run(fastcnn, "predict", "run/model.torchscript", next(photos.glob("*/*.jpg")), cwd=tmp_path)
    assert any(folder.name in printed for folder in photos.iterdir())
