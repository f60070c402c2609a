"""Tables of paths and classes as DATA: which columns and folders they are read from, and what is said otherwise."""

from __future__ import annotations

import csv
import shutil
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastcnn.config import LayoutOptions
from fastcnn.data.index import Index, scan, scan_held_out, scan_loosely
from fastcnn.data.split import draw_split, explain_split
from fastcnn.data.split_file import read_split
from fastcnn.errors import DataError, FastCNNError, FastCNNWarning, UsageError
from tests.cli.test_cli import run
from tests.data.test_index import named_split, touch


def table(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return path


def labelled(index: Index) -> dict[str, str]:
    return {path: index.classes[label] for path, label in zip(index.paths, index.labels, strict=True)}


CATS = {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": "cat"}

LAYOUTS: dict[str, tuple[list[str], list[str], str]] = {
    "train.csv beside train/ and test/": (
        ["train/1.jpg", "train/2.jpg", "train/3.jpg", "test/1.jpg", "test/2.jpg", "test/3.jpg"],
        ["id,animal", "1,cat", "2,dog", "3,cat"],
        "paths in 'id', classes in 'animal'",
    ),
    "all in one folder, beside the table": (
        ["1.jpg", "2.jpg", "3.jpg"],
        ["file;weight;animal", "1.jpg;2.5;cat", "2.jpg;0.5;dog", "3.jpg;2.5;cat"],
        "paths in 'file', classes in 'animal'; not read: weight",
    ),
    "without a header": (
        ["images/1.jpg", "images/2.jpg", "images/3.jpg"],
        ["images/1.jpg,cat", "images/2.jpg,dog", "images/3.jpg,cat"],
        "paths in '1', classes in '2'",
    ),
    "the class by number and by name": (
        ["photos/photos/1.jpg", "photos/photos/2.jpg", "photos/photos/3.jpg"],
        ["\ufefftarget,filename,name,category", "0,1.jpg,Tom,cat", "1,2.jpg,Rex,dog", "0,3.jpg,Ida,cat"],
        "paths in 'filename', classes in 'category'; not read: target, name",
    ),
    "paths from Windows": (
        ["images/1.jpg", "images/2.jpg", "images/3.jpg"],
        ["path,label", "images\\1.jpg,cat", ".\\images\\2.jpg,dog", "images\\3.jpg,cat"],
        "paths in 'path', classes in 'label'",
    ),
    "blanks in the header, and a column without a name": (
        ["images/1.jpg", "images/2.jpg", "images/3.jpg"],
        [", path , label", "0, 1.jpg, cat", "1, 2.jpg, dog", "2, 3.jpg, cat"],
        "paths in 'path', classes in 'label'",
    ),
    "other delimiters in quotes": (
        ["1.jpg", "2.jpg", "3.jpg"],
        ['"path, with extension, as it is";label', "1.jpg;cat", "2.jpg;dog", "3.jpg;cat"],
        "paths in 'path, with extension, as it is', classes in 'label'",
    ),
    "paths that lead up": (
        ["../elsewhere/1.jpg", "../elsewhere/2.jpg", "../elsewhere/3.jpg"],
        ["path\tlabel", "../elsewhere/1.jpg\tcat", "../elsewhere/2.jpg\tdog", "../elsewhere/3.jpg\tcat"],
        "paths in 'path', classes in 'label'",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_and_folders_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, lines, told = LAYOUTS[name]
    data = table(tmp_path / "data" / "train.csv", *lines)
    touch(data.parent, *files)
    index = scan(data)
    assert {path.rpartition("/")[2]: label for path, label in labelled(index).items()} == CATS
    assert index.layout == f"train.csv: {told}"
    assert index.sizes.tolist() == [1, 1, 1]
    assert all(Path(str(source)).is_file() for source in index.sources())
    assert not any("test" in str(source).split("/")[-2] for source in index.sources())
    assert (set(index.folders), index.splits_given) == ({"train"}, False)
    monkeypatch.chdir(data.parent)
    assert (scan("train.csv").paths, scan("train.csv").root) == (index.paths, index.root)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_text_as_spreadsheets_save_it(encoding: str, tmp_path: Path) -> None:
    touch(tmp_path, *CATS)
    rows = [f"{name}\tCaf\u00e9 {label}" for name, label in CATS.items()]
    index = scan(table(tmp_path / "list.csv", "image\tlabel", *rows, encoding=encoding))
    assert index.classes == ("Caf\u00e9 cat", "Caf\u00e9 dog")


def test_a_column_is_named_without_its_blanks(tmp_path: Path) -> None:
    touch(tmp_path, *CATS)
    data = table(tmp_path / "list.csv", "image, kind, hue", "1.jpg,cat,red", "2.jpg,dog,blue", "3.jpg,cat,blue")
    assert scan(data, options=LayoutOptions(columns={"label": "kind"})).classes == ("cat", "dog")


def test_a_column_of_splits_in_other_words_is_no_column_to_ignore(tmp_path: Path) -> None:
    touch(tmp_path, *CATS)
    rows = ["1.jpg,cat,Training", "2.jpg,dog,Training", "3.jpg,cat,PublicTest"]
    with pytest.raises(DataError, match="'publictest' in column 'Usage' is no split"):
        scan(table(tmp_path / "list.csv", "image,label,Usage", *rows))


def test_absolute_paths(tmp_path: Path) -> None:
    photos = touch(tmp_path / "a" / "photos", *CATS)
    rows = [f"{photos / name},{label}" for name, label in CATS.items()]
    index = scan(table(tmp_path / "b" / "list.csv", "image,label", *rows))
    assert (labelled(index), index.root) == (CATS, photos)


def test_splits_are_those_of_the_column(tmp_path: Path) -> None:
    """The table of a known set of birds: its own names for everything, and blanks in them."""
    rows = ["0,train/OWL/1.jpg,OWL,train,Strix", "0,valid/OWL/1.jpg,OWL,valid,Strix"]
    rows += ["1,train/EMU/2.jpg,EMU,train,Dromaius", "1,valid/EMU/2.jpg,EMU,valid,Dromaius"]
    data = table(tmp_path / "birds.csv", "class index,filepaths,labels,data set,scientific name", *rows)
    touch(tmp_path, *(row.split(",")[1] for row in rows))
    index = scan(data)
    assert (index.classes, list(index.folders)) == (("EMU", "OWL"), ["train", "train", "val", "val"])
    assert "splits in 'data set'" in index.layout
    assert (named_split(index, 0.2, 0) == index.folders).all()  # val validates, as the table says
    assert explain_split(index, 0.2) == ""
    held_out = scan_held_out(data, ["OWL", "EMU", "JAY"])
    assert labelled(held_out) == {"valid/OWL/1.jpg": "OWL", "valid/EMU/2.jpg": "EMU"}
    assert set(held_out.folders) == {"val"}
    with pytest.raises(DataError, match="'EMU' is a class that the model does not know; it knows OWL"):
        scan_held_out(data, ["OWL", "JAY"])
    assert scan(data, options=LayoutOptions(columns={"label": "scientific name"})).classes == ("Dromaius", "Strix")
    test = table(tmp_path / "test.csv", "file,label,split", "train/OWL/1.jpg,OWL,train", "train/EMU/2.jpg,EMU,Testing")
    with pytest.raises(DataError, match="no usable photos of class 'EMU'"):
        scan(test)
    assert set(scan_held_out(test, ["EMU", "OWL"]).folders) == {"test"}


def test_the_split_of_a_run_is_a_manifest(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    index, flat = scan(run_dir / "split.csv"), scan(photos)
    assert (index.root, index.paths, index.classes) == (photos.resolve(), flat.paths, flat.classes)
    assert (draw_split(index, 0.5, 9) == read_split(run_dir / "split.csv", flat)[1]).all()
    for name in ("mtimes", "ctimes", "inodes", "sizes"):  # found in the same cache
        assert (getattr(index, name) == getattr(flat, name)).all()
    alone = Path(shutil.copy(run_dir / "split.csv", tmp_path / "mine.csv"))
    with pytest.raises(DataError, match=r"no column of .*\('path', 'label', 'split', .*\) has paths.*--train-dir DIR"):
        scan(alone)
    assert scan(alone, options=LayoutOptions(folders={"train": str(photos)})).paths == flat.paths


def test_classes_are_compared_in_one_form_and_numbers_sorted_by_value(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    touch(tmp_path, f"{nfc}.jpg", "b.jpg", "c.jpg")
    index = scan(table(tmp_path / "x.csv", "file,class", f"{nfd}.jpg,10", f"b,{nfc}", f"c,{nfd}"))
    assert labelled(index) == {f"{nfc}.jpg": "10", "b.jpg": nfc, "c.jpg": nfc}
    index = scan(table(tmp_path / "y.csv", "file,class", f"{nfc}.jpg,10", "b.jpg,9", "c.jpg,9"))
    assert index.classes == ("9", "10")


def test_rows_that_name_no_photo(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "two.jpg", "two.png")
    lines = ["1.jpg,cat", "2.jpg,dog", "2.jpg,dog", "3.jpg,dog", ",cat", "1.jpg,", "two,cat"]
    with pytest.warns(FastCNNWarning) as told:
        index = scan(table(tmp_path / "x.csv", "file,label", *lines))
    assert [str(one.message) for one in told] == [
        "x.csv: 2 rows have no path or no class, and are left out",
        "x.csv: 1 row is repeated",
    ]
    assert dict(zip(index.paths, index.sizes.tolist(), strict=True)) == {"1.jpg": 1, "2.jpg": 1, "3.jpg": 0, "two": 0}
    with pytest.warns(FastCNNWarning):
        refusal = scan_loosely(tmp_path / "x.csv", options=LayoutOptions(("cat",)))[1]
    assert refusal.startswith("fewer than two classes in")
    with pytest.warns(FastCNNWarning) as told:
        scan(tmp_path / "x.csv", options=LayoutOptions(("doge",)))
    assert "--exclude doge: x.csv has no class of that name; did you mean 'dog'?" in map(str, [w.message for w in told])


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["file,label"], {}, "has no rows"),
        ([], {}, "has no rows"),
        (["file,label", "1.jpg,cat", "2.jpg"], {}, r"row 3: 1 values, and the header has 2"),
        (["file,label", "1.jpg,cat", "1.jpg,dog"], {}, r"row 3: 1.jpg is listed twice, as 'cat' \(train\) and 'dog'"),
        (["file,label", "8.jpg,cat", "9.jpg,dog"], {}, r"no column of .* \('file', 'label'\) has paths of photos"),
        (["file,a,b", "1.jpg,1,0", "2.jpg,0,0", "3.jpg,1,1"], {}, r"'a', 'b' may each be .* --label-column NAME"),
        (["file,note", "1.jpg,x", "2.jpg,y"], {}, "none of its columns seems to be the class"),
        (["file,label", "1.jpg,cat", "2.jpg,dog"], {"columns": {"label": "lable"}}, "columns 'file', 'label'; did you"),
        (["file,label", "1.jpg,cat", "2.jpg,dog"], {"columns": {"path": "x"}}, "--path-column x: x.csv has"),
        (["file,label", "1.jpg,cat", "2.jpg,cat"], {}, "fewer than two classes"),
        (["file,label,set", "1.jpg,cat,train", "2.jpg,dog,trian"], {}, "'trian' in column 'set' is no split"),
        (["file,label", "1.jpg,cat", "2.jpg,dog"], {"folders": {"val": "v"}}, "leave out --val-dir"),
        (["file,label", "1.jpg,cat", "2.jpg,dog"], {"folders": {"train": "v"}}, "has paths of photos that are in v"),
    ],
)
def test_errors(lines: list[str], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    with pytest.raises((DataError, UsageError), match=message):
        scan(table(tmp_path / "x.csv", *lines), options=LayoutOptions(**options))


def test_two_folders_with_the_same_names(tmp_path: Path) -> None:
    touch(tmp_path, "left/1.jpg", "left/2.jpg", "right/1.jpg", "right/2.jpg")
    data = table(tmp_path / "x.csv", "file,label", "1.jpg,cat", "2.jpg,dog")
    with pytest.raises(DataError, match="are in left and in right: say which with --train-dir left or --train-dir"):
        scan(data)
    assert scan(data, options=LayoutOptions(folders={"train": "right"})).root == tmp_path / "right"


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *CATS)
    data = tmp_path / "x.parquet"
    data.write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(
            FastCNNError, match=r"x.parquet is Parquet: pip install 'fastcnn\[parquet\]', or save it as CSV"
        ):
            scan(data)
    if not find_spec("pyarrow"):
        pytest.skip("reading Parquet needs pyarrow")
    import pyarrow
    import pyarrow.parquet

    with pytest.raises(DataError, match="cannot read the table"):
        scan(data)
    columns = {"image": list(CATS), "label": [0, 1, 0], "weight": [0.5, None, 1], "box": [[0, 1], [2, 3], None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), data)
    assert labelled(scan(data)) == {"1.jpg": "0", "2.jpg": "1", "3.jpg": "0"}
    kinds = pyarrow.array(list(CATS.values()), pyarrow.binary())
    categories = pyarrow.array(list(CATS)).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"id": categories, "kind": kinds}), data)
    assert labelled(scan(data)) == CATS


