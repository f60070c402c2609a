"""The service: a right answer to every photo, a clear one to everything else, and none lost."""

from __future__ import annotations

import http.client
import io
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcnn import cli, predict_photos
from fastcnn.inference.artefact import Artefact
from fastcnn.inference.classifier import Classifier
from tests.inference.conftest import CORS_ORIGIN, JPEG, Served, bad_photos, start

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

from fastcnn.inference.batcher import Batcher, BatcherClosed, Limits, Metrics


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
        ("/predict", b"x" * 5_000_000, "text/plain", 415, "unsupported_media_type"),  # read to its end
        ("/predict?top_k=0", b"x" * 5_000_000, "image/jpeg", 422, "invalid_request"),
        ("/nothing", b"x" * 5_000_000, "image/jpeg", 404, "not_found"),
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


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/nothing"])
def test_head_is_get_without_a_body(served: Served, path: str) -> None:
    status, body, headers = served.ask(path, method="HEAD")
    same, _, expected = served.ask(path)
    assert (status, body, headers["content-type"]) == (same, "", expected["content-type"])
    assert path == "/metrics" or headers["content-length"] == expected["content-length"]


def test_head_of_what_is_only_posted(served: Served) -> None:
    status, body, headers = served.ask("/predict", method="HEAD")
    assert (status, body, headers["allow"]) == (405, "", "POST")


def test_pages_elsewhere(served: Served) -> None:
    """Only those of --cors-origin read answers and errors; without the option nobody's do: no header is sent."""
    for origin, allowed in ((CORS_ORIGIN, CORS_ORIGIN), ("http://other.example", None)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-y"}
        status, _, headers = served.ask("/predict", method="OPTIONS", headers=asked)
        assert (status, headers["access-control-allow-origin"]) == (200 if allowed else 400, allowed)
        status, _, headers = served.ask("/predict", b"no photo", JPEG | {"Origin": origin})
        assert (status, headers["access-control-allow-origin"]) == (422, allowed)


def test_what_was_accepted_before_sigterm_is_answered(model: Artefact, photos: Path) -> None:
    served = start(model, "--window", "1500", "--max-batch", "64")
    photo = next(photos.rglob("*.jpg")).read_bytes()
    assert not [name for name in served.ask("/healthz", headers={"Origin": CORS_ORIGIN})[2] if "access" in name]
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
    first = batcher.submit([photo])
    entered.wait()
    waiting = batcher.submit([photo])
    with pytest.raises(queue.Full):
        batcher.submit([photo] * 2)  # all or none of a request's
    waiting += batcher.submit([photo])
    with pytest.raises(queue.Full):
        batcher.submit([photo])
    go.set()
    batcher.close()
    assert all(future.result()[0].ok for future in [*first, *waiting])


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
    [early] = batcher.submit([photo])
    go.set()
    assert isinstance(early.exception(), BatcherClosed)
    batcher.close()  # though the queue may be full
    assert not batcher.ready
    with pytest.raises(BatcherClosed):
        batcher.submit([photo])


def test_an_error_costs_its_batch_alone(model: Artefact, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Classifier.__call__

    def fail(self: Classifier, sources: Any) -> Any:
        if sources == [b"planted"]:
            raise RuntimeError("planted")
        return call(self, sources)

    monkeypatch.setattr(Classifier, "__call__", fail)
    batcher = Batcher(model, Limits(batch=1), Metrics())
    broken, whole = batcher.submit([b"planted", next(photos.rglob("*.jpg")).read_bytes()])
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
        (["--cors-origin", "example.org"], 2, "--cors-origin: expected an origin as https://example.org:8443, got"),
        (["--cors-origin", "https://example.org/page"], 2, "--cors-origin: expected an origin"),
        (["--port", "70000"], 2, "70000 is not in the range"),
        (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1"),
    ],
)
def test_wrong_options(
    model: Artefact, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    with warnings.catch_warnings():
        status = cli.main(["serve", str(model.path), *options])
    out, err = capsys.readouterr()
    assert (status, out) == (code, "")
    assert message in err


def test_a_port_in_use(served: Served, model: Artefact, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.address.rpartition(":")[2]
    test_wrong_options(model, capsys, ["--port", port], 1, f"port {port}: Address already in use")


@pytest.mark.long
def test_its_description_holds(model: Artefact) -> None:
    """Schemathesis sends what the OpenAPI description allows, and what it does not, and what is not HTTP either."""
    pytest.importorskip("schemathesis")
    served = start(model, "--max-upload", "300KB")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://{served.address}/openapi.json"]
    checks = [
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
    ]
    done = subprocess.run([*command, *checks, "--no-color"], capture_output=True, text=True, check=False)
    served.process.terminate()
    _, err = served.process.communicate(timeout=60)
    assert done.returncode == 0, done.stdout
    assert set(err.splitlines()) <= {"WARNING:  Invalid HTTP request received."}
