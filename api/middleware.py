"""What every request passes through, outermost first; pure ASGI, so that bodies stream."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import fault, went_without, without

_log = structlog.get_logger("api.request")
DISCARD_BYTES = 1 << 16  # of a body that nobody wants; cheaper than a new connection
_LENGTH = re.compile(r"[0-9]{1,18}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


# On every answer. A page that needs more than nothing (api/docs.py) sets a policy of its own.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",  # CORS has its own way in, by setting
}


class SecurityHeaders:
    """What browsers are told to refuse: other readings of a content type, frames, scripts,
    addresses passed on; and, by setting, this host without TLS."""

    def __init__(self, app: ASGIApp, *, hsts_seconds: int) -> None:
        self.app = app
        self.headers = dict(SECURITY_HEADERS)
        if hsts_seconds:
            self.headers["Strict-Transport-Security"] = f"max-age={hsts_seconds}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, guarded_send)


class RequestLog:
    """One line a request, and the answer to a fault of ours. Headers and query are never logged:
    keys travel in the first and are, by mistake, put into the second."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if _REQUEST_ID.fullmatch(offered) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        log = _log.bind(
            request_id=request_id,
            method=scope["method"],
            path=scope["path"],
            client=(scope.get("client") or ("", 0))[0],
        )
        started = time.perf_counter()
        status = 0  # stays 0 where the client left before an answer
        sent = 0
        created: str | None = None

        async def observed_send(message: Message) -> None:
            nonlocal status, sent, created
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if status in (201, 202):
                    created = headers.get("location")
                headers["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        # Every line that is written on the way, also by the libraries, says for which request.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, observed_send)
        except Exception as error:
            lacking = went_without(error)
            if lacking is None:
                log.exception("request.fault")
            else:
                log.warning(f"request.without_{lacking[0]}", error=lacking[1])
            if not status:
                answer = fault(scope) if lacking is None else without(lacking[0], scope)
                await answer(scope, receive, observed_send)
            elif lacking is None:
                raise
            # Else it is too late for an answer: the server cuts the connection, as it must.
        finally:
            principal = scope["state"].get("principal")  # absent where no key opened anything
            log.info(
                "request",
                key_id=principal.key_id if principal else None,
                status=status,
                bytes=sent,
                ms=round(1000 * (time.perf_counter() - started), 1),
                **({} if created is None else {"created": created}),
            )
            structlog.contextvars.unbind_contextvars("request_id")


class HeadAsGet:
    """HEAD works wherever GET does. `scope["state"]["head"]` tells handlers that would stream."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["head"] = True

        async def send_headers_only(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        asked = {**scope, "method": "GET"}
        try:
            await self.app(asked, receive, send_headers_only)
        finally:
            scope["route"] = asked.get("route")  # for those outside, who count by it


class CloseUnread:
    """Closes the connection after an answer that left much of the request's body unread: the
    server would go on to read and discard it, without an end if the client wants none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        chunked = "transfer-encoding" in headers
        length = headers.get("content-length", "0")
        unread = int(length) if _LENGTH.fullmatch(length) else 0

        async def counting_receive() -> Message:
            nonlocal chunked, unread
            message = await receive()
            unread -= len(message.get("body", b""))
            if not message.get("more_body", False):
                chunked = False
            return message

        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start" and (chunked or unread > DISCARD_BYTES):
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self.app(scope, counting_receive, closing_send)


class BodyLimit:
    """413 for JSON bodies that are too large; uploads have a limit of their own."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, exempt: Callable[[str], bool]) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.exempt = exempt  # of a path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.exempt(scope["path"]):
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        declared = int(length) if _LENGTH.fullmatch(length) else 0
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message: Message = {} if declared > self.max_bytes else await receive()
            received += len(message.get("body", b""))
            if max(received, declared) > self.max_bytes:
                # An HTTPException, the one kind that FastAPI lets through while it reads a body.
                raise HTTPException(413, f"The body may have at most {self.max_bytes} bytes.")
            return message

        await self.app(scope, limited_receive, send)


class BodyTimeout:
    """408 for a body of which nothing comes for a while, JSON or upload: a client that is gone
    without a word, or one that means to hold connections, spool and threads."""

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        complete = False  # then only the client's leave is still to be received

        async def timed_receive() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(self.seconds):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"Nothing of the body came for {self.seconds:g} seconds.",
                    headers={"Connection": "close"},
                ) from None
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, timed_receive, send)