def test_the_check_of_a_manifest(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A photo that is not there is a bad photo."""
    names = [sorted(folder.glob("*.jpg"))[:2] for folder in sorted(photos.iterdir()) if folder.is_dir()][:2]
    (tmp_path / "all").mkdir()
    rows = []
    for label, paths in zip("ab", names, strict=True):
        for number, path in enumerate(paths):
            shutil.copy(path, tmp_path / "all" / f"{label}{number}.jpg")
            rows.append((f"{label}{number}", label, number))
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("name", "kind", "fold"), *rows, ("gone.jpg", "a", "0")])
    arguments = ["data", "check", "list.csv", "--path-column", "name", "--label-column", "kind"]
    code, out, _ = run(capsys, *arguments)
    assert code == 3
    assert out.startswith("layout: list.csv: paths in 'name', classes in 'kind'; not read: fold\n5 photos")
    assert "gone.jpg: unreadable" in out
    assert run(capsys, *arguments, "--max-bad", "0.5", "--html", "page.html")[0] == 0
    code, _, error = run(capsys, *arguments[:-1], "knd")
    assert code == 3
    assert "columns 'name', 'kind', 'fold'; did you mean 'kind'?" in error


def test_a_run_of_a_table_goes_on_where_it_is_now(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed and evaluated with the table in another folder, under other column names, and refused without it."""
    monkeypatch.chdir(tmp_path)
    rows = [(f"{path.parent.name}-{path.name}", path) for path in sorted(photos.glob("*/*0.jpg"))]
    (tmp_path / "old").mkdir()
    for name, path in rows:
        shutil.copy(path, tmp_path / "old" / name)
    lines = [f"{name},{path.parent.name},{number % 2}" for number, (name, path) in enumerate(rows)]
    table(tmp_path / "old" / "list.csv", "file,kind,fold", *lines)
    small = [
        "--image-size",
        "32",
        "--filters",
        "8",
        "--batch-size",
        "4",
        "--no-report",
        "--quiet",
        "--cache-dir",
        "cache",
    ]
    once = ["train", "old/list.csv", "--epochs", "1", "--run-dir", "one", *small]
    code, _, error = run(capsys, *once)
    assert (code, sum(not line.startswith("opening ") for line in error.splitlines())) == (3, 1)
    assert "'kind', 'fold' may each be the class of a photo: say which with --label-column NAME" in error
    assert run(capsys, *once, "--label-column", "kind")[0] == 0
    evaluated = run(capsys, "eval", "one", "--json")[1]
    (tmp_path / "old").rename("new")
    for command, way_on in (
        ("train --resume one --quiet --epochs 2", "fastcnn train FOLDER"),
        ("eval one", "--moved-to"),
    ):
        code, _, error = run(capsys, *command.split())
        assert (code, sum(not line.startswith("opening ") for line in error.splitlines())) == (3, 1)
        assert way_on in error
    code, out, _ = run(capsys, "eval", "one", "--json", "--moved-to", "new/list.csv")
    assert (code, out) == (0, evaluated.replace(str(tmp_path / "old"), str(tmp_path / "new")))
    assert run(capsys, "train", "new/list.csv", "--resume", "one", "--quiet", "--epochs", "2")[0] == 0
    assert scan("one/split.csv").root == tmp_path / "new"
    table(tmp_path / "new" / "other.csv", "file,animal,fold", *lines)
    code, _, error = run(capsys, "eval", "one", "new/other.csv")
    assert (code, sum(not line.startswith("opening ") for line in error.splitlines())) == (
        3,
        1,
    )  # the run's own column is not looked for in another table
    assert "'animal', 'fold' may each be the class" in error
    for where in (["new/other.csv"], ["--moved-to", "new/other.csv"]):
        assert run(capsys, "eval", "one", *where, "--label-column", "animal")[0] == 0
