"""The service: a right answer to every photo, a clear one to everything else, and none lost."""

from __future__ import annotations

import http.client
import io
import json
import queue
import re
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from fastcnn import cli, predict_photos
from fastcnn.inference import artefact
from fastcnn.inference.artefact import Artefact
from fastcnn.inference.classifier import Classifier

pytest.importorskip("fastapi")

from fastcnn.inference.batcher import Batcher, BatcherClosed, Limits, Metrics

JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def model(exports: Callable[[str], Path]) -> Artefact:
    return artefact.open(exports("torchscript"))


class Served(NamedTuple):
    """A service in a process of its own."""

    process: subprocess.Popen[str]
    address: str

    def ask(self, path: str, body: bytes | None = None, headers: dict[str, str] = JPEG) -> tuple[int, Any, Any]:
        """Return status, body (JSON taken apart) and headers of the answer."""
        connection = http.client.HTTPConnection(self.address, timeout=120)
        try:
            connection.request("GET" if body is None else "POST", path, body, {} if body is None else headers)
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers.get("content-type", "")
            return (
                answer.status,
                json.loads(content) if kind == "application/json" else content.decode(),
                answer.headers,
            )
        finally:
            connection.close()

    def figure(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.ask("/metrics")[1], re.MULTILINE)
        return sum(map(float, lines))


