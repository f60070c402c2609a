"""HTTP service of an exported model: a page for people, JSON for programs, metrics for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import socket
import time
from collections.abc import AsyncIterator, Sequence
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
from starlette.middleware.cors import CORSMiddleware

from fastcnn.errors import first_line, os_error_as
from fastcnn.inference.artefact import Artefact, Probabilities
from fastcnn.inference.batcher import Batcher, BatcherClosed, Limits, Metrics
from fastcnn.inference.classifier import ranked
from fastcnn.inference.middleware import HeadAsGet, ReadToEnd
from fastcnn.inference.request_body import read_upload
from fastcnn.inference.uploads import REQUEST_BODY, Refusal
from pipelines.verdict import Verdict


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

    async def predict(self, request: Request, top_k: int | None) -> Answer | list[Answer | Failure]:
        """Return the most probable classes of the photo in a request, or of each photo of several; count them."""
        start = time.perf_counter()
        status = 500
        self._metrics.in_progress.inc()
        try:
            upload = await read_upload(request, self._limits)
            results = await self._classified(upload.photos)
            for one in results:
                self._metrics.photos.labels(one.code if isinstance(one, Refusal) else "ok").inc()
            if not upload.several and isinstance(results[0], Refusal):
                raise results[0]
            status = 200
        except Refusal as refusal:
            status = refusal.status_code
            raise
        finally:
            self._metrics.in_progress.dec()
            self._metrics.requests.labels(str(status)).inc()
            self._metrics.latency.observe(time.perf_counter() - start)
        answers = [self._answer(one, top_k or upload.top_k) for one in results]
        if upload.several:
            return answers
        assert isinstance(answers[0], Answer)
        return answers[0]

    async def _classified(self, photos: list[bytes | Refusal]) -> list[Probabilities | Refusal]:
        """Return the probabilities of each photo, or why there are none. Raises Refusal if they cannot all be taken."""
        taken = [photo for photo in photos if isinstance(photo, bytes)]
        try:
            found = iter(await asyncio.gather(*map(asyncio.wrap_future, self._batcher.submit(taken))))
        except BatcherClosed:
            raise Refusal(503, "not_ready", "the service takes no photos any more: see its log") from None
        except queue.Full:
            message = "too many photos are waiting: try again in a second"
            raise Refusal(429, "busy", message, **{"Retry-After": "1"}) from None
        return [photo if isinstance(photo, Refusal) else _unless_bad(*next(found)) for photo in photos]

    def _answer(self, found: Probabilities | Refusal, top_k: int | None) -> Answer | Failure:
        if isinstance(found, Refusal):
            return Failure(error=Problem(code=found.code, message=found.detail))
        classes = ranked(found, self._model.classes, top_k or len(self._model.classes))
        predictions = [ClassProbability.model_validate({"class": name, "probability": p}) for name, p in classes]
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


def create_app(
    model: Artefact,
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Return the service of an exported model as an ASGI application.

    Args:
        model: the exported model, opened.
        limits: uploads beyond them get 408, 413 or 429 and {"error": {"code", "message"}}; None: the defaults.
        workers: decoding threads; None: one per core.
        cors_origins: origins whose pages may ask the service from a browser; "*" is any.
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
    ) -> Answer | list[Answer | Failure]:
        """Return the classes of a photo with their probabilities, or a list of such answers if it sends several."""
        return await service.predict(request, top_k or hyphenated)

    app.get("/", response_class=HTMLResponse, include_in_schema=False)(service.index)
    description = {"requestBody": REQUEST_BODY}
    app.post("/predict", openapi_extra=description, responses=_responses(limits), response_model_by_alias=True)(predict)
    app.get("/healthz")(service.alive)
    app.get("/readyz", responses={503: {"model": Failure, "description": "It takes no photos"}})(service.ready)
    app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})(service.metrics)
    app.add_middleware(ReadToEnd, most=4 * limits.upload, timeout=limits.timeout)
    app.add_middleware(HeadAsGet)
    if cors_origins:
        methods, exposed = ("GET", "HEAD", "POST"), ("Retry-After",)
        app.add_middleware(
            CORSMiddleware, cors_origins, allow_methods=methods, allow_headers=("*",), expose_headers=exposed
        )
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _broken)
    return app


def _unless_bad(verdict: Verdict, probabilities: Probabilities) -> Probabilities | Refusal:
    if verdict.ok:
        return probabilities
    detail = f" ({verdict.detail})" if verdict.detail else ""
    status = 413 if verdict.reason == "too large" else 422
    return Refusal(status, verdict.reason.replace(" ", "_"), f"the photo cannot be used: {verdict.reason}{detail}")


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
        415: "A content type or encoding other than those described",
        422: "No photo, one that is damaged, a malformed form or a wrong parameter",
        429: "Too many photos are waiting",
        503: "It takes no photos",
    }
    return {status: {"model": Failure, "description": text} for status, text in what.items()}


PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def serve(
    model: Artefact,
    host: str,
    port: int,
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    cors_origins: Sequence[str] = (),
) -> None:
    """Serve an exported model until SIGINT or SIGTERM, then answer the accepted photos and return.

    Raises FastCNNError if the address cannot be used.
    """
    limits = limits or Limits()
    app = create_app(model, limits, workers=workers, cors_origins=cors_origins)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # who sent a malformed form is told
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.timeout) + 1,
    )
    with os_error_as(f"cannot listen on {host}, port {port}", ". Choose another --host or --port"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"{model.path} is served on {address} (for programs: {address}/docs); Ctrl-C ends it", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
