"""HTTP service of an exported model: a page for people, JSON for programs, metrics for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import socket
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Annotated, Any

import prometheus_client
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastcnn.errors import FastCNNError, first_line, nearest
from fastcnn.inference.artefact import Artefact, Probabilities
from fastcnn.inference.batcher import Batcher, BatcherClosed, Limits, Metrics
from fastcnn.inference.classifier import ranked
from pipelines.verdict import Verdict

MEDIA_TYPES = ("image/", "application/octet-stream")
"""Prefixes of accepted content types. The actual format is read from the file's content."""


class Refusal(HTTPException):
    """Error response: HTTP status, code for programs, message for people."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(status, message, headers or None)
        self.code = code


class ClassProbability(BaseModel):
    """Class name and probability."""

    name: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


class Answer(BaseModel):
    """Classes of a photo, the most probable first."""

    predictions: list[ClassProbability]
    model: str = Field(description="SHA-256 of the model's file")


class Problem(BaseModel):
    """Reason why there is no prediction."""

    code: str
    message: str


class Failure(BaseModel):
    """Body of an error response."""

    error: Problem


class Service:
    """Routes of the service for one model, and the batcher that answers them while the application runs."""

    def __init__(self, model: Artefact, limits: Limits, workers: int | None) -> None:
        self._model, self._limits, self._workers = model, limits, workers
        self._metrics = Metrics()
        self._page = files("fastcnn.inference").joinpath("serve.html").read_text(encoding="utf-8")
        self._batcher: Batcher

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the batcher while the application runs."""
        batcher = self._batcher = Batcher(self._model, self._limits, self._metrics, self._workers)
        self._metrics.waiting.set_function(lambda: len(batcher))
        try:
            yield
        finally:
            await asyncio.to_thread(batcher.close)

    async def index(self) -> HTMLResponse:
        """Return the page for people."""
        return HTMLResponse(self._page.replace("MAX_UPLOAD", str(self._limits.upload)), headers=PAGE_HEADERS)

    async def predict(self, request: Request, top_k: int | None) -> Answer:
        """Return the most probable classes of the photo in the request's body, and count the request."""
        start = time.perf_counter()
        status = 500
        self._metrics.in_progress.inc()
        try:
            await _check_parameters(request, self._limits)
            photo = await _upload(request, self._limits)
            verdict, probabilities = await _classified(self._batcher, photo)
            if not verdict.ok:
                status = 413 if verdict.reason == "too large" else 422
                raise Refusal(status, verdict.reason.replace(" ", "_"), _sentence(verdict))
            status = 200
        except Refusal as refusal:
            status = refusal.status_code
            raise
        finally:
            self._metrics.in_progress.dec()
            self._metrics.requests.labels(str(status)).inc()
            self._metrics.latency.observe(time.perf_counter() - start)
        found = ranked(probabilities, self._model.classes, top_k or len(self._model.classes))
        predictions = [ClassProbability.model_validate({"class": name, "probability": p}) for name, p in found]
        return Answer(predictions=predictions, model=self._model.sha256)

    async def alive(self) -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "alive"}

    async def ready(self) -> dict[str, str]:
        """Say whether photos are answered."""
        if not self._batcher.ready:
            raise Refusal(503, "not_ready", "the service is starting or its decoder has failed: see its log")
        return {"status": "ready", "model": self._model.sha256}

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        content = prometheus_client.generate_latest(self._metrics.registry)
        return Response(content, media_type="text/plain; version=0.0.4")


def create_app(model: Artefact, limits: Limits | None = None, *, workers: int | None = None) -> FastAPI:
    """Return the service of an exported model as an ASGI application.

    Args:
        model: the exported model, opened.
        limits: uploads beyond them get 408, 413 or 429 and {"error": {"code", "message"}}; None: the defaults.
        workers: decoding threads; None: one per core.
    """
    limits = limits or Limits()
    service = Service(model, limits, workers)
    app = FastAPIOffline(  # FastAPI whose /docs loads nothing from other servers
        title="fastcnn",
        summary="Classes of photos",
        description=f"{len(model.classes)} classes: {', '.join(model.classes)}.",
        version=str(model.metadata["versions"].get("fastcnn", "")),
        lifespan=service.lifespan,
        redoc_url=None,
    )

    async def predict(
        request: Request,
        top_k: Annotated[int | None, Query(ge=1, description="Classes in the answer. Default: all.")] = None,
        hyphenated: Annotated[int | None, Query(ge=1, alias="top-k", include_in_schema=False)] = None,
    ) -> Answer:
        """Return the classes of a photo, the request's body, with their probabilities."""
        return await service.predict(request, top_k or hyphenated)

    app.get("/", response_class=HTMLResponse, include_in_schema=False)(service.index)
    app.post("/predict", openapi_extra=_UPLOAD, responses=_responses(limits), response_model_by_alias=True)(predict)
    app.get("/healthz")(service.alive)
    app.get("/readyz", responses={503: {"model": Failure, "description": "It takes no photos"}})(service.ready)
    app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})(service.metrics)
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _broken)
    return app


