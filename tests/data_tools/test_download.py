"""Getting photos from elsewhere: every way a server fails is gone on from, and no archive writes outside its folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.cli import main
from fastcnn.data_tools import download as data
from fastcnn.data_tools import http_download, unzip
from fastcnn.errors import DataError, FastCNNError
from fastcnn.system.console import Console

PHOTOS = {
    f"inaturalist_12K/{part}/{name}/{i}.jpg": np.random.default_rng(i).bytes(40_000)
    for part in ("train", "val")
    for name in ("Aves", "Fungi")
    for i in range(3)
}
Edit = Callable[[zipfile.ZipInfo], None]


def zipped(files: dict[str, bytes], *, edit: Edit = lambda info: None) -> bytes:
    """Return an archive of files, in order; `edit` changes each one's entry before it is written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name  # as it is, unlike the constructor
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            edit(info)
            packed.writestr(info, content)
    return buffer.getvalue()


REFERENCE = zipped(PHOTOS)
HALF = len(REFERENCE) // 2


class Server(ThreadingHTTPServer):
    """Serves `body`, and misbehaves as a test wants."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = REFERENCE
        self.headers = {"ETag": '"one"'}
        self.breaks = [0]  # of each answer in turn, the bytes sent before the connection breaks; 0 does not break
        self.ranges = True
        self.overstated = 0  # bytes that Content-Length promises too many
        self.stalls = False  # instead of breaking
        self.status: dict[int, int] = {}  # number of the request: what is answered to it
        self.wrong_range = False
        self.ended = threading.Event()
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/mirror/nature_12K.zip"


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: a connection a request."""

    server: Server

    def log_message(self, format: str, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        server, body = self.server, self.server.body
        server.requests.append(dict(self.headers))
        number = len(server.requests) - 1
        if number in server.status:
            self.send_error(server.status[number])
            return
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and server.ranges and self.headers["If-Range"] in server.headers.values():
            start = int(asked[1])
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            first = start + server.wrong_range
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        for name, value in server.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in server.headers:
            self.send_header("Content-Length", str(len(body) - start + server.overstated))
        self.end_headers()
        stop = server.breaks[min(number, len(server.breaks) - 1)]
        with contextlib.suppress(OSError):
            self.wfile.write(body[start : start + stop] if stop else body[start:])
            if stop and server.stalls:
                server.ended.wait(30)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def get(server: Server, folder: Path, **options: float) -> Path:
    return data.download("inaturalist12k", folder, url=server.url, pause=0, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_whole(folder: Path) -> None:
    """The photos are there, to the byte, and nothing half-done is."""
    got = content(folder)
    assert got.pop("nature_12K.zip")
    got.pop(".nature_12K.zip.lock", None)
    assert got == PHOTOS


# Loading


def test_the_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in ("12 files in", "is there already"):
        status = main(["data", "download", "inaturalist12k", "my photos", "--url", server.url])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        assert expected in out
        where = Path("my photos") / "inaturalist_12K"
        assert out.splitlines()[-1] == f"next: fastcnn train '{where}'"
    assert_whole(tmp_path / "my photos")
    assert len(server.requests) == 1


@pytest.mark.parametrize("validator", [{"ETag": '"one"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_a_broken_connection_is_gone_on_with(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], validator: dict[str, str]
) -> None:
    server.headers, server.breaks = validator, [HALF, 1000, 0]
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")
    assert [request.get("Range") for request in server.requests] == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert server.requests[1]["If-Range"] == next(iter(validator.values()))
    assert "trying again" in capsys.readouterr().out


def test_the_next_command_goes_on(server: Server, tmp_path: Path) -> None:
    server.breaks = [HALF]
    server.status = dict.fromkeys(range(1, 6), 503)
    with pytest.raises(FastCNNError, match=r"503 .*5 times in a row; run the same command to go on"):
        get(server, tmp_path / "d")
    assert (tmp_path / "d" / "nature_12K.zip.partial").read_bytes() == REFERENCE[:HALF]
    assert not (tmp_path / "d" / "inaturalist_12K").exists()
    server.breaks, server.status = [0], {}
    get(server, tmp_path / "d")
    assert server.requests[-1]["Range"] == f"bytes={HALF}-"
    assert_whole(tmp_path / "d")


def test_a_server_without_ranges_starts_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.ranges, server.breaks = False, [HALF, 0]
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")
    assert "the server cannot go on in the middle: starting from the beginning" in capsys.readouterr().out


def test_a_server_that_always_breaks_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, [HALF]
    with pytest.raises(FastCNNError, match="the connection broke after"):
        get(server, tmp_path / "d")
    assert len(server.requests) == 1 + http_download.RETRIES


@pytest.mark.parametrize("validator", [{}, {"ETag": 'W/"weak"'}])
def test_what_cannot_be_known_again_is_not_continued(server: Server, tmp_path: Path, validator: dict[str, str]) -> None:
    server.headers, server.breaks = validator, [HALF, 0]
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")
    assert not any("Range" in request for request in server.requests)


def test_a_changed_archive_starts_again(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.body, server.headers, server.breaks = bytes(2 * HALF), {"ETag": '"old"'}, [HALF]
    server.status = dict.fromkeys(range(1, 6), 503)
    with pytest.raises(FastCNNError):
        get(server, tmp_path / "d")
    server.body, server.headers, server.breaks, server.status = REFERENCE, {"ETag": '"new"'}, [0], {}
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")
    assert "the archive has changed: starting from the beginning" in capsys.readouterr().out


def test_another_part_than_asked_for_is_not_appended(server: Server, tmp_path: Path) -> None:
    server.wrong_range, server.breaks = True, [HALF, 0]
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")
    assert [request.get("Range") for request in server.requests] == [None, f"bytes={HALF}-", None]


def test_a_partial_file_of_unknown_origin_is_not_continued(server: Server, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "nature_12K.zip.partial").write_bytes(b"x" * 1000)
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")


def test_a_whole_partial_file_needs_no_server(server: Server, tmp_path: Path) -> None:
    partial = tmp_path / "d" / "nature_12K.zip.partial"
    partial.parent.mkdir()
    partial.write_bytes(REFERENCE)
    partial.with_name(f"{partial.name}.json").write_text(f'{{"size": {len(REFERENCE)}, "validator": "x"}}')
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")
    assert server.requests == []


def test_a_length_that_is_never_reached(server: Server, tmp_path: Path) -> None:
    server.overstated = 10
    with pytest.raises(FastCNNError, match="in a row"):
        get(server, tmp_path / "d")
    assert not (tmp_path / "d" / "nature_12K.zip").exists()


def test_a_stalled_connection_is_broken(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.stalls, server.breaks = True, [HALF, 0]
    get(server, tmp_path / "d", timeout=0.3)
    assert_whole(tmp_path / "d")
    assert "nothing came for 0.3 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": {0: 404}}, "/mirror/nature_12K.zip cannot be downloaded; give a mirror with --url"),
        ({"headers": {"Content-Type": "text/html"}}, "sends a web page, not an archive"),
        ({"headers": {"Content-Length": "many"}}, "does not say how long the archive is"),
    ],
)
def test_what_no_later_try_mends_is_said_at_once(
    server: Server, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    vars(server).update(change)
    with pytest.raises(FastCNNError, match=re.escape(message)):
        get(server, tmp_path / "d")
    assert len(server.requests) == 1


def test_a_passing_failure_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.status = {0: 503, 1: 429}
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")


def test_nobody_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FastCNNError, match="cannot be reached"):
        data.download("inaturalist12k", tmp_path / "d", url="http://127.0.0.1:9/x.zip", pause=0)


@pytest.mark.parametrize("what", ["the archive, with what is in it,", "what is in the archive"])
def test_no_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    free = [HALF] if what.startswith("the archive") else [10 * HALF, HALF]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.pop(0)))
    with pytest.raises(FastCNNError, match=rf"{what} needs .* MiB free: free some space"):
        get(server, tmp_path / "d")
    assert not (tmp_path / "d" / "inaturalist_12K").exists()


