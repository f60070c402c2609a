"""A service in a process of its own, which the tests of this folder share."""

from __future__ import annotations

import http.client
import json
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from fastcnn.inference import artefact
from fastcnn.inference.artefact import Artefact

JPEG = {"Content-Type": "image/jpeg"}
CORS_ORIGIN = "http://pages.example"


@pytest.fixture(scope="package")
def model(exports: Callable[[str], Path]) -> Artefact:
    return artefact.open(exports("torchscript"))


class Served(NamedTuple):
    """A service in a process of its own."""

    process: subprocess.Popen[str]
    address: str

    def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, Any, Any]:
        """Return status, body (JSON taken apart) and headers of the answer. A body is a JPEG unless `headers` say."""
        if headers is None:
            headers = {} if body is None else JPEG
        method = method or ("GET" if body is None else "POST")
        connection = http.client.HTTPConnection(self.address, timeout=120)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers.get("content-type", "")
            return (
                answer.status,
                json.loads(content) if kind == "application/json" and content else content.decode(),
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


@pytest.fixture(scope="package")
def served(model: Artefact) -> Iterator[Served]:
    served = start(model, "--max-upload", "300KB", "--window", "20", "--cors-origin", CORS_ORIGIN)
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