def start(model: Artefact, *options: str) -> Served:
    command = [sys.executable, "-m", "fastcnn.cli", "serve", str(model.path), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    found = re.search(r"is served on (http://\S+)", process.stdout.readline())
    assert found, process.communicate()
    served = Served(process, urlsplit(found[1]).netloc)
    while served.ask("/readyz")[0] == 503:
        time.sleep(0.1)
    return served


@pytest.fixture(scope="module")
def served(model: Artefact) -> Iterator[Served]:
    served = start(model, "--max-upload", "300KB", "--window", "20")
    yield served
    served.process.terminate()
    out, err = served.process.communicate(timeout=60)
    assert served.process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert (out, err) == ("", "")


def bomb() -> bytes:
    """Return a PNG whose header claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def bad_photos(photo: bytes) -> list[tuple[bytes, int, str]]:
    """Return what is refused, with the status and the code that it gets."""
    return [
        (b"<html>no photo</html>", 422, "not_an_image"),
        (photo[: len(photo) // 2], 422, "truncated"),
        (bomb(), 413, "too_large"),
        (photo + b"\0" * 400_000, 413, "too_large"),
        (b"", 422, "empty"),
    ]


def test_every_answer_of_500_under_load(served: Served, model: Artefact, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))[:45]
    predicted = {
        path: [float(p) for p in found.probabilities]
        for path, found in zip(paths, predict_photos(model, paths), strict=True)
    }
    bad = bad_photos(paths[0].read_bytes())
    seconds = []

    def ask(number: int) -> str:
        path = paths[number % len(paths)]
        expected = bad[number // 10 % len(bad)] if number % 10 == 0 else None
        start = time.perf_counter()
        status, answer, _ = served.ask("/predict", expected[0] if expected else path.read_bytes())
        seconds.append(time.perf_counter() - start)
        if expected:
            assert (status, answer["error"]["code"]) == expected[1:], answer
            assert answer["error"]["message"]
            return "refused"
        assert status == 200, answer
        found = {one["class"]: one["probability"] for one in answer["predictions"]}
        assert [found[name] for name in model.classes] == predicted[path]  # to the bit
        assert answer["model"] == model.sha256
        return "right"

    with ThreadPoolExecutor(16) as pool:
        assert Counter(pool.map(ask, range(500))) == {"right": 450, "refused": 50}
    batches, in_them = served.figure("fastcnn_batch_photos_count"), served.figure("fastcnn_batch_photos_sum")
    assert in_them / batches > 1
    assert served.figure("fastcnn_requests_total") >= 500
    seconds.sort()
    print(f"median {statistics.median(seconds):.3f} s, p99 {seconds[-6]:.3f} s, {in_them / batches:.1f} photos a batch")


def test_the_most_probable_classes_come_first(served: Served, model: Artefact, photos: Path) -> None:
    photo = next(photos.rglob("*.jpg")).read_bytes()
    _, answer, _ = served.ask("/predict?top_k=2", photo)
    first, second = answer["predictions"]
    assert first["probability"] >= second["probability"]
    assert len(served.ask("/predict", photo, {})[1]["predictions"]) == len(model.classes)


def test_other_formats_are_taken(served: Served, photos: Path) -> None:
    image = Image.open(next(photos.rglob("*.jpg")))
    for name in ("PNG", "WEBP", "BMP", "TIFF"):
        file = io.BytesIO()
        image.resize((90, 60)).save(file, name)
        assert served.ask("/predict", file.getvalue(), {"Content-Type": f"image/{name.lower()}"})[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "code"),
    [
        ("/predict", b"photo=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        ("/predict?top_k=0", b"x", "image/jpeg", 422, "invalid_request"),
        ("/predict?top_k=many", b"x", "image/jpeg", 422, "invalid_request"),
        ("/predict?top-k=0", b"x", "image/jpeg", 422, "invalid_request"),
        ("/predict?top_k=1&top-k=2", b"x", "image/jpeg", 422, "invalid_request"),
        ("/predict", None, "", 405, "method_not_allowed"),
        ("/nothing", None, "", 404, "not_found"),
    ],
)
def test_errors_are_json(served: Served, path: str, body: bytes | None, kind: str, status: int, code: str) -> None:
    found, answer, _ = served.ask(path, body, {"Content-Type": kind})
    assert (found, answer["error"]["code"]) == (status, code)


def test_the_words_of_a_query(served: Served, photos: Path) -> None:
    photo = next(photos.rglob("*.jpg")).read_bytes()
    for name in ("top_k", "top-k"):
        assert len(served.ask(f"/predict?{name}=2", photo)[1]["predictions"]) == 2
    status, answer, _ = served.ask("/predict?topk=2", photo)
    assert (status, answer["error"]["message"]) == (422, "no parameter 'topk'; did you mean 'top_k'?")


def test_an_upload_without_a_length_is_limited(served: Served) -> None:
    connection = http.client.HTTPConnection(served.address, timeout=60)
    chunks = (b"\xff\xd8" + b"x" * 50_000 for _ in range(20))
    connection.request("POST", "/predict", chunks, JPEG, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_health_readiness_and_pages(served: Served, model: Artefact) -> None:
    assert served.ask("/healthz")[:2] == (200, {"status": "alive"})
    assert served.ask("/readyz")[:2] == (200, {"status": "ready", "model": model.sha256})
    status, page, headers = served.ask("/")
    assert status == 200
    assert "300000" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    for text in (page, served.ask("/docs")[1]):
        assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", text)  # nothing is loaded from elsewhere
    answers = served.ask("/openapi.json")[1]["paths"]["/predict"]["post"]["responses"]
    assert set(answers) == {"200", "400", "408", "413", "415", "422", "429", "503"}


def test_what_was_accepted_before_sigterm_is_answered(model: Artefact, photos: Path) -> None:
    served = start(model, "--window", "1500", "--max-batch", "64")
    photo = next(photos.rglob("*.jpg")).read_bytes()
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(served.ask, "/predict", photo) for _ in range(20)]
        while served.figure("fastcnn_requests_in_progress") < 20:
            time.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        assert [answer.result()[0] for answer in answers] == [200] * 20
    _, err = served.process.communicate(timeout=60)
    assert (served.process.returncode, err) in [(-signal.SIGTERM, ""), (128 + signal.SIGTERM, "")]


def test_a_full_queue_refuses(model: Artefact, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go = threading.Event(), threading.Event()
    call = Classifier.__call__

    photo = next(photos.rglob("*.jpg")).read_bytes()

    def wait(self: Classifier, sources: Any) -> Any:
        if sources == [photo]:
            entered.set()
            go.wait()
        return call(self, sources)

    monkeypatch.setattr(Classifier, "__call__", wait)
    batcher = Batcher(model, Limits(queue=2, batch=1, window=0), Metrics())
    first = batcher.submit(photo)
    entered.wait()
    waiting = [batcher.submit(photo) for _ in range(2)]
    with pytest.raises(queue.Full):
        batcher.submit(photo)
    go.set()
    batcher.close()
    assert all(future.result()[0].ok for future in [first, *waiting])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_decoder_that_cannot_be_used(
    model: Artefact, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def fail(self: Classifier) -> None:
        go.wait()
        raise RuntimeError("planted")

    monkeypatch.setattr(Classifier, "warm_up", fail)
    photo = next(photos.rglob("*.jpg")).read_bytes()
    batcher = Batcher(model, Limits(queue=1), Metrics())
    early = batcher.submit(photo)
    go.set()
    assert isinstance(early.exception(), BatcherClosed)
    batcher.close()  # though the queue may be full
    assert not batcher.ready
    with pytest.raises(BatcherClosed):
        batcher.submit(photo)


def test_an_error_costs_its_batch_alone(model: Artefact, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Classifier.__call__

    def fail(self: Classifier, sources: Any) -> Any:
        if sources == [b"planted"]:
            raise RuntimeError("planted")
        return call(self, sources)

    monkeypatch.setattr(Classifier, "__call__", fail)
    batcher = Batcher(model, Limits(batch=1), Metrics())
    broken, whole = batcher.submit(b"planted"), batcher.submit(next(photos.rglob("*.jpg")).read_bytes())
    assert isinstance(broken.exception(), RuntimeError)
    assert whole.result()[0].ok
    batcher.close()
    assert not batcher.ready


def test_what_is_said_of_a_photo_does_not_depend_on_its_neighbours(model: Artefact, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))[:9]
    with Classifier(model) as classify:
        together = classify(paths)
        for path, (_, probabilities) in zip(paths, together, strict=True):
            np.testing.assert_array_equal(classify([path.read_bytes()])[0][1], probabilities)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-upload", "big"], 2, "--max-upload: expected bytes"),
        (["--port", "70000"], 2, "70000 is not in the range"),
        (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1"),
    ],
)
def test_wrong_options(
    model: Artefact, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        cli.main(["serve", str(model.path), *options])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (code, "")
    assert message in err


def test_a_port_in_use(served: Served, model: Artefact, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.address.rpartition(":")[2]
    test_wrong_options(model, capsys, ["--port", port], 1, f"port {port}: Address already in use")


@pytest.mark.long
def test_its_description_holds(served: Served) -> None:
    """Schemathesis sends what the OpenAPI description allows, and what it does not."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://{served.address}/openapi.json"]
    checks = [
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
    ]
    done = subprocess.run([*command, *checks, "--no-color"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