async def _check_parameters(request: Request, limits: Limits) -> None:
    """Raise Refusal for a query parameter that there is not, and for one that is given twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    unknown = [name for name in names if name not in ("top_k", "top-k")]
    if unknown:
        message = f"no parameter {unknown[0]!r}{nearest(unknown[0], ['top_k'])}"
    elif len(names) > 1:
        message = f"{' and '.join(names)}: the parameter is given twice; give it once"
    else:
        return
    await _drain(request, limits)
    raise Refusal(422, "invalid_request", message)


async def _upload(request: Request, limits: Limits) -> bytes:
    """Return a request's body. Raises Refusal for a wrong type or size before reading all of it into memory."""
    kind = request.headers.get("content-type", "application/octet-stream").lower()
    if not kind.startswith(MEDIA_TYPES):
        await _drain(request, limits)
        message = f"expected a photo as the request's body, of type image/* or application/octet-stream, got {kind}"
        raise Refusal(415, "unsupported_media_type", message)
    too_large = Refusal(413, "too_large", f"the photo has more than {limits.upload:,} bytes")
    if int(request.headers.get("content-length") or 0) > limits.upload:
        await _drain(request, limits)
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.upload:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "upload_timeout", f"the photo did not arrive within {limits.timeout:g} seconds") from None
    except ClientDisconnect:
        raise Refusal(400, "disconnected", "the client went away") from None
    return bytes(body)


async def _drain(request: Request, limits: Limits) -> None:
    """Read the rest of the body: closing while the client sends resets the connection and loses the response."""
    size = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > 4 * limits.upload:
                    break


async def _classified(batcher: Batcher, photo: bytes) -> tuple[Verdict, Probabilities]:
    try:
        return await asyncio.wrap_future(batcher.submit(photo))
    except BatcherClosed:
        raise Refusal(503, "not_ready", "the service takes no photos any more: see its log") from None
    except queue.Full:
        raise Refusal(
            429, "busy", "too many photos are waiting: try again in a second", **{"Retry-After": "1"}
        ) from None


def _sentence(verdict: Verdict) -> str:
    return f"the photo cannot be used: {verdict.reason}" + (f" ({verdict.detail})" if verdict.detail else "")


async def _failed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = error.code if isinstance(error, Refusal) else error.detail.lower().replace(" ", "_")
    return _failure(error.status_code, code, error.detail, dict(error.headers or {}))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    what = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
    return _failure(422, "invalid_request", what)


async def _broken(request: Request, error: Exception) -> JSONResponse:
    return _failure(500, "internal_error", first_line(error))


def _failure(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


def _responses(limits: Limits) -> dict[int | str, dict[str, Any]]:
    what = {
        400: "The client went away while it sent the photo",
        408: "The photo did not arrive in time",
        413: f"More than {limits.upload:,} bytes or {limits.pixels:,} pixels",
        415: "Neither image/* nor application/octet-stream",
        422: "No photo, one that is damaged, or a wrong parameter",
        429: "Too many photos are waiting",
        503: "It takes no photos",
    }
    return {status: {"model": Failure, "description": text} for status, text in what.items()}


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "description": "The photo's file as it is: JPEG, PNG, WebP, BMP, TIFF...",
        "content": {"image/*": _BINARY, "application/octet-stream": _BINARY},
    }
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def serve(model: Artefact, host: str, port: int, limits: Limits | None = None, *, workers: int | None = None) -> None:
    """Serve an exported model until SIGINT or SIGTERM, then answer the accepted photos and return.

    Raises FastCNNError if the address cannot be used.
    """
    limits = limits or Limits()
    app = create_app(model, limits, workers=workers)
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.timeout) + 1,
    )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise FastCNNError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another --host or --port"
        ) from None
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"{model.path} is served on {address} (for programs: {address}/docs); Ctrl-C ends it", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
