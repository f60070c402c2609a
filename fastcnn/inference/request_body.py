"""Request bodies: checked for type, unpacked and read into photos within the service's limits."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from fastcnn.errors import nearest
from fastcnn.inference.batcher import Limits
from fastcnn.inference.uploads import (
    EXPECTED,
    Form,
    Refusal,
    Upload,
    from_json,
    is_photo_type,
    looks_like_photo,
    media_type,
    too_large,
)

FORM, JSON, URLENCODED = "multipart/form-data", "application/json", "application/x-www-form-urlencoded"
UNSTATED = ("", URLENCODED)
"""Content types of clients that were told none, curl among them: the content decides."""
UNPACKED = 65536
"""Bytes unpacked at a time."""


async def read_upload(request: Request, limits: Limits) -> Upload:
    """Return the photos of a request. Raises Refusal for wrong parameters, types, forms and sizes."""
    _check_parameters(request)
    header = request.headers.get("content-type", "")
    kind = media_type(header)
    if not (kind in (FORM, JSON, *UNSTATED) or is_photo_type(kind)):
        raise Refusal(415, "unsupported_media_type", f"{EXPECTED}, got {kind}")
    most = limits.upload if is_photo_type(kind) else limits.body
    form = Form(header, limits) if kind == FORM else None
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in _unpacked(request, most):
                if form:
                    form.write(chunk)
                else:
                    body += chunk
    except TimeoutError:
        raise Refusal(408, "upload_timeout", f"the photo did not arrive within {limits.timeout:g} seconds") from None
    except ClientDisconnect:
        raise Refusal(400, "disconnected", "the client went away") from None
    upload = form.upload() if form else _from_body(bytes(body), kind, limits)
    if upload.top_k is not None and request.query_params:
        raise Refusal(422, "invalid_request", "top_k: the parameter is given twice; give it once")
    return upload


def _from_body(body: bytes, kind: str, limits: Limits) -> Upload:
    if kind == JSON or (kind in UNSTATED and body.lstrip()[:1] == b"{"):
        return from_json(body, limits)
    if kind == URLENCODED and not looks_like_photo(body):
        raise Refusal(415, "unsupported_media_type", f"{EXPECTED}, got {kind}")
    if len(body) > limits.upload:
        raise too_large(limits.upload)
    return Upload([body], several=False)


def _check_parameters(request: Request) -> None:
    """Raise Refusal for a query parameter that there is not, and for one that is given twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    unknown = [name for name in names if name not in ("top_k", "top-k")]
    if unknown:
        raise Refusal(422, "invalid_request", f"no parameter {unknown[0]!r}{nearest(unknown[0], ['top_k'])}")
    if len(names) > 1:
        message = f"{' and '.join(names)}: the parameter is given twice; give it once"
        raise Refusal(422, "invalid_request", message)


async def _unpacked(request: Request, most: int) -> AsyncIterator[bytes]:
    """Yield a request's body without its Content-Encoding. Raises Refusal at `most` bytes, packed or unpacked."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        message = f"expected Content-Encoding gzip or none, got {encoding}"
        raise Refusal(415, "unsupported_encoding", message, **{"Accept-Encoding": "gzip"})
    if int(request.headers.get("content-length") or 0) > most:
        raise too_large(most)
    packed = _limited(request.stream(), most)
    async for chunk in packed if encoding == "identity" else _limited(_gunzipped(packed), most):
        yield chunk


async def _limited(chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > most:
            raise too_large(most)
        yield chunk


async def _gunzipped(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what is packed, in pieces so small that a reader can stop in time. Raises Refusal for damaged gzip."""
    unpack = zlib.decompressobj(wbits=31)
    try:
        async for chunk in chunks:
            piece = b""
            while chunk or len(piece) == UNPACKED:  # a full piece: there may be more without further input
                if unpack.eof and chunk:  # the next file of several in a row
                    unpack = zlib.decompressobj(wbits=31)
                yield (piece := unpack.decompress(chunk, UNPACKED))
                chunk = unpack.unconsumed_tail or unpack.unused_data
    except zlib.error as error:
        raise Refusal(422, "invalid_gzip", f"the body is not in gzip as its header says: {error}") from None
    if not unpack.eof:
        raise Refusal(422, "invalid_gzip", "the body in gzip ends early")
