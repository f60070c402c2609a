"""Download over HTTP that continues where an earlier attempt or an earlier command stopped.

Until it is whole the file is called NAME.partial. NAME.partial.json beside it has its full length and its ETag or
Last-Modified, so that the parts of two different files are never joined.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastcnn.errors import FastCNNError, UsageError, first_line
from fastcnn.storage.files import check_space, read_json
from fastcnn.system.console import Console

CHUNK = 2**20  # bytes
TIMEOUT = 30.0  # seconds to wait for a connection, and for the next bytes
PAUSE = 1.0  # seconds before the first retry, doubled before each further one
RETRIES = 4  # attempts in a row that bring no new bytes
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may pass


class Broken(Exception):
    """The connection failed in a way that may pass."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The server's description of the file whose beginning a partial file is."""

    size: int
    """Bytes of the whole file."""
    validator: str
    """Its ETag, else its Last-Modified; "" where the download cannot be continued."""


def fetch(url: str, path: Path, console: Console, *, timeout: float = TIMEOUT, pause: float = PAUSE) -> None:
    """Download `url` to `path`, retrying when the connection breaks; `timeout` and `pause` are seconds.

    Raises FastCNNError where the server lacks the file or keeps failing or the disk has no room, UsageError for a
    string that is no address.
    """
    host = check_url(url)
    partial = path.with_name(f"{path.name}.partial")
    furthest, failures = _size(partial), 0
    while True:
        try:
            _load(url, partial, console, timeout)
            break
        except Broken as error:
            # Only new bytes count: a server without ranges that always breaks must not be asked for ever.
            failures = 1 if _size(partial) > furthest else failures + 1
            furthest = max(furthest, _size(partial))
            if failures > RETRIES:
                raise FastCNNError(
                    f"{host}: {error}, {failures} times in a row; run the same command to go on, or give a mirror with "
                    "--url"
                ) from None
            wait = pause * 2 ** (failures - 1)
            console.line(f"{host}: {error}; trying again in {wait:g} s")
            time.sleep(wait)
    partial.replace(path)
    _notes(partial).unlink(missing_ok=True)


def check_url(url: str) -> str:
    """Return the host of an http or https address; UsageError for anything else."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.hostname
    raise UsageError(f"--url: expected an address as https://host/archive.zip, got '{url}'")


def _load(url: str, partial: Path, console: Console, timeout: float) -> None:
    """Download the rest of the partial file in one connection."""
    known = _read_notes(partial)
    have = _size(partial) if known and known.validator else 0
    if known and have == known.size:
        return
    with _open(url, have, known, timeout, partial) as response:
        going_on = response.status == 206 and known is not None
        total = known.size if going_on and known else int(response.headers["Content-Length"])
        # Photos do not compress: unpacked they take about as much space again.
        check_space(partial.parent, 2 * total - _size(partial), "the archive, with what is in it,")
        if not going_on:
            identity = Identity(size=total, validator=_validator(response))
            if _size(partial):
                console.line(f"{_why_again(known, identity)}: starting from the beginning")
            partial.unlink(missing_ok=True)
            _notes(partial).write_text(json.dumps(asdict(identity)), encoding="utf-8")
        start = _size(partial)
        if start:
            console.line(f"going on after {start / 2**20:,.1f} of {total / 2**20:,.1f} MiB")
        with partial.open("ab") as file, console.progress("downloading", "MiB", start=start // 2**20) as progress:
            done = start
            while chunk := _read(response, timeout):
                file.write(chunk)
                done += len(chunk)
                progress(done // 2**20, total // 2**20)
    if done != total:
        raise Broken(f"the connection broke after {done / 2**20:,.1f} of {total / 2**20:,.1f} MiB")


def _why_again(known: Identity | None, identity: Identity) -> str:
    if known is None or not known.validator:
        return "the partial file may be of another archive"
    return "the archive has changed" if identity != known else "the server cannot go on in the middle"


def _open(url: str, have: int, known: Identity | None, timeout: float, partial: Path) -> Any:
    """Return the server's response: 206 with exactly the missing rest, or 200 with the whole file."""
    request = urllib.request.Request(url, headers={"User-Agent": "fastcnn"})
    if have and known:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known.validator)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the partial file is longer than the file: it is the beginning of another one
            _notes(partial).unlink(missing_ok=True)
        if error.code == 416 or error.code in TRANSIENT:
            raise Broken(f"the server answers {error.code} {error.reason}") from None
        where = f"{request.host}{urlsplit(url).path}"
        raise FastCNNError(
            f"{error.code} {error.reason}: {where} cannot be downloaded; give a mirror with --url"
        ) from None
    except (http.client.InvalidURL, UnicodeError) as error:
        raise UsageError(f"--url: {first_line(error)}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise FastCNNError(
                f"{request.host} has no valid certificate ({reason.verify_message}): give a mirror with --url"
            ) from None
        raise Broken(f"cannot be reached ({_reason(reason, timeout)})") from None
    try:
        _check_answer(response, have, known, partial)
    except BaseException:
        response.close()
        raise
    return response


def _check_answer(response: Any, have: int, known: Identity | None, partial: Path) -> None:
    headers = response.headers
    if response.status == 206 and known:
        part = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", "").strip())
        expected = (have, known.size - 1, known.size)
        if not part or tuple(map(int, part.groups())) != expected or _validator(response) not in ("", known.validator):
            _notes(partial).unlink(missing_ok=True)
            raise Broken("the server sends another part than it was asked for")
        return
    host = urlsplit(response.url).hostname
    if response.status != 200:
        raise FastCNNError(f"{host} answers {response.status}: give a mirror with --url")
    if headers.get_content_type() == "text/html":
        raise FastCNNError(f"{host} sends a web page, not an archive: is a log-in or a proxy in the way?")
    if not headers.get("Content-Length", "").isdecimal():
        raise FastCNNError(f"{host} does not say how long the archive is: give a mirror with --url")


def _read(response: Any, timeout: float) -> bytes:
    """Return the next bytes, b"" at the end."""
    try:
        return response.read1(CHUNK)  # type: ignore[no-any-return]
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"the connection broke ({_reason(error, timeout)})") from None


def _reason(error: object, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {timeout:g} s"
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


def _validator(response: Any) -> str:
    """Return the value for If-Range: a strong ETag, else Last-Modified, else ""."""
    etag = response.headers.get("ETag", "")
    return str(etag if etag.startswith('"') else response.headers.get("Last-Modified", ""))


def _notes(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_notes(partial: Path) -> Identity | None:
    """Return the file whose beginning the partial file is, None where that is not known."""
    notes = read_json(_notes(partial))
    size, validator = notes.get("size"), notes.get("validator")
    if isinstance(size, int) and isinstance(validator, str) and _size(partial) <= size:
        return Identity(size=size, validator=validator)
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
