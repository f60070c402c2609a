"""Layouts of people's folders: which are read, and what is said about them."""

from __future__ import annotations

import shlex
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastcnn.config import LayoutOptions
from fastcnn.data.index import Index, scan, scan_held_out
from fastcnn.data.split_names import SPLITS
from fastcnn.errors import DataError, FastCNNWarning
from fastcnn.system.text import comparable


def photos(root: Path, *folders: str) -> Path:
    """Make folders with a file each, by their paths; a path that ends in a slash is an empty folder."""
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (root / name / f"{name.replace('/', '-')}.jpg").write_bytes(b"x")
    return root


def read(root: Path, *exclude: str) -> tuple[Index, list[str]]:
    """Return the index and the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FastCNNWarning)
        index = scan(root, options=LayoutOptions(exclude))
    return index, [str(one.message) for one in told]


SPLIT: dict[str, tuple[list[str], dict[str, int]]] = {
    "capitals": (["Train/cat", "Train/dog", "Test/cat", "Test/dog"], {"train": 2, "test": 2}),
    "brain MRI": (
        ["Training/glioma", "Training/notumor", "Testing/glioma", "Testing/notumor"],
        {"train": 2, "test": 2},
    ),
    "10 monkey species": (
        ["training/training/n0", "training/training/n1", "validation/validation/n0", "validation/validation/n1"],
        {"train": 2, "val": 2},
    ),
    "dev": (["train/cat", "train/dog", "dev/cat", "dev/dog"], {"train": 2, "val": 2}),
    "Intel scenes": (
        ["seg_train/seg_train/sea", "seg_train/seg_train/street", "seg_test/seg_test/sea", "seg_pred/seg_pred"],
        {"train": 2, "test": 1},
    ),
    "affix behind": (["Train_Set/a", "Train_Set/b", "Test_Set/a", "Test_Set/b"], {"train": 2, "test": 2}),
    "years": (["train2017/a", "train2017/b", "val2017/a"], {"train": 2, "val": 1}),
    "joined words": (["trainset/a", "trainset/b", "testset/a"], {"train": 2, "test": 1}),
    "camel case": (["TrainImages/a", "TrainImages/b", "TestImages/a"], {"train": 2, "test": 1}),
    "two Unicode forms": (["Caf\u00e9 train/a", "Caf\u00e9 train/b", "Cafe\u0301 test/a"], {"train": 2, "test": 1}),
    "images": (["train_images/a", "train_images/b", "val_images/a"], {"train": 2, "val": 1}),
    "iNaturalist-12K": (["inaturalist_12K/train/Aves", "inaturalist_12K/train/Fungi", "inaturalist_12K/val/Aves"],
                        {"train": 2, "val": 1}),
}  # fmt: skip

FLAT = {
    "classes": ["daisy", "rose"],
    "a class called train": ["train", "plane"],
    "a class called test": ["test", "control"],
    "flowers in their archive's folder": ["flowers/daisy", "flowers/rose"],
    "PlantVillage": ["PlantVillage/Potato___healthy", "PlantVillage/Tomato_Bacterial_spot"],
    "macOS's folder beside": ["daisy", "rose", "__MACOSX/daisy"],
}


NOT_CERTAIN = {
    "horse2zebra": (["trainA", "trainB", "testA", "testB"], "no class folders in testA, testB, trainA, trainB"),
    "a split of each class": (["cats_train", "cats_test", "dogs_train", "dogs_test"], "no class folders in cats_test"),
    "the same, with folders": ([f"{name}/{c}" for name in ("cats_train", "cats_test", "dogs_train") for c in "xy"],
                               "in two ways"),
    "words without classes": (["dog_train", "dog_test"], "no class folders in dog_test, dog_train"),
}  # fmt: skip

WRAPPED = {
    "fruits-360": ["fruits-360_100x100/fruits-360/Training/apple", "fruits-360_100x100/fruits-360/Training/pear"],
    "unpacked twice": ["flowers/flowers/apple", "flowers/flowers/pear"],
    "training folder alone": ["fruits/train/apple", "fruits/train/pear"],
    "input": ["kaggle/input/fruits/apple", "kaggle/input/fruits/pear"],
}

IN_CLASSES = {
    "splits in classes": (["a/train", "a/test", "b/train", "b/test"], "folders of splits in them (test, train)"),
    "MVTec": (["bottle/train/good", "bottle/test/good", "cable/train/good", "cable/test/bent"], "of splits in them"),
    "many classes": ([f"{n}/{split}" for n in range(30) for split in ("Training", "val")], "splits in them (Training,"),
    "splits of other names": (["tr/a", "tr/b", "te/a", "te/b"], "all classes of DATA have the folders a, b: "),
}


@pytest.mark.parametrize("name", NOT_CERTAIN)
def test_words_of_splits_in_all_names_are_refused(name: str, tmp_path: Path) -> None:
    folders, told = NOT_CERTAIN[name]
    with pytest.raises(DataError, match=f"{told}.*say.*--train-dir [.]|{told}.*Say which: --train-dir [.]"):
        scan(photos(tmp_path, *folders))
    classes = scan(tmp_path, options=LayoutOptions(folders={"train": "."})).classes
    assert classes == tuple(sorted({name.partition("/")[0] for name in folders}))


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapping_folders_are_stepped_through(name: str, tmp_path: Path) -> None:
    with pytest.warns(FastCNNWarning, match=f"has one folder, {WRAPPED[name][0].partition('/')[0]}"):
        assert scan(photos(tmp_path, *WRAPPED[name])).classes == ("apple", "pear")


def test_a_folder_with_photos_beside_the_only_folder_wraps_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one class, 'x'"):
        scan(photos(tmp_path, "x", "x/y/apple", "x/y/pear"))


def test_links_in_a_circle_are_no_wrapping_folders(tmp_path: Path) -> None:
    photos(tmp_path, "a/", "b/")
    (tmp_path / "a" / "x").symlink_to("../b")
    (tmp_path / "b" / "x").symlink_to("../a")
    with pytest.raises(DataError, match="only one class, 'x'"):
        scan(tmp_path / "a")


@pytest.mark.parametrize("name", IN_CLASSES)
def test_splits_inside_of_classes_are_told(name: str, tmp_path: Path) -> None:
    folders, expected = IN_CLASSES[name]
    index, told = read(photos(tmp_path, *folders))
    assert len(index) == len(folders)
    assert len(told) == 1
    assert expected.replace("DATA", str(tmp_path)) in told[0]


def test_the_only_class_may_hold_the_classes(tmp_path: Path) -> None:
    photos(tmp_path, "train/data/a", "train/data/b", "test/data/a", "test/data/b")
    with pytest.raises(DataError, match=r"only one class, 'data', .* say --train-dir train/data$"):
        scan(tmp_path)


def test_photos_beside_class_folders_are_told(tmp_path: Path) -> None:
    photos(tmp_path, "seg_train/a", "seg_train/b", "seg_test/a", "seg_test/b")
    for name in ("seg_train/1.jpg", "seg_test/2.jpg", "3.PNG", "README.md", "seg_train/.4.jpg"):
        (tmp_path / name).write_bytes(b"x")
    index = scan(tmp_path)
    assert list(index.outside) == ["3.PNG", "seg_test/2.jpg", "seg_train/1.jpg"]
    assert list(scan_held_out(tmp_path / "seg_train", ["a", "b"]).outside) == ["1.jpg"]
    with pytest.warns(
        FastCNNWarning, match="3 photos are in no class folder of .*: 3.PNG, seg_test/2.jpg, seg_train/1"
    ):
        index.warn_of_outside()


@pytest.mark.parametrize("name", SPLIT)
def test_split_folders(name: str, tmp_path: Path) -> None:
    folders, expected = SPLIT[name]
    index, told = read(photos(tmp_path / "data", *folders))
    assert len(index.classes) == 2
    assert not {one.casefold() for one in index.classes} & set(SPLITS)
    assert {split: int((index.folders == split).sum()) for split in expected} == expected
    assert len(index) == sum(expected.values())
    assert "<class>/<photos>" in index.layout
    beside = [line for line in told if "beside the split folders" in line]
    assert (len(beside) == 1 and "seg_pred" in beside[0]) == (name == "Intel scenes")
    assert any("has one folder" in line for line in told) == (name == "iNaturalist-12K")


@pytest.mark.parametrize("name", FLAT)
def test_flat_layouts(name: str, tmp_path: Path) -> None:
    index, told = read(photos(tmp_path / "data", *FLAT[name]))
    assert len(index.classes) == 2
    assert set(index.folders) == {"train"}
    assert any("has one folder" in line for line in told) == ("/" in FLAT[name][0])


def test_what_stands_beside_a_train_folder_is_named(tmp_path: Path) -> None:
    index, told = read(photos(tmp_path, "train/cat", "train/dog", "docs/", "images", "wandb/a", "wandb/b"))
    assert index.classes == ("cat", "dog")
    assert told == [f"docs, images, wandb in {tmp_path} are beside the split folders (train), and not read"]


@pytest.mark.parametrize("beside", [["plane/c", "plane/d"], ["plane", "ship"], ["plane/c", "ship/d"]])
def test_train_may_be_a_class_among_others(beside: list[str], tmp_path: Path) -> None:
    photos(tmp_path, "train/a", "train/b", *beside)
    (tmp_path / "train/a/notes.txt").write_text("no photo")
    with pytest.raises(DataError, match=r"in two ways.*2 classes, a, b, of 2 photos in train") as error:
        scan(tmp_path)
    number, names = (
        (3, "plane, ship, train") if len({name.split("/")[0] for name in beside}) > 1 else (2, "plane, train")
    )
    assert f"in two ways: {number} classes, {names}, of 4 photos; or" in str(error.value)
    assert scan(tmp_path, options=LayoutOptions(folders={"train": "."})).classes == tuple(names.split(", "))
    assert scan(tmp_path, options=LayoutOptions(folders={"train": "train"})).classes == ("a", "b")
    photos(tmp_path, "test/a", "test/b")  # now it is certain
    index, told = read(tmp_path)
    assert index.classes == ("a", "b")
    assert "not read" in told[0]


def test_two_readings_are_shown_and_an_option_settles_it(tmp_path: Path) -> None:
    photos(tmp_path, "seg_dev/apple", "seg_dev/pear", "seg_other/apple", "seg_other/pear")
    with pytest.raises(DataError, match="in two ways") as error:
        scan(tmp_path)
    assert "2 classes, seg_dev, seg_other, of 4 photos; or 2 classes, apple, pear, of 2 photos in seg_dev" in str(
        error.value
    )
    assert scan(tmp_path, options=LayoutOptions(folders={"train": "."})).classes == ("seg_dev", "seg_other")
    index = scan(tmp_path, options=LayoutOptions(folders={"train": "seg_other", "val": "seg_dev"}))
    assert (index.classes, list(index.folders)) == (("apple", "pear"), ["val", "val", "train", "train"])
    with pytest.raises(DataError, match="--test-dir nowhere: no such folder"):
        scan(tmp_path, options=LayoutOptions(folders={"train": "seg_dev", "test": "nowhere"}))
    with pytest.raises(DataError, match="need --train-dir"):
        scan(tmp_path, options=LayoutOptions(folders={"val": "seg_dev"}))


def test_two_folders_of_a_split_are_one_too_many(tmp_path: Path) -> None:
    photos(tmp_path, "train/cat", "train/dog", "Training/cat", "Training/dog")
    with pytest.raises(DataError, match=r"two training folders, Training and train: .* --exclude train"):
        scan(tmp_path)
    assert scan(tmp_path, options=LayoutOptions(("Training",))).classes == ("cat", "dog")


def test_our_own_folders_are_no_classes(tmp_path: Path) -> None:
    photos(tmp_path, "cat", "dog")
    own = ["runs/a/config.yaml", "runs/a/last.pt", "runs/b/.lock", "s/sweep.csv", "s/journal.log"]
    own += ["caches/128-turbo/cache.json", "caches/128-turbo/photos.jsonl"]
    own += ["cat/runs/a/config.yaml", "cat/runs/a/split.csv", "cat/runs/a/predictions.png", "dog/s/sweep.csv"]
    own += ["dog/s/journal.log", "dog/s/sweep.png"]
    for name in own:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    index, told = read(tmp_path)
    assert (index.classes, index.paths, told) == (("cat", "dog"), ("cat/cat.jpg", "dog/dog.jpg"), [])


@pytest.mark.parametrize("name", [".lock", "cache.json", "sweep.csv", "config.yaml"])
def test_a_class_with_a_file_of_that_name_stays_a_class(name: str, tmp_path: Path) -> None:
    photos(tmp_path, "cat", "dog")
    (tmp_path / "cat" / name).write_text("x")
    assert scan(tmp_path).classes == ("cat", "dog")


def test_held_out_photos_in_no_class_are_named(tmp_path: Path) -> None:
    index, told = read(photos(tmp_path, "train/cat", "train/dog", "test"))
    assert set(index.folders) == {"train"}
    assert told == [f"{tmp_path / 'test'} has no class folders: its photos cannot be scored, and are not read"]


@pytest.mark.parametrize("beside", ["docs", "wandb"])
def test_splits_below_a_folder_that_is_not_alone(beside: str, tmp_path: Path) -> None:
    photos(tmp_path, "inat/train/cat", "inat/train/dog", "inat/val/cat", "inat/val/dog", beside)
    with pytest.raises(DataError, match=r"in two ways.*--train-dir inat/train"):
        scan(tmp_path)
    with pytest.warns(FastCNNWarning, match="has one folder, inat"):
        assert scan(tmp_path, options=LayoutOptions((beside,))).classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["runs", "logs", "Output", "results_2", "output 3"])
def test_folders_of_other_tools_are_named_and_can_be_left_out(name: str, tmp_path: Path) -> None:
    photos(tmp_path, "cat", "dog", f"{name}/classify")
    index, told = read(tmp_path)
    assert index.classes == tuple(sorted(["cat", "dog", name]))
    assert told == [
        f"{tmp_path / name} is read as a class: if another program made it, leave it out with --exclude "
        f"{shlex.quote(name)}"
    ]
    assert scan(tmp_path, options=LayoutOptions((name,))).classes == ("cat", "dog")


def test_a_name_that_leaves_nothing_out_is_told(tmp_path: Path) -> None:
    photos(tmp_path, "wrap/Train/cat", "wrap/Train/dog", "wrap/Train/owl", "wrap/Test/cat", "wrap/Test/dog")
    _, told = read(tmp_path, "olw", "owl", "1.jpg")
    assert told[1:] == [
        f"--exclude 1.jpg: {tmp_path} has no class or split folder of that name",
        f"--exclude olw: {tmp_path} has no class or split folder of that name; did you mean 'owl'?",
    ]
    with pytest.warns(FastCNNWarning, match="--exclude catt: .*; did you mean 'cat'"):
        scan_held_out(tmp_path / "wrap", ["cat", "dog", "owl"], options=LayoutOptions(("catt",)))


def test_an_empty_class_is_refused_and_can_be_left_out(tmp_path: Path) -> None:
    photos(tmp_path, "cat", "dog", "owl/")
    with pytest.raises(DataError, match=r"class 'owl' .*--exclude owl"):
        scan(tmp_path)
    assert scan(tmp_path, options=LayoutOptions(("owl",))).classes == ("cat", "dog")
    photos(tmp_path, "Cafe\u0301/")  # as a Mac writes what is typed as one letter
    both = LayoutOptions(("owl", "Caf\u00e9"))
    assert scan(tmp_path, options=both).classes == ("cat", "dog")


def test_split_folders_without_classes_are_no_classes(tmp_path: Path) -> None:
    photos(tmp_path, "train", "test1")  # as Kaggle has it
    with pytest.raises(DataError, match=r"no class folders in test1, train of .* a table .* --train-dir [.]$"):
        scan(tmp_path)
    assert scan(tmp_path, options=LayoutOptions(folders={"train": "."})).classes == ("test1", "train")


@pytest.mark.parametrize("beside", ["Annotations", "masks"])
def test_photos_beside_annotations_are_no_classes(beside: str, tmp_path: Path) -> None:
    photos(tmp_path, "images", beside)
    with pytest.raises(DataError, match=f"images beside {beside}: .*--train-dir images; .*--train-dir [.]$"):
        scan(tmp_path)
    assert scan(tmp_path, options=LayoutOptions(folders={"train": "."})).classes == tuple(sorted(["images", beside]))


def test_scoring_finds_held_out_folders_by_the_same_names(tmp_path: Path) -> None:
    photos(tmp_path, "Train/cat", "Train/dog", "Testing/cat", "Testing/dog")
    assert set(scan_held_out(tmp_path, ["cat", "dog"]).folders) == {"test"}


def check_layout(
    root: Path,
    names: list[str],
    form: str,
    classes: tuple[str, str],
    *,
    wrapped: bool,
    repeated: bool,
    others: list[str],
    files: list[str],
) -> None:
    """Make split folders with classes in them, the first one's names in another Unicode form, and read them.

    Then each photo's class is the folder that it is in, not a split's, and each split is read or named in a warning; or
    an error says why not.
    """
    top = root / "archive" if wrapped else root
    shown = [unicodedata.normalize("NFD" if number else "NFC", form.format(name)) for number, name in enumerate(names)]
    for number, name in enumerate(shown):
        inside = [unicodedata.normalize("NFD" if number else "NFC", one) for one in classes]
        folder = top / name / name if repeated else top / name
        photos(folder, *inside)
        for file in files:
            (folder / inside[0] / file).write_bytes(b"x")
    photos(top, *others)
    for file in files:
        (root / file).write_bytes(b"x")
    try:
        index, told = read(root)
    except DataError:
        return
    labelled = zip(index.paths, index.labels, strict=True)
    wrong = [path for path, label in labelled if comparable(path.split("/")[-2]) != comparable(index.classes[label])]
    assert not wrong, (index.classes, told)
    assert all(path.endswith(".jpg") for path in index.paths)
    unread = [name for name in shown if not any(f"/{name}/" in f"/{path}" for path in index.paths)]
    assert all(any(name in line for line in told) for name in unread), (unread, told)


LAYOUTS = {
    "names": st.one_of(
        st.lists(st.sampled_from(sorted(SPLITS)), min_size=1, max_size=4, unique=True),
        st.tuples(*(st.sampled_from(names) for names in (["train", "training"], ["val", "valid", "dev"], ["test"]))),
        st.tuples(st.sampled_from(["train", "training"]), st.sampled_from(["validation", "testing"])),
    ).flatmap(
        lambda names: st.sampled_from([[*names], [name.title() for name in names], [name.upper() for name in names]])
    ),
    "form": st.sampled_from(["{}", "seg_{}", "{}_set", "{}-images", "my {}", "{}2017", "{}set", "Caf\u00e9 {}"]),
    "classes": st.sampled_from(
        [("apple", "pear"), ("caf\u00e9", "th\u00e9"), ("train", "plane"), ("test", "control"), ("train", "test")]
    ),
    "wrapped": st.booleans(),
    "repeated": st.booleans(),
    "others": st.lists(st.sampled_from(["cat", "docs", "runs", "Zebra"]), max_size=2, unique=True),
    "files": st.lists(
        st.sampled_from(["Thumbs.db", "a.xml", "README.md", "train.csv", "._a.jpg"]), max_size=2, unique=True
    ),
}
SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=30, **SETTINGS)
@given(**LAYOUTS)
@example(
    names=["Train", "Test"], form="{}", classes=("apple", "pear"), wrapped=True, repeated=True, others=[], files=[]
)
def test_classes_are_never_splits_without_a_word(tmp_path_factory: pytest.TempPathFactory, **one: Any) -> None:
    check_layout(tmp_path_factory.mktemp("layout"), **one)


@pytest.mark.long
@settings(max_examples=1000, **SETTINGS)
@given(**LAYOUTS)
def test_a_thousand_layouts(tmp_path_factory: pytest.TempPathFactory, **one: Any) -> None:
    check_layout(tmp_path_factory.mktemp("layout"), **one)
