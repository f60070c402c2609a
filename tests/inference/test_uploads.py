"""Photos as clients send them: forms, JSON, gzip, with or without a type, and a clear answer to each that is wrong."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from fastcnn import cli, inference, predict_photos
from fastcnn.inference.artefact import Artefact
from tests.inference.conftest import JPEG, Served, bad_photos

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

from fastapi import Request

from fastcnn.inference.batcher import Limits
from fastcnn.inference.request_body import read_upload
from fastcnn.inference.uploads import Refusal, Upload

PHOTO, OTHER = b"\xff\xd8\xff" + b"one" * 50, b"\xff\xd8\xff" + b"\r\n--tw\r\r\n--" * 20
FORM = {"Content-Type": "multipart/form-data; boundary=two"}
AS_JSON = {"Content-Type": "application/json; charset=utf-8"}
GZIP = {"Content-Encoding": "gzip"}
URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}
LIMITS = Limits(upload=1000, queue=5)


def part(content: bytes, head: str = 'name="photo"; filename="a.jpg"', kind: str = "image/jpeg") -> bytes:
    """Return a part of a form with a file, or with `head` another field."""
    lines = f"--two\r\nContent-Disposition: form-data; {head}\r\n" + (f"Content-Type: {kind}\r\n" if kind else "")
    return lines.encode() + b"\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--two--\r\n"


def as_json(**fields: Any) -> bytes:
    def text(value: Any) -> Any:
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value

    return json.dumps({k: [text(v) for v in f] if isinstance(f, list) else text(f) for k, f in fields.items()}).encode()


def read(
    body: bytes, headers: dict[str, str], *, limits: Limits = LIMITS, chunk: int = 65536, query: str = ""
) -> Upload:
    """Return what is read of a request whose body arrives in chunks, without its length."""
    chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]

    async def receive() -> dict[str, Any]:
        content = chunks.pop(0)
        return {"type": "http.request", "body": content, "more_body": bool(chunks)}

    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "headers": encoded, "query_string": query.encode()}
    return asyncio.run(read_upload(Request(scope, receive), limits))


def told(upload: Upload) -> list[bytes | str]:
    """Return the photos, or the codes of the errors."""
    return [photo if isinstance(photo, bytes) else photo.code for photo in upload.photos]


@pytest.mark.parametrize("chunk", [1, 7, 65536])
@pytest.mark.parametrize("packed", [False, True])
def test_a_form_gives_its_photos_in_their_order(chunk: int, packed: bool) -> None:
    body = form(
        part(PHOTO),
        part(b"", 'name="camera"; filename=""', "application/octet-stream"),  # nothing chosen
        part(OTHER, 'name="a"; filename="\xe9 \\"b\\".jpg"', ""),  # by its content
        part(b"3", 'name="top_k"', ""),
        part(PHOTO, 'name="blob"', ""),  # no name of a file
        part(b"<p>", 'name="page"; filename="a.html"', "text/html; charset=utf-8"),
    )
    upload = read(gzip.compress(body) if packed else body, FORM | (GZIP if packed else {}), chunk=chunk)
    assert told(upload) == [PHOTO, OTHER, PHOTO, "unsupported_media_type"]
    assert (upload.several, upload.top_k) == (True, 3)


def test_one_photo_is_no_list() -> None:
    for body, headers in (
        (form(part(PHOTO)), FORM),
        (as_json(photo=PHOTO), AS_JSON),
        (PHOTO, JPEG),
        (PHOTO, {"Content-Type": "application/octet-stream"}),
        (PHOTO, {}),  # by its content, like the next ones
        (PHOTO, URLENCODED),  # as curl --data-binary has it
        (as_json(photo=PHOTO), {}),
        (as_json(photo=PHOTO), URLENCODED),
    ):
        for packed in (False, True):
            upload = read(gzip.compress(body) if packed else body, headers | (GZIP if packed else {}))
            assert (upload.photos, upload.several) == ([PHOTO], False)
    assert read(as_json(photos=[PHOTO]), AS_JSON).several  # a list was asked for


def test_base64_as_people_have_it() -> None:
    photo = bytes(range(256))  # all letters of the alphabet
    texts = {
        "data": "data:image/jpeg;base64," + base64.b64encode(photo).decode(),
        "wrapped": base64.encodebytes(photo).decode(),
        "for URLs": base64.urlsafe_b64encode(photo).decode(),
        "no letters": "not base64!",
        "cut": base64.b64encode(photo).decode()[:-1],
        "plain": "data:image/jpeg,abc",
    }
    upload = read(as_json(photos=[*texts.values()], top_k=2), AS_JSON, limits=Limits())
    assert told(upload) == [photo] * 3 + ["invalid_base64"] * 3
    assert upload.top_k == 2


BASE64 = base64.b64encode(PHOTO).decode()


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (PHOTO, {"Content-Type": "text/plain"}, 415, "expected a photo (image/* or application/octet-stream), multi"),
        (b"photo=1", URLENCODED, 415, "got application/x-www-form-urlencoded"),
        (PHOTO, JPEG | {"Content-Encoding": "br"}, 415, "expected Content-Encoding gzip or none, got br"),
        (PHOTO, JPEG | GZIP, 422, "the body is not in gzip as its header says"),
        (gzip.compress(PHOTO, mtime=0)[:-4], JPEG | GZIP, 422, "the body in gzip ends early"),
        (gzip.compress(PHOTO, mtime=0) + b"more", JPEG | GZIP, 422, "the body is not in gzip as its header says"),
        (b"", JPEG | GZIP, 422, "the body in gzip ends early"),
        (PHOTO * 9, JPEG, 413, "more than 1,000 bytes"),
        (PHOTO * 9, {}, 413, "more than 1,000 bytes"),
        (PHOTO * 99, {}, 413, "more than 2,000 bytes"),
        (gzip.compress(PHOTO * 9, mtime=0), JPEG | GZIP, 413, "more than 1,000 bytes"),
        (PHOTO, JPEG | {"Content-Length": "1001"}, 413, "more than 1,000 bytes"),
        (form(part(PHOTO)), {"Content-Type": "multipart/form-data"}, 422, "no boundary; leave that header to"),
        (form(part(PHOTO)), {"Content-Type": f"multipart/form-data; boundary={'two' * 99}"}, 422, "Boundary length"),
        (form(part(PHOTO)), {"Content-Type": "multipart/form-data; boundary=other"}, 422, "the form cannot be read"),
        (part(PHOTO) + part(OTHER), FORM, 422, "the form cannot be read: it ends early"),
        (form(part(PHOTO))[:-40], FORM, 422, "the form cannot be read: it ends early"),
        (form(b"--two\r\n" + b"x" * 9000), FORM, 413, "more than 2,000 bytes"),
        (b"--two--\r\n", FORM, 422, "no photo in the form: send one as a file, as curl -F photo=@photo.jpg does"),
        (form(part(b"a.jpg", 'name="photo"', "")), FORM, 422, "the form's field 'photo' is neither a file nor top_k"),
        (form(part(b"2", 'name="topk"', "")), FORM, 422, "did you mean 'top_k'?"),
        (form(part(b"-1", 'name="top_k"', ""), part(PHOTO)), FORM, 422, "top_k: expected a whole number from 1"),
        (form(*[part(b"1", 'name="top-k"', "")] * 2), FORM, 422, "top_k: the parameter is given twice"),
        (form(*[part(b"")] * 6), FORM, 413, "more than 5 photos in a request: send them in several"),
        (form(part(PHOTO), part(b"x" * 2000)), FORM, 413, "more than 2,000 bytes"),
        (b"{", AS_JSON, 422, "Invalid JSON: EOF while parsing"),
        (b"\xff", AS_JSON, 422, "Invalid JSON"),
        (b"[" * 1500, AS_JSON, 422, "Invalid JSON: recursion limit exceeded"),
        (b"[1]", AS_JSON, 422, "Input should be an object"),
        (b"{}", AS_JSON, 422, "expected either photo or photos, in base64"),
        (as_json(photo=BASE64, photos=[BASE64]), AS_JSON, 422, "expected either photo or photos, in base64"),
        (as_json(photos=[]), AS_JSON, 422, "photos: List should have at least 1 item"),
        (as_json(photos=[3]), AS_JSON, 422, "photos.0: Input should be a valid string"),
        (as_json(photo=BASE64, top_k=0), AS_JSON, 422, "top_k: Input should be greater than or equal to 1"),
        (as_json(foto=BASE64), AS_JSON, 422, "no field 'foto'; did you mean 'photo'?"),
        (as_json(image=BASE64), AS_JSON, 422, "no field 'image'; expected photo, photos, top_k"),
        (as_json(photos=[BASE64[:8]] * 6), AS_JSON, 413, "more than 5 photos in a request: send them in several"),
        (as_json(photo=PHOTO * 10), AS_JSON, 413, "more than 2,000 bytes"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, headers: dict[str, str], status: int, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        read(body, headers)
    assert refused.value.status_code == status
    assert message in refused.value.detail


def test_top_k_is_given_once() -> None:
    with pytest.raises(Refusal, match="given twice"):
        read(form(part(b"1", 'name="top-k"', ""), part(PHOTO)), FORM, query="top_k=1")
    with pytest.raises(Refusal, match="given twice"):
        read(as_json(photo=PHOTO, **{"top-k": 1}), AS_JSON, query="top-k=1")


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        ([300, 1001, 700], [True, False, True]),  # it is not counted
        ([300, 701, 600], [True, False, True]),
        ([1000, 1], [True, False]),
        ([500, 500], [True, True]),
    ],
)
def test_a_photo_too_large_has_its_error(sizes: list[int], taken: list[bool]) -> None:
    """The others are taken, and those that have room are together at most the limit."""
    photos = [b"\xff\xd8\xff".ljust(size, b"x") for size in sizes]
    found = [photo if fits else "too_large" for photo, fits in zip(photos, taken, strict=True)]
    limits = Limits(upload=1000)
    for body, headers in ((form(*map(part, photos)), FORM), (as_json(photos=photos), AS_JSON)):
        if len(body) <= 2000:
            assert told(read(body, headers, limits=limits)) == found
        else:
            with pytest.raises(Refusal, match="more than 2,000 bytes"):
                read(body, headers, limits=limits)


@hypothesis.given(photos=st.lists(st.binary(max_size=90).map(PHOTO.__add__), min_size=1, max_size=3), data=st.data())
@hypothesis.settings(max_examples=25)
def test_any_photo_in_any_chunks(photos: list[bytes], data: st.DataObject) -> None:
    boundary = "b" * data.draw(st.integers(30, 70))
    body = form(*map(part, photos)).replace(b"--two", b"--" + boundary.encode())
    hypothesis.assume(not any(b"--" in photo for photo in photos))
    headers = {"Content-Type": f'multipart/form-data; boundary="{boundary}"'}
    for packed in (False, True):
        sent, more = (gzip.compress(body), GZIP) if packed else (body, {})
        assert read(sent, headers | more, chunk=data.draw(st.integers(1, 300))).photos == photos


def test_gzip_in_several_members_and_pieces() -> None:
    photo = PHOTO + b"\0" * 300_000
    body = gzip.compress(photo[:10]) + gzip.compress(b"") + gzip.compress(photo[10:])
    for chunk in (1, 1000, len(body)):
        assert read(body, JPEG | GZIP, limits=Limits(), chunk=chunk).photos == [photo]


@pytest.mark.parametrize("headers", [JPEG, {}, AS_JSON, FORM])
def test_a_gzip_bomb_is_not_unpacked(headers: dict[str, str]) -> None:
    bomb = gzip.compress(b"\0" * 8_000_000)
    content = form(part(b"")).partition(b"\r\n--two--")[0] if headers == FORM else b""
    tracemalloc.start()
    try:
        with pytest.raises(Refusal) as refused:
            read(gzip.compress(content) + bomb, headers | GZIP, limits=Limits(upload=100_000))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.status_code == 413
    assert most < 2_000_000


def test_without_the_extra(
    model: Artefact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("serve", "request_body", "uploads"):
        monkeypatch.delitem(sys.modules, f"fastcnn.inference.{name}", raising=False)
        monkeypatch.delattr(inference, name, raising=False)
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    status = cli.main(["serve", str(model.path)])
    assert status == 1
    assert "serve needs python_multipart: pip install 'fastcnn[serve]'" in capsys.readouterr().err


# By real clients, from the service.


@pytest.fixture(scope="module")
def right(model: Artefact, photos: Path) -> dict[Path, list[float]]:
    """Probabilities of some photos, by `predict`."""
    paths = sorted(photos.rglob("*.jpg"))[:12]
    found = predict_photos(model, paths)
    return {path: [float(p) for p in one.probabilities] for path, one in zip(paths, found, strict=True)}


def assert_right(answer: Any, probabilities: list[float], model: Artefact) -> None:
    found = {one["class"]: one["probability"] for one in answer["predictions"]}
    assert [found[name] for name in model.classes] == probabilities  # to the bit
    assert answer["model"] == model.sha256


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(served: Served, model: Artefact, right: dict[Path, list[float]], tmp_path: Path) -> None:
    first, second = list(right)[:2]
    page = tmp_path / "page.html"
    page.write_text("<p>no photo</p>")

    def curl(*arguments: str) -> Any:
        command = ["curl", "-sS", *arguments, f"http://{served.address}/predict"]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    assert_right(curl("-F", f"photo=@{first}"), right[first], model)
    assert_right(curl("--data-binary", f"@{first}"), right[first], model)
    one, html, two = curl("-F", f"a=@{first}", "-F", f"b=@{page}", "-F", f"c=@{second};type=image/png")
    assert_right(one, right[first], model)
    assert_right(two, right[second], model)
    assert html["error"]["code"] == "unsupported_media_type"
    assert len(curl("-F", f"photo=@{first}", "-F", "top_k=1")["predictions"]) == 1


def test_requests(served: Served, model: Artefact, right: dict[Path, list[float]]) -> None:
    requests = pytest.importorskip("requests")
    address = f"http://{served.address}/predict"
    first, second = list(right)[:2]
    with first.open("rb") as file:
        assert_right(requests.post(address, files={"file": file}).json(), right[first], model)
    files = [("photos", path.read_bytes()) for path in (second, first)]  # neither names nor types
    for answer, path in zip(requests.post(address, files=files).json(), (second, first), strict=True):
        assert_right(answer, right[path], model)
    encoded = base64.b64encode(first.read_bytes()).decode()
    assert_right(requests.post(address, json={"photo": encoded}).json(), right[first], model)
    refused = requests.post(address, files={"file": b"no photo"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_an_image")


Way = Callable[[list[bytes]], tuple[bytes, dict[str, str]]]
ONE: list[Way] = [
    lambda photos: (photos[0], JPEG),
    lambda photos: (photos[0], {}),
    lambda photos: (gzip.compress(photos[0]), JPEG | GZIP),
    lambda photos: (form(part(photos[0])), FORM),
    lambda photos: (as_json(photo=photos[0]), AS_JSON),
]
SEVERAL: list[Way] = [
    lambda photos: (form(*map(part, photos)), FORM),
    lambda photos: (gzip.compress(form(*map(part, photos))), FORM | GZIP),
    lambda photos: (as_json(photos=photos), AS_JSON),
]


@pytest.mark.parametrize("clients", [40, pytest.param(200, marks=pytest.mark.long)])
def test_clients_at_once(served: Served, model: Artefact, right: dict[Path, list[float]], clients: int) -> None:
    """In all forms; a tenth of them send something bad."""
    paths = list(right)
    bad = bad_photos(paths[0].read_bytes())
    together = threading.Barrier(clients)

    def ask(number: int) -> str:
        several = number % 3 == 0
        way = SEVERAL[number // 3 % 3] if several else ONE[number % 5]
        wanted = [paths[(number + i) % len(paths)] for i in range(3 if several else 1)]
        content, status, code = [path.read_bytes() for path in wanted], 200, ""
        if number % 10 == 0:
            content[-1], status, code = bad[number // 10 % len(bad)]
            wanted.pop()
        body, headers = way(content)
        together.wait()
        while (got := served.ask("/predict", body, headers))[0] == 429:
            time.sleep(int(got[2]["Retry-After"]))
        answers = got[1] if several else [got[1]]
        assert got[0] == (200 if several else status), answers
        if code:
            assert answers.pop()["error"]["code"] == code
        for answer, path in zip(answers, wanted, strict=True):
            assert_right(answer, right[path], model)
        return "refused" if code else "right"

    with ThreadPoolExecutor(clients) as pool:
        assert Counter(pool.map(ask, range(clients))) == {"right": clients * 9 // 10, "refused": clients // 10}
