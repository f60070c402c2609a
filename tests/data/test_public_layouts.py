"""The table of public data sets in docs/data.md: each is made small, and its command says what the table says."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
from PIL import Image

from fastcnn.errors import FastCNNWarning
from tests.cli.test_cli import run

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
ROW = re.compile(r"^\| (.+?) \| `.+` \| `(DATA.*?)` \| (.+) \|$", re.MULTILINE)
ROWS = ROW.findall(DOCS.read_text(encoding="utf-8"))

MADE: dict[str, list[str]] = {
    "iNaturalist-12K": ["inaturalist_12K/train/Aves/", "inaturalist_12K/train/Fungi/", "inaturalist_12K/val/Aves/",
                        "inaturalist_12K/val/Fungi/", "inaturalist_12K/.DS_Store"],
    "Intel scenes": ["seg_train/seg_train/sea/", "seg_train/seg_train/street/", "seg_test/seg_test/sea/",
                     "seg_test/seg_test/street/", "seg_pred/seg_pred/"],
    "brain MRI": ["Training/glioma/", "Training/notumor/", "Testing/glioma/", "Testing/notumor/"],
    "10 monkey species": ["training/training/n0/", "training/training/n1/", "validation/validation/n0/",
                          "validation/validation/n1/", "monkey_labels.txt"],
    "PlantVillage": ["PlantVillage/Potato___healthy/", "PlantVillage/Tomato_Leaf_Mold/"],
    "flowers": ["flowers/daisy/", "flowers/rose/"],
    "dogs-vs-cats": ["train/cat.0.jpg", "train/cat.1.jpg", "train/dog.0.jpg", "train/dog.1.jpg", "test1/1.jpg"],
    "Food-101": ["images/apple_pie/", "images/waffles/", "meta/train.txt", "meta/train.json", "meta/classes.txt"],
    "CUB-200": ["images/001.Albatross/", "images/002.Wren/", "attributes/attributes.txt", "parts/parts.txt",
                "images.txt", "train_test_split.txt"],
    "Oxford pets": ["images/Abyssinian_1.jpg", "images/Abyssinian_2.jpg", "images/beagle_1.jpg", "images/beagle_2.jpg",
                    "annotations/trimaps/Abyssinian_1.png", "annotations/list.txt"],
}  # fmt: skip
"""Files of each data set; a folder, with a slash behind, holds two photos."""

TABLES = {
    "dogs-vs-cats": ["id,label", "cat.0,cat", "cat.1,cat", "dog.0,dog", "dog.1,dog"],
    "Food-101": [
        "path,label,split",
        "apple_pie/0,apple_pie,train",
        "apple_pie/1,apple_pie,test",
        "waffles/0,waffles,train",
    ],
    "CUB-200": ["path,label,split", "001.Albatross/0.jpg,Albatross,train", "002.Wren/1.jpg,Wren,train"],
    "Oxford pets": [
        "image,breed",
        "Abyssinian_1,Abyssinian",
        "Abyssinian_2,Abyssinian",
        "beagle_1,beagle",
        "beagle_2,beagle",
    ],
}
"""Table that somebody makes of the lists of a data set."""


def make(root: Path, name: str) -> None:
    """Make the files of a data set, and the table of its photos."""
    for number, path in enumerate(MADE[name]):
        for file in [f"{path}0.jpg", f"{path}1.jpg"] if path.endswith("/") else [path]:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if file.endswith((".jpg", ".png")):
                Image.new("RGB", (8, 8 + number), (number * 20, 99, 0)).save(root / file)
            else:
                (root / file).write_text("x")
    if name in TABLES:
        (root / "table.csv").write_text("".join(f"{line}\n" for line in TABLES[name]))


def test_the_table_has_all_of_them() -> None:
    assert {name for name, _, _ in ROWS} == MADE.keys()


@pytest.mark.parametrize(("name", "command", "told"), ROWS, ids=[f"{name}, {command}" for name, command, _ in ROWS])
def test_a_public_data_set(
    name: str, command: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "data", name)
    given = [word.replace("DATA", str(tmp_path / "data")) for word in shlex.split(command)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", FastCNNWarning)
        code, out, err = run(capsys, "data", "check", *given, "--decoder", "pillow")
    printed = "\n".join([out, err, *(str(one.message) for one in warned)])
    assert code == (3 if told.startswith("exit code 3") else 0), printed
    for text in re.findall("`(.+?)`", told):
        if text.startswith("layout: "):
            assert out.splitlines()[0] == text
        else:
            assert text.replace("DATA", str(tmp_path / "data")) in printed
