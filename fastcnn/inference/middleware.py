"""Middleware of the service: HEAD as GET, and responses that arrive though the request was not read to its end."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class HeadAsGet:
    """Answers HEAD wherever GET is answered, with its headers alone."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


@dataclass
class ReadToEnd:
    """Reads the rest of a request before its response: closing while the client sends would lose the response.

    Args:
        app: the application.
        most: bytes that are read; a client that sends more may lose the response.
        timeout: seconds for it.
    """

    app: ASGIApp
    most: int
    timeout: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        unread = True

        async def receive_noting() -> Message:
            nonlocal unread
            message = await receive()
            unread = bool(message.get("more_body"))
            return message

        async def send_after_reading(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 408:  # 408: it has waited already
                size = 0
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.timeout):
                        while unread and size <= self.most:
                            size += len((await receive_noting()).get("body", b""))
            await send(message)

        await self.app(scope, receive_noting, send_after_reading)