def test_one_command_at_a_time(server: Server, tmp_path: Path) -> None:
    import filelock

    (tmp_path / "d").mkdir()
    with (
        filelock.FileLock(tmp_path / "d" / ".nature_12K.zip.lock"),
        pytest.raises(FastCNNError, match="another command is loading"),
    ):
        get(server, tmp_path / "d")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inaturalist"], 2, "no data set 'inaturalist'; did you mean 'inaturalist12k'?"),
        (["inaturalist12k", "--url", "file:///etc/passwd"], 2, "expected an address as https://"),
        (["inaturalist12k", "--url", "http://127.0.0.1:port/x"], 2, "--url"),
        (["inaturalist12k", "--url", "nature_12K.zip"], 2, "expected an address as https://"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    status = main(["data", "download", arguments[0], "d", *arguments[1:]])
    out, err = capsys.readouterr()
    assert (status, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_file_in_place_of_the_folder(server: Server, tmp_path: Path) -> None:
    (tmp_path / "d").write_text("mine")
    with pytest.raises(FastCNNError, match="cannot write"):
        get(server, tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "inaturalist_12K").write_text("mine")
    with pytest.raises(DataError, match="move it away"):
        get(server, tmp_path / "e")
    assert (tmp_path / "d").read_text() == (tmp_path / "e" / "inaturalist_12K").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ctrl_c_keeps_what_is_there(server: Server, tmp_path: Path) -> None:
    server.stalls, server.breaks = True, [HALF, 0]
    command = [sys.executable, "-m", "fastcnn.cli", "data", "download", "inaturalist12k", "d", "--url", server.url]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "d" / "nature_12K.zip.partial"
        until = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "fastcnn: error: interrupted; the part that was loaded is kept in d: run the same command to go on\n"
    assert REFERENCE.startswith(partial.read_bytes())
    get(server, tmp_path / "d")
    assert_whole(tmp_path / "d")


# Unpacking


def unpacked(packed: bytes, tmp_path: Path) -> Path:
    """Unpack an archive that lies in tmp_path/in/d already."""
    folder = tmp_path / "in" / "d"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nature_12K.zip").write_bytes(packed)
    return data.download("inaturalist12k", folder, console=Console(quiet=True))


def test_unpacking_starts_again_after_a_kill(tmp_path: Path) -> None:
    left = tmp_path / "in" / "d" / ".inaturalist_12K.unpacking" / "inaturalist_12K" / "train" / "Aves"
    left.mkdir(parents=True)
    (left / "0.jpg").write_bytes(b"half")
    unpacked(REFERENCE, tmp_path)
    assert_whole(tmp_path / "in" / "d")


def test_an_interrupted_unpacking_leaves_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unzip, "unpack", interrupt)
        with pytest.raises(data.DownloadInterrupted):
            unpacked(REFERENCE, tmp_path)
    assert set(content(tmp_path / "in" / "d")) == {"nature_12K.zip", ".nature_12K.zip.lock"}
    unpacked(REFERENCE, tmp_path)
    assert_whole(tmp_path / "in" / "d")


@pytest.mark.parametrize("top", ["inaturalist_12K", "", "a/b"])
def test_the_set_is_found_by_content(tmp_path: Path, top: str) -> None:
    files = {name.replace("inaturalist_12K", top).lstrip("/"): body for name, body in PHOTOS.items()}
    junk = {"__MACOSX/train/Aves/._0.jpg": b"", "README.txt": b"", f"{top}/train/.DS_Store".lstrip("/"): b""}
    unpacked(zipped({**junk, **files}), tmp_path)
    got = content(tmp_path / "in" / "d" / "inaturalist_12K")
    if not top:
        assert got.pop("README.txt") == b""
    assert got == {name.partition("/")[2]: body for name, body in PHOTOS.items()}


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not unpacked: it has no train/<class>/<photos>"):
        unpacked(zipped({"train/Aves/1.jpg": b"", "notes/x.txt": b""}), tmp_path)


@pytest.mark.parametrize("cut", [0, 1000, len(REFERENCE) - 1])
def test_a_cut_archive(tmp_path: Path, cut: int) -> None:
    with pytest.raises(DataError, match=r"nature_12K.zip is damaged \(.*\): delete it and run the same command again"):
        unpacked(REFERENCE[:cut], tmp_path)


def test_a_wrong_checksum(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is damaged"):
        unpacked(REFERENCE[:HALF] + bytes([REFERENCE[HALF] ^ 255]) + REFERENCE[HALF + 1 :], tmp_path)
    assert set(content(tmp_path / "in" / "d")) == {"nature_12K.zip", ".nature_12K.zip.lock"}


def _kind(kind: int) -> Edit:
    def edit(info: zipfile.ZipInfo) -> None:
        if info.filename.endswith("evil"):
            info.external_attr = (kind | 0o777) << 16

    return edit


def _patched(signature: bytes, offset: int, value: bytes) -> bytes:
    """Return an archive in whose directory (or local header) one field of the last member is overwritten."""
    name = b"inaturalist_12K/train/Aves/evil"
    packed = bytearray(zipped({**PHOTOS, name.decode(): b"x" * 1000}))
    fixed = 46 if signature == b"PK\x01\x02" else 30
    at = next(m.start() for m in re.finditer(signature, packed) if packed[m.start() + fixed :].startswith(name))
    packed[at + offset : at + offset + len(value)] = value
    return bytes(packed)


EVIL: dict[str, bytes] = {
    **{
        f"name {name!r}": zipped({**PHOTOS, name: b"evil"})
        for name in (
            "/evil",
            "//host/share/evil",
            "../evil",
            "../../evil",
            "inaturalist_12K/train/../../../../evil",
            "inaturalist_12K/train/.. /.. /evil",
            "..",
            ".",
            "...",
            "__MACOSX/../../evil",
            "..\\evil",
            "\\evil",
            "C:/evil",
            "C:evil",
            "inaturalist_12K/train/Aves/1.jpg:evil",
            "inaturalist_12K/train/CON",
            "inaturalist_12K/train/aux.jpg",
            "inaturalist_12K/train/com1 .txt",
            "inaturalist_12K/train/evil\n.jpg",
            "evil\x00.jpg",
        )
    },
    "link": zipped({**PHOTOS, "inaturalist_12K/evil": b"../../outside"}, edit=_kind(stat.S_IFLNK)),
    "link, then a file through it": zipped(
        {"inaturalist_12K/evil": b"../../outside", "inaturalist_12K/evil/x": b"evil", **PHOTOS},
        edit=_kind(stat.S_IFLNK),
    ),
    "device": zipped({**PHOTOS, "inaturalist_12K/evil": b""}, edit=_kind(stat.S_IFBLK)),
    "pipe": zipped({**PHOTOS, "inaturalist_12K/evil": b""}, edit=_kind(stat.S_IFIFO)),
    "file in place of a folder": zipped({"inaturalist_12K/train": b"evil", **PHOTOS}),
    "name twice": zipped({**PHOTOS, "inaturalist_12K/./train/Aves/1.jpg": b"evil"}),
    "bomb": zipped({**PHOTOS, "inaturalist_12K/train/Aves/bomb.jpg": bytes(2**27)}),
    "bomb that says it is small": _patched(b"PK\x01\x02", 24, struct.pack("<I", 10)),
    "more than there is": _patched(b"PK\x01\x02", 24, struct.pack("<I", 2000)),
    "packed beyond the end": _patched(b"PK\x01\x02", 20, struct.pack("<I", 2**30)),
    "terabytes": _patched(b"PK\x01\x02", 24, struct.pack("<I", 2**32 - 2)),
    "encrypted": _patched(b"PK\x01\x02", 8, b"\x01"),
    "LZMA": _patched(b"PK\x01\x02", 10, struct.pack("<H", zipfile.ZIP_LZMA)),
    "other name inside": _patched(b"PK\x03\x04", 30, b"../../"),
}


LIES = {"bomb that says it is small", "more than there is", "other name inside"}  # found out while unpacking


@pytest.mark.parametrize("what", EVIL)
def test_nothing_is_written_outside(tmp_path: Path, what: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(DataError, match="is damaged" if what in LIES else "is not unpacked"):
        unpacked(EVIL[what], tmp_path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "in", outside]
    assert list(outside.iterdir()) == []
    assert list((tmp_path / "in").iterdir()) == [tmp_path / "in" / "d"]
    assert set(content(tmp_path / "in" / "d")) == {"nature_12K.zip", ".nature_12K.zip.lock"}
    assert not Path("/evil").exists()


@pytest.mark.skipif(os.name != "posix", reason="makes links")
@pytest.mark.parametrize("name", [".inaturalist_12K.unpacking", "inaturalist_12K"])
def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "in" / "d").mkdir(parents=True)
    (tmp_path / "in" / "d" / name).symlink_to(outside)
    with pytest.raises(FastCNNError):
        unpacked(REFERENCE, tmp_path)
    assert list(outside.iterdir()) == []


def test_modes_are_not_taken_over(tmp_path: Path) -> None:
    def edit(info: zipfile.ZipInfo) -> None:
        info.external_attr = (stat.S_IFREG | stat.S_ISUID | 0o777) << 16

    photos = unpacked(zipped(PHOTOS, edit=edit), tmp_path)
    assert not (photos / "train" / "Aves" / "1.jpg").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


@given(st.text(st.sampled_from("./\\: \x00aC~") | st.characters(), max_size=12))
def test_whatever_the_name_the_path_stays_inside(name: str) -> None:
    try:
        path = unzip.safe_path(name)
    except unzip.Refused:
        return
    windows = PureWindowsPath(str(path))
    assert not path.is_absolute()
    assert not windows.drive
    assert not windows.root
    assert windows.parts == path.parts != ()
    assert not {"..", "."} & set(path.parts)
    root = Path("root").resolve()
    assert root in (root / path).resolve().parents


def test_the_uppermost_of_several_is_taken() -> None:
    names = [
        f"{top}/train/{c}/{i}.jpg" for top, n in (("b", 2), ("a/deep", 9), ("c", 3)) for c in "xy" for i in range(n)
    ]
    assert data.photo_root(names) == PurePosixPath("c")
