"""What `fastcnn data check` finds in a folder, and that it changes nothing there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fastcnn.cli import main
from fastcnn.data_tools import check, check_report
from fastcnn.data_tools.findings import Findings
from fastcnn.errors import DataError, FastCNNError
from pipelines import pillow
from tests.conftest import SHARED_DATA
from tests.pipelines.test_pipelines import camera, encoded, tagged


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def many(folder: str, count: int, seed: int) -> dict[str, bytes]:
    return {f"{folder}/{i:02}.jpg": encoded(camera(120, 90, seed + i)) for i in range(count)}


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything."""
    photo = camera(200, 150, 1)
    damaged = encoded(camera(100, 80, 3)).replace(b"\xff\xdb", b"\0\xff\xdb", 1)
    files = {
        **many("train/cat", 12, 100),
        **many("train/dog", 3, 200),
        **many("test/cat", 2, 300),
        **many("test/dog", 2, 400),
        "train/cat/same.jpg": encoded(photo),
        "train/cat/same too.jpg": encoded(photo),
        "test/cat/small.jpg": encoded(photo.resize((100, 75))),
        "train/dog/grey.jpg": encoded(photo.convert("L")),
        "train/cat/page.jpg": b"<html>not found</html>",
        "train/cat/cut.jpg": encoded(photo)[:900],
        "train/dog/damaged.jpg": damaged,
        "train/dog/png.jpg": encoded(camera(60, 60, 5), "PNG"),
        "train/dog/turned": encoded(camera(60, 50, 6), exif=tagged(6)),
        "train/dog/progressive.jpg": encoded(camera(60, 50, 7), progressive=True),
        "train/dog/<b>.jpg": encoded(camera(60, 50, 8)),
        "train/stray.jpg": encoded(camera(60, 50, 9)),
        "notes.txt": b"notes",
    }
    return put(tmp_path_factory.mktemp("check") / "photos", files)


@pytest.fixture(scope="module")
def findings(traps: Path) -> Findings:
    return check.check(traps, max_bad=0.2, decoder="pillow")


def paths(findings: Findings, groups: list[check.Group]) -> list[list[str]]:
    return [[findings.index.paths[i] for i in group.photos] for group in groups]


def test_bad_and_damaged_files(findings: Findings) -> None:
    reasons = {path: verdict.reason for path, verdict in findings.bad.items()}
    assert reasons == {"train/cat/page.jpg": "not an image", "train/cat/cut.jpg": "truncated"}
    assert list(findings.damaged) == ["train/dog/damaged.jpg"]


def test_copies(findings: Findings) -> None:
    assert paths(findings, findings.exact) == [["train/cat/same too.jpg", "train/cat/same.jpg"]]
    everything = ["test/cat/small.jpg", "train/cat/same too.jpg", "train/cat/same.jpg", "train/dog/grey.jpg"]
    assert paths(findings, findings.near) == [everything]
    assert findings.near[0].classes == ("cat", "dog")
    assert findings.near[0].splits == ("test", "train")


def test_counts_and_kinds(findings: Findings) -> None:
    cat, dog = findings.classes()
    assert (cat["train"], cat["test"], cat["bad"]) == (14, 3, 2)
    assert (dog["train"], dog["test"], dog["bad"]) == (9, 2, 0)
    assert findings.imbalance == 14 / 9
    kinds = findings.kinds()
    assert kinds["format"]["PNG"] == 1
    assert kinds["colours"]["grey"] == 1
    assert kinds["peculiarity"] == {
        "progressive": 1, "turned by EXIF": 1, "named as another format": 1, "no extension": 1,
    }  # fmt: skip
    assert list(findings.misnamed) == ["train/dog/png.jpg"]
    assert list(findings.index.outside) == ["train/stray.jpg"]


def test_every_problem_is_a_sentence(findings: Findings) -> None:
    text = "\n".join(findings.problems())
    for words in (
        "2 of 30 photos cannot be used: 1 truncated, 1 not an image",
        "1 photo is damaged",
        "1 photo is under two classes or more",
        "1 photo is in two splits or more",
        "1 photo is a copy of another to the byte",
        "3 photos are copies of another by looks",
        "1 photo is in no class folder",
    ):
        assert words in text
    assert text in check.table(findings).replace("\n  ", "\n")


