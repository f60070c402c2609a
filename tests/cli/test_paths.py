"""Folders and files given as people give them: ., ./, .., with a trailing slash, by a link, with spaces, relative."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_cli import SMALL, run

FORMS: dict[str, tuple[str, str]] = {
    "dot": ("{}", "."),
    "dot slash": ("{}", "./"),
    "above": ("{}/.below", ".."),
    "trailing slash": (".", "{}/"),
    "link": ("elsewhere", "../link to {}"),
    "absolute": ("elsewhere", "{absolute}"),
}
"""Form -> folder that the command runs in, and the path that is given; {} is the name of the folder that is meant."""

COMMANDS: dict[str, list[str]] = {
    "data check": ["data", "check", "{data}"],
    "data shard": ["data", "shard", "{data}", "{out}/shards"],
    "train": [
        "train",
        "{data}",
        *SMALL,
        "--batch-size",
        "8",
        "--device",
        "cpu",
        "--no-report",
        "--run-dir",
        "{out}/a run/",
        "--quiet",
    ],
    "eval": ["eval", "{run}", "{data}"],
    "predict": ["predict", "{run}", "{data}", "--quiet"],
    "verify": ["verify", "{run}"],
    "cache": ["cache", "list", "--cache-dir", "{data}"],
}


def test_runs_and_caches_among_the_photos(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run leaves itself out, from its first moment on, and so does the next one."""
    for folder in filter(Path.is_dir, photos.iterdir()):
        shutil.copytree(folder, tmp_path / "all" / folder.name)
    monkeypatch.chdir(tmp_path / "all")
    here = ["--device", "cpu", "--no-report", "--cache-dir", "my cache"]
    for place in ([], [], ["--run-dir", "mine"]):
        code, out, err = run(capsys, "train", ".", *SMALL, "--batch-size", 8, *here, *place)
        assert (code, err) == (0, "opening .\n"), out
        assert f"photos of {sum(map(Path.is_dir, photos.iterdir()))} classes in" in out


@pytest.fixture(scope="module")
def world(
    photos: Path, run_dir: Path, exports: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with photos, an exported run and links to both. Read-only."""
    folder = tmp_path_factory.mktemp("world")
    for photo in [photo for name in sorted(photos.iterdir()) for photo in sorted(name.glob("*.jpg"))[:4]]:
        (folder / "my photos" / photo.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / "my photos" / photo.parent.name)
    shutil.copytree(run_dir, folder / "my run")
    shutil.copy(exports("torchscript"), folder / "my run" / "model.torchscript")
    for name in ("my photos", "my run"):
        (folder / f"link to {name}").symlink_to(folder / name, target_is_directory=True)
        (folder / name / ".below").mkdir()
    (folder / "elsewhere").mkdir()
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_form_of_a_path(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    form: str,
) -> None:
    expected = _called(world, tmp_path / "first", monkeypatch, capsys, command, "absolute", "my photos")
    meant = "my run" if "{data}" not in COMMANDS[command] else "my photos"
    found = _called(world, tmp_path / "second", monkeypatch, capsys, command, form, meant)
    assert found == expected
    if command == "eval":
        assert _called(world, tmp_path / "third", monkeypatch, capsys, command, form, "my run") == expected


def _called(
    world: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    form: str,
    meant: str,
) -> list[str]:
    """Return what a command printed or wrote, without folders, where the folder that is `meant` is given in a form."""
    here, path = (text.replace("{}", meant) for text in FORMS[form])
    monkeypatch.chdir(world / here)
    given = {"data": str(world / "my photos"), "run": str(world / "my run"), "out": str(out)}
    given["data" if meant == "my photos" else "run"] = path.replace("{absolute}", str(world / meant))
    code, printed, error = run(capsys, *(word.format(**given) for word in COMMANDS[command]))
    assert code == 0, error
    if command == "train":
        assert (out / "a run" / "best.pt").is_file()
        return (out / "a run" / "split.csv").read_text(encoding="utf-8").splitlines()
    if command == "data shard":
        return (out / "shards" / "paths.csv").read_text(encoding="utf-8").splitlines()
    lines = [line for line in printed.splitlines() if not re.search(" images of |MiB in |SHA-256|^epoch ", line)]
    return [Path(first).name + rest for first, _, rest in (line.partition("  ") for line in lines)]
