"""Options that say how DATA is read, in every command that takes DATA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from fastcnn.cli import app
from fastcnn.config import LAYOUT_FIELDS
from tests.cli.test_cli import SMALL, run
from tests.data.test_manifest import table


def commands(group: click.Command, *above: str) -> Iterator[tuple[str, click.Command]]:
    """Yield the words and the command of each command below a group."""
    if not isinstance(group, click.Group):
        yield " ".join(above), group
        return
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command
        yield from commands(command, *above, name)


def test_every_command_that_takes_data_has_all_of_them() -> None:
    found = {}
    for name, command in commands(app.commands):
        context = click.Context(command)
        arguments = {one.make_metavar(context) for one in command.params if isinstance(one, click.Argument)}
        if arguments & {"DATA", "[DATA]"}:
            found[name] = {one.name for one in command.params} >= set(LAYOUT_FIELDS)
    assert found == dict.fromkeys(("data check", "data shard", "eval", "sweep", "train", "verify"), True)


@pytest.fixture(scope="module")
def listed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two columns that may be the class and no folder of photos beside it, with the folder named in it."""
    rows = [
        f"{photo.relative_to(photos)},{folder.name},{'xy'[i % 2]}"
        for folder in sorted(photos.iterdir())
        if folder.is_dir()
        for i, photo in enumerate(sorted(folder.glob("*.jpg"))[:4])
    ]
    return table(tmp_path_factory.mktemp("listed") / "list.csv", "file,kind,fold", *rows)


def test_a_table_read_by_its_options(
    photos: Path,
    run_dir: Path,
    exports: Callable[[str], Path],
    listed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(capsys, "data", "check", str(listed))
    assert code == 3
    assert "no column of" in err
    how = ["--label-column", "kind", "--path-column", "file", "--train-dir", str(photos)]
    for command in (
        ["data", "check", str(listed)],
        ["data", "shard", str(listed), str(tmp_path / "shards")],
        ["eval", str(run_dir), str(listed)],
        ["verify", str(exports("torchscript")), str(listed)],
    ):
        code, _, err = run(capsys, *command, *how)
        assert code == 0, err
    assert (tmp_path / "shards" / "classes.txt").read_text().split() == [
        folder.name for folder in sorted(photos.iterdir()) if folder.is_dir()
    ]


def test_a_folder_read_by_its_options(
    photos: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").symlink_to(photos)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "strange").mkdir()
    for folder in filter(Path.is_dir, photos.iterdir()):
        (tmp_path / "two" / folder.name).symlink_to(folder)
    for which, more in (("one", []), ("two", ["--exclude", "strange"])):
        code, out, err = run(capsys, "eval", str(run_dir), str(tmp_path), "--test-dir", which, *more)
        assert (code, err) == (0, f"opening {run_dir}\n")
        assert out.count("test images") == 1


def test_columns_of_a_folder_are_refused(
    photos: Path, run_dir: Path, exports: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["data", "check", str(photos)],
        ["data", "shard", str(photos), str(tmp_path / "shards")],
        ["train", str(photos), *SMALL, "--quiet"],
        ["eval", str(run_dir), str(photos)],
        ["verify", str(exports("torchscript")), str(photos)],
    ):
        code, _, err = run(capsys, *command, "--label-column", "kind")
        assert code == 2
        assert f"--label-column: {photos} is a folder, and columns are those of a CSV or Parquet table" in err


def test_options_without_data_are_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("eval", "verify"):
        code, _, err = run(capsys, command, str(run_dir), "--exclude", "x")
        assert code == 2
        assert "--exclude says how DATA is read: give DATA, or leave it out" in err
