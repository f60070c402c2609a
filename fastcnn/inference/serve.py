"""The model as a small HTTP service: a page for people, JSON for programs, figures for Prometheus."""

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

from fastcnn.errors import FastCNNError, first_line
from fastcnn.inference.artefact import Artefact, Probabilities
from fastcnn.inference.batcher import Batcher, Closed, Figures, Limits
from fastcnn.inference.classifier import ranked
from pipelines.verdict import Verdict

MEDIA_TYPES = ("image/", "application/octet-stream")
"""What an upload's content type begins with. What a file is, its content says."""


class Refusal(HTTPException):
    """An answer that is an error: its status, a word for programs, a sentence for people."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(status, message, headers or None)
        self.code = code


class ClassProbability(BaseModel):
    """One class of a prediction."""

    name: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


class Answer(BaseModel):
    """What the model says of a photo: the most probable class first."""

    predictions: list[ClassProbability]
    model: str = Field(description="SHA-256 of the model's file")


class Problem(BaseModel):
    """Why there is no prediction."""

    code: str
    message: str


class Failure(BaseModel):
    """An error."""

    error: Problem


def create_app(model: Artefact, limits: Limits | None = None, *, workers: int | None = None) -> FastAPI:
    """Return the service of an opened model, as an ASGI application.

    Args:
        model: opened.
        limits: what is taken; the rest is refused with 408, 413, 415, 422 or 429 and {"error": {"code", "message"}}.
        workers: decoding threads; None: one for each core.
    """
    limits = limits or Limits()
    figures = Figures()
    state: dict[str, Batcher] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = state["batcher"] = Batcher(model, limits, figures, workers)
        figures.waiting.set_function(lambda: len(batcher))
        try:
            yield
        finally:
            await asyncio.to_thread(batcher.close)

    app = FastAPIOffline(  # FastAPI, but /docs loads nothing from elsewhere
        title="fastcnn",
        summary="Classes of photos",
        description=f"{len(model.classes)} classes: {', '.join(model.classes)}.",
        version=str(model.metadata["versions"].get("fastcnn", "")),
        lifespan=lifespan,
        redoc_url=None,
    )
    page = files("fastcnn.inference").joinpath("serve.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page.replace("MAX_UPLOAD", str(limits.upload)), headers=PAGE_HEADERS)

    @app.post("/predict", openapi_extra=_UPLOAD, responses=_responses(limits), response_model_by_alias=True)
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1, description="Classes in the answer")] = len(model.classes),
    ) -> Answer:
        """Return the classes of a photo, the request's body, with their probabilities."""
        start = time.perf_counter()
        status = 500
        figures.in_progress.inc()
        try:
            photo = await _upload(request, limits)
            verdict, probabilities = await _classified(state["batcher"], photo)
            if not verdict.ok:
                status = 413 if verdict.reason == "too large" else 422
                raise Refusal(status, verdict.reason.replace(" ", "_"), _sentence(verdict))
            status = 200
        except Refusal as refusal:
            status = refusal.status_code
            raise
        finally:
            figures.in_progress.dec()
            figures.requests.labels(str(status)).inc()
            figures.latency.observe(time.perf_counter() - start)
        found = ranked(probabilities, model.classes, top_k)
        predictions = [ClassProbability.model_validate({"class": name, "probability": p}) for name, p in found]
        return Answer(predictions=predictions, model=model.sha256)

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"model": Failure, "description": "It takes no photos"}})
    async def ready() -> dict[str, str]:
        """Say whether photos get answers, and soon."""
        if not state["batcher"].ready:
            raise Refusal(503, "not_ready", "the service starts, or its decoder cannot be used: see its log")
        return {"status": "ready", "model": model.sha256}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return the figures in Prometheus' format."""
        return Response(prometheus_client.generate_latest(figures.registry), media_type="text/plain; version=0.0.4")

    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _broken)
    return app


async def _upload(request: Request, limits: Limits) -> bytes:
    """Return a request's body. Raises Refusal where it is no photo's or too large, before all of it is in memory."""
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
        async with asyncio.timeout(limits.patience):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.upload:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "upload_timeout", f"the photo did not arrive within {limits.patience:g} seconds") from None
    except ClientDisconnect:
        raise Refusal(400, "disconnected", "the client went away") from None
    return bytes(body)


async def _drain(request: Request, limits: Limits) -> None:
    """Read on for a while: a connection that is closed while the client sends is reset, and the answer lost."""
    size = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(limits.patience):
            async for chunk in request.stream():
                size += len(chunk)
                if size > 4 * limits.upload:
                    break


async def _classified(batcher: Batcher, photo: bytes) -> tuple[Verdict, Probabilities]:
    try:
        return await asyncio.wrap_future(batcher.submit(photo))
    except Closed:
        raise Refusal(503, "not_ready", "the service takes no photos: see its log") from None
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
    """Serve an opened model until SIGINT or SIGTERM; what was accepted by then is answered.

    Raises FastCNNError where the address cannot be used.
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
        timeout_graceful_shutdown=int(limits.patience) + 1,
    )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise FastCNNError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; see --host, --port"
        ) from None
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"{model.path} is served on {address} (for programs: {address}/docs); Ctrl-C ends it", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
