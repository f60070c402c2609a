"""Headers of tar archives, against Python's tarfile and whatever else packs them."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.data import tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

# Also long ones (GNU's and the extended headers), and ones that are no ASCII or no UTF-8.
NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
    | st.text("ab/.\udcff", min_size=90, max_size=300),
    min_size=1,
    max_size=6,
)
KINDS = st.lists(st.sampled_from(b"0000\x00712345678xZ"), min_size=6, max_size=6)


def pack(path: Path, members: list[tuple[str, int, bytes]], format: int) -> bool:
    """Write members of (name, kind, content); return whether the format can hold them."""
    try:
        with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
            for name, kind, content in members:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = bytes([kind]), len(content), "elsewhere"
                archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    except ValueError:  # too long a name for ustar
        return False
    return True


def entries(path: Path) -> list[tuple[str, int, int]]:
    return [(entry.name, entry.offset, entry.size) for entry in tar.entries(path)]


@pytest.mark.parametrize("format", FORMATS)
def test_the_files_that_tarfile_finds(format: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    @given(NAMES, KINDS, st.integers(0, 1500))
    def check(names: list[str], kinds: list[int], size: int) -> None:
        members = [
            (name, kind, b"x" * (size + i) if chr(kind) in "\x0007" and not name.endswith("/") else b"")
            for i, (name, kind) in enumerate(zip(names, kinds, strict=False))
            if kind != ord("x")
        ]
        if pack(path, members, FORMATS[format]):
            with tarfile.open(path, "r:", errors="surrogateescape") as archive:
                expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
            found = [(name.rstrip("/"), *place) for name, *place in entries(path)]  # as tarfile does in some formats
            assert found == [(name.rstrip("/"), *place) for name, *place in expected]

    check()


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_what_gnu_tar_packs(format: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / ("long" * 20)).mkdir(parents=True)
    contents = {"1.jpg": b"one", "2.jpg": b"", f"{'long' * 20}/{'er' * (4 if format == 'v7' else 40)}.jpg": b"x" * 2000}
    if format in ("gnu", "pax", "oldgnu"):
        contents["ä" * 60 + ".jpg"] = b"umlaut"
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "link.jpg").symlink_to("1.jpg")
    (folder / "same.jpg").hardlink_to(folder / "1.jpg")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", f"--format={format}", "--sort=name", "-cf", path, "-C", folder, "."], check=True)
    data = path.read_bytes()
    found = {name.removeprefix("./"): data[start : start + size] for name, start, size in entries(path)}
    assert found == contents


def header(**changes: bytes | str) -> bytes:
    """Return the header of an empty file, with fields changed and the checksum right."""
    info = tarfile.TarInfo("a.jpg")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    places = {"name": 0, "size": 124, "kind": 156, "magic": 257, "prefix": 345}
    for field, value in changes.items():
        value = value.encode() if isinstance(value, str) else value
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
PLAIN = header() + END
DAMAGED = {
    "nothing": (b"", "no tar archive"),
    "text": (b"a photo\n" * 200, "no tar archive"),
    "zip": (b"PK\3\4" + bytes(600), "no tar archive"),
    "no end": (header(), "cut short"),
    "cut in a header": (header() + header()[:300], "cut short"),
    "cut in a file": (header(size="00000002000") + b"x" * 600, "cut short"),
    "a wrong checksum": (header() + header()[:100] + b"!" + header()[101:] + END, "a header is damaged at byte 512"),
    "a size that is none": (header(size="00000000009") + END, "no tar archive"),
    "a negative size": (header() + header(size=b"\xff" * 12) + END, "a header is damaged"),
    "an enormous size": (header(size=b"\x80" + b"\xff" * 11) + END, "cut short"),
    "a sparse file": (header(kind="S") + END, "a sparse file"),
    "another archive behind": (PLAIN + PLAIN, "two archives"),
    "a long name without an end": (header(kind="L", size="00000100000") + b"x" * 2000, "no tar archive"),
    "a long name that is too long": (header(kind="L", size="00010000000") + bytes(2**21) + END, "a header of"),
    "no extended header": (header(kind="x", size="00000000005") + b"hello".ljust(512, b"\0") + END, "no tar archive"),
    "an extended header of nothing": (
        header(kind="x", size="00000000004") + b"0 a=".ljust(512, b"\0") + END,
        "no tar archive",
    ),
    "a size in words": (
        header(kind="x", size="00000000014") + b"12 size=one\n".ljust(512, b"\0") + END,
        "no tar archive",
    ),
    "new sparse": (
        header(kind="x", size="00000000026") + b"22 GNU.sparse.major=1\n".ljust(512, b"\0") + PLAIN,
        "a sparse file",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_archives_are_told_from_whole_ones(what: str, tmp_path: Path) -> None:
    content, message = DAMAGED[what]
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(tar.Damaged, match=message):
        entries(tmp_path / "a.tar")


def test_old_and_odd_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    # The oldest format marks folders by their names.
    path.write_bytes(header(magic=b"ustar  \0") + header(name="folder/", kind=b"\0", size="00000007000") + PLAIN)
    assert entries(path) == [("a.jpg", 512, 0), ("a.jpg", 1536, 0)]
    # A checksum that counts bytes above 127 as negative.
    block = bytearray(header(name=b"\xc3\xa4.jpg"))
    block[148:156] = b"%06o\0 " % (int(block[148:154], 8) - 512)
    path.write_bytes(bytes(block) + END)
    assert entries(path) == [("ä.jpg", 512, 0)]
    path.write_bytes(END)
    assert entries(path) == []