def test_nothing_is_changed(traps: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, int, str]]:
        files = [path for path in sorted(traps.rglob("*")) if path.is_file()]
        stats = [(path, path.stat()) for path in files]
        return {
            str(path): (stat.st_mtime_ns, stat.st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
            for path, stat in stats
        }

    before = state()
    main(["data", "check", str(traps), "--html", str(tmp_path / "page.html")])
    assert state() == before
    status = main(["data", "check", str(traps), "--decoder", "pillow", "--html", str(traps / "page.html")])
    assert status == 1
    assert state() == before


class Page(HTMLParser):
    """Counts pictures, keeps the text, and notes what is asked for from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.pictures, self.elsewhere = "", 0, list[str]()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href") and not str(value).startswith("data:image/jpeg;base64,"):
                self.elsewhere.append(str(value))
        self.pictures += tag == "img"


def test_no_code_of_a_decoder_meets_a_bad_file_again(
    traps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may die of it, and here there is no other process."""
    opened: list[bytes] = []

    def open_image(data: bytes, *arguments: object) -> Image.Image:
        opened.append(data)
        return genuine(data, *arguments)

    genuine = pillow.open_image
    monkeypatch.setattr(pillow, "open_image", open_image)
    found = check.check(traps, decoder="pillow")
    check_report.page(found)
    assert len(opened) >= 28
    assert not {(traps / path).read_bytes() for path in found.bad} & set(opened)


def test_the_page_stands_alone(findings: Findings) -> None:
    page = Page()
    page.feed(check_report.page(findings))
    assert page.elsewhere == []
    assert page.pictures >= 2 + 4 + 16
    for words in ("train/dog/<b>.jpg", "1 photo is under two classes", "Corrupt JPEG data", "not an image"):
        assert words in page.text


def run(*arguments: str) -> int | str | None:
    status = main(["data", "check", *arguments, "--decoder", "pillow"])
    return status


def test_the_command(traps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3 where a run would refuse the folder: 2 of 30 are more than 5%."""
    assert run(str(traps), "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["num_photos"] == len(found["photos"]) == 30
    assert found["num_usable"] == 28
    assert found["formats"]["PNG"] == found["peculiarities"]["progressive"] == found["colours"]["grey"] == 1
    assert "more than --max-bad 0.05" in found["refusal"]
    assert {each["path"] for each in found["bad"]} == {"train/cat/page.jpg", "train/cat/cut.jpg"}
    assert found["near_duplicates"][0]["classes"] == ["cat", "dog"]
    assert run(str(traps), "--max-bad", "0.2", "--html", "page.html") == 0
    assert "the same file" in capsys.readouterr().out
    assert Path("page.html").stat().st_size > 10_000
    assert run(str(traps), "--max-pixels", "12000") == 3
    assert "too large" in capsys.readouterr().out


def test_a_folder_of_any_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run refuses is looked at all the same."""
    photos = list(many("x", 4, 0).values())
    flat = put(tmp_path / "flat", {f"{i}.jpg": photo for i, photo in enumerate(photos)})
    found = check.check(flat, decoder="pillow")
    assert "no class folders" in found.refusal
    assert len(found.index) == 4
    assert found.index.outside == []
    one = put(tmp_path / "one", {f"cat/{i}.jpg": photo for i, photo in enumerate(photos)})
    assert "only one class" in check.check(one, decoder="pillow").refusal
    unknown = put(tmp_path / "unknown", {"train/a/1.jpg": photos[0], "train/b/1.jpg": photos[1], "val/c/1": photos[2]})
    found = check.check(unknown, decoder="pillow")
    assert "does not have" in found.refusal
    assert found.index.classes == ("a", "b", "c")
    for folder, layout in ((flat, "no folders"), (one, "<class>"), (unknown, "train, val, each with <class>")):
        assert run(str(folder)) == 3
        assert capsys.readouterr().out.startswith(f"layout: {layout}")
    (tmp_path / "empty").mkdir()
    assert check.check(tmp_path / "empty", decoder="pillow").refusal
    assert run(str(tmp_path / "empty"), "--html", str(tmp_path / "empty.html")) == 3
    assert run(str(tmp_path / "nothing")) == 3
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(DataError):
        check.check(tmp_path / "nothing", decoder="pillow")


def test_names_of_any_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["new\nline.jpg", os.fsdecode(b"\xff\xfe.jpg"), "n" * 251 + ".jpg", "a b"]
    data = put(tmp_path / "data", {f"{c}/{name}": encoded(camera(50, 40, 0)) for c in "ab" for name in names})
    put(data, {"a/bad\n.jpg": b"text"})
    assert run(str(data), "--html", "page.html") == 3
    assert run(str(data), "--json") == 3
    out = capsys.readouterr().out
    assert len(json.loads(out[out.index("{\n") :])["exact_duplicates"][0]["paths"]) == 8


def test_a_photo_that_vanishes_meanwhile(traps: Path, tmp_path: Path) -> None:
    data = shutil.copytree(traps, tmp_path / "data")
    found = check.check(data, decoder="pillow")
    (data / "train/cat/same.jpg").unlink()
    assert "same.jpg" in check_report.page(found)
    with pytest.raises(FastCNNError, match="cannot write"):
        check_report.write(tmp_path / "no" / "page.html", found)


@pytest.mark.shared
def test_the_traps_in_real_photos() -> None:
    """What shared/data's README says of animals-8."""
    found = check.check(SHARED_DATA / "animals-8")
    assert len(found.index) == 916
    assert not found.bad
    assert len(found.misnamed) == 5
    assert set(found.misnamed.values()) == {"GIF", "PNG"}
    kinds = found.kinds()
    assert kinds["colours"]["RGB with alpha"] == 16
    assert kinds["colours"]["CMYK"] == 1
    assert kinds["colours"]["grey"] == 3
    assert kinds["peculiarity"]["progressive"] == 4
    assert paths(found, found.exact) == [["monkey/32.jpg", "monkey/60.jpg"]]
    assert {len(group.photos) for group in found.near} == {2}


@pytest.mark.shared
def test_the_odd_images() -> None:
    found = check.check(SHARED_DATA / "odd-images")
    assert len(found.bad) == 10
    assert dict(found.index.others) == {".tsv": 1}
    assert len(found.damaged) == 3
    names = [{Path(name).stem.split("__")[1] for name in group} for group in paths(found, found.near)]
    assert {"hopper", "hopper.Lab"} in names
    assert {"Landscape_3", "Landscape_6"} in names  # turned by EXIF


def test_thumbnails_keep_their_proportions(tmp_path: Path) -> None:
    import io

    from pipelines.facts import thumbnail

    assert Image.open(io.BytesIO(thumbnail(encoded(camera(400, 200, 0), exif=tagged(6)), 100))).size == (50, 100)
