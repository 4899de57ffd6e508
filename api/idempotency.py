"""`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a request that is sent again gets
the answer of the first one, and what it does is done once.

The same request is the same method, path, query, describing headers and body, in one project.
A body that streams is known only once it was read, so the key, and what is asked, are compared
before, and the body at its end: the second time it is read and thrown away. Of a form the
parts are compared, because clients draw its boundary anew. Kept are answers of requests that were
carried out (2xx); an error changed nothing, so it leaves the key free. What holds across processes
and crashes is in jobs.idempotency.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import anyio
import structlog
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import Principal
from api.deps import Services
from api.errors import ApiError, api_problem
from jobs import idempotency
from jobs.errors import Conflict, KeyReused
from jobs.idempotency import Done, Hold

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
DESCRIPTION = (
    "1 to 255 visible characters that name this request, such as a UUID. Sent again with the same "
    "key, it is carried out once and gets the same answer; another body or route is 422, and 409 "
    "while the first is in progress. Requests that failed leave the key free."
)
_PUTS = frozenset({"/v1/models", "/v1/datasets"})  # curl -T sends an upload as PUT
HOLD_SECONDS = 60.0
EXTEND_SECONDS = 15.0
MAX_KEPT_BYTES = 4 << 20  # of an answer
MAX_UNASKED_BYTES = 1 << 20  # of a body that the handler leaves unread
# In an answer these belong to the one time it is sent.
_NOT_KEPT = frozenset({b"content-length", b"connection", b"date"})
# A string of RFC 9651 without escapes, or what most clients send, the same without quotes.
_KEY = re.compile(r'"([ !#-\[\]-~]{1,255})"|([!#-~]{1,255})')
_DESCRIBING = re.compile(rb"content-disposition|content-encoding|upload-.*|tus-.*")

_log = structlog.get_logger(__name__)


def _is_taken(method: str, path: str) -> bool:
    return method == "POST" or (method == "PUT" and path.rstrip("/") in _PUTS)


class Idempotency:
    """Stands behind authentication and roles, which each sending passes anew."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal: Principal | None = scope.get("state", {}).get("principal")
        sent = Headers(scope=scope).getlist(HEADER) if scope["type"] == "http" else []
        if not sent or principal is None or not _is_taken(scope["method"], scope["path"]):
            await self.app(scope, receive, send)
            return
        services: Services = scope["app"].state.services
        body = BodyDigest(Headers(scope=scope).get("content-type"))
        try:
            taken = await run_in_threadpool(_take, services, scope, principal, sent, body)
            if isinstance(taken, Done):
                answer = await _answer_again(scope, receive, taken, body)
                if answer is not None:
                    await answer(scope, receive, send)
                return
        except ApiError as error:
            await api_problem(scope, error)(scope, receive, send)
            return
        scope["state"]["principal"] = replace(principal, hold=taken)
        await self._carry_out(scope, receive, send, services, taken, body)

    async def _carry_out(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        services: Services,
        hold: Hold,
        body: BodyDigest,
    ) -> None:
        is_read = False

        async def digesting_receive() -> Message:
            nonlocal is_read
            message = await receive()
            body.add(message.get("body", b""))
            is_read = not message.get("more_body", False)
            return message

        async def read_rest() -> None:
            """Of a body that the handler did not ask for."""
            while not is_read and body.size_bytes <= MAX_UNASKED_BYTES:
                await digesting_receive()

        keeper = _Keeper(services, hold, read_rest, send)
        extending = asyncio.create_task(_extend(services, hold))
        try:
            await self.app(scope, digesting_receive, keeper.send)
        finally:
            extending.cancel()
            if keeper.holds:
                with anyio.CancelScope(shield=True):
                    await run_in_threadpool(_let_go, services, hold)


class BodyDigest:
    """The SHA-256 of a body as it passes: of a form its parts', of anything else its bytes'."""

    def __init__(self, content_type: str | None) -> None:
        media_type, options = parse_options_header(content_type)
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._form: MultipartParser | None = None
        if media_type == b"multipart/form-data" and (boundary := options.get(b"boundary")):
            self._part = hashlib.sha256()
            with suppress(FormParserError):  # a boundary that the handler refuses as well
                self._form = MultipartParser(
                    boundary,
                    {
                        "on_part_begin": self._begin_part,
                        "on_header_begin": lambda: self._part.update(b"\0"),
                        "on_header_field": self._add_header,
                        "on_header_value": self._add_header,
                        "on_headers_finished": lambda: self._part.update(b"\0\0"),
                        "on_part_data": lambda data, a, b: self._part.update(data[a:b]),
                        "on_part_end": lambda: self._hash.update(self._part.digest()),
                    },
                )

    def add(self, data: bytes) -> None:
        self.size_bytes += len(data)
        if self._form is None:
            self._hash.update(data)
            return
        try:
            self._form.write(data)
        except FormParserError:  # which the handler refuses as well
            self._form = None
            self._hash.update(b"malformed")

    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def is_form(self) -> bool:
        return self._form is not None

    def _begin_part(self) -> None:
        self._part = hashlib.sha256()

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._part.update(data[start:end])


class _Keeper:
    """Keeps an answer before its end goes out: whoever has got it may rely on it."""

    def __init__(
        self, services: Services, hold: Hold, read_rest: Callable[[], Awaitable[None]], send: Send
    ) -> None:
        self.holds = True
        self._services = services
        self._hold = hold
        self._read_rest = read_rest
        self._send = send
        self._start: Message | None = None
        self._content = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_worth_keeping(message):
            self._start = message
            return
        if self._start is None or message["type"] != "http.response.body":
            ends = message["type"] == "http.response.body" and not message.get("more_body", False)
            if ends and self.holds:  # who has got the answer may send the request again at once
                await run_in_threadpool(_let_go, self._services, self._hold)
                self.holds = False
            await self._send(message)
            return
        self._content += message.get("body", b"")
        ends = not message.get("more_body", False)
        if not ends and len(self._content) <= MAX_KEPT_BYTES:
            return
        start, self._start = self._start, None
        if ends and len(self._content) <= MAX_KEPT_BYTES:
            await self._read_rest()
            self.holds = not await run_in_threadpool(self._keep, start)
        await self._send(start)
        await self._send({**message, "body": bytes(self._content)})

    def _keep(self, start: Message) -> bool:
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in start["headers"]
            if name.lower() not in _NOT_KEPT
        ]
        try:
            with self._services.database.transaction() as session:
                idempotency.keep_answer(
                    session,
                    self._hold,
                    status=start["status"],
                    headers=headers,
                    content=bytes(self._content),
                )
        except SQLAlchemyError:
            _log.exception("idempotency.answer_not_kept")
            return False
        return True


def _is_worth_keeping(start: Message) -> bool:
    """Of requests that were carried out; a secret, as new API keys are, is never stored."""
    secret = any(
        name.lower() == b"cache-control" and b"no-store" in value
        for name, value in start.get("headers", ())
    )
    return 200 <= start["status"] < 300 and not secret


def _take(
    services: Services, scope: Scope, principal: Principal, sent: list[str], body: BodyDigest
) -> Hold | Done:
    match = _KEY.fullmatch(sent[0]) if len(sent) == 1 else None
    if match is None:
        raise ApiError(
            400,
            "idempotency-key-invalid",
            f"Send one {HEADER} of 1 to 255 visible ASCII characters, such as a UUID, with or "
            "without quotes around it.",
            title=f"{HEADER} is not valid",
        )
    try:
        with services.database.transaction() as session:
            return idempotency.take_hold(
                session,
                project_id=principal.project_id,
                key=match[1] or match[2],
                request=_request_digest(scope),
                body=body,
                hold_seconds=HOLD_SECONDS,
                kept_seconds=3600 * services.settings.idempotency_hours,
            )
    except KeyReused as error:
        raise _reused(error.message) from None
    except (Conflict, IntegrityError):
        raise ApiError(
            409,
            "request-in-progress",
            "The first request with this key is still being carried out; ask again.",
            title=f"A request is outstanding for this {HEADER}",
            headers={"Retry-After": "1"},
        ) from None


def _reused(detail: str) -> ApiError:
    return ApiError(
        422,
        KeyReused.code,
        f"{detail} Send each request with a key of its own.",
        title=f"{HEADER} is already used",
    )


def _request_digest(scope: Scope) -> str:
    """Of all that is asked, except for the body: nothing of it was read."""
    headers = sorted(
        (name, value) for name, value in scope["headers"] if _DESCRIBING.fullmatch(name)
    )
    media_type, _ = parse_options_header(Headers(scope=scope).get("content-type"))
    parts = [scope["method"].encode(), scope["path"].encode(), scope["query_string"], media_type]
    for name, value in headers:
        parts += [name, value]
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()


async def _answer_again(
    scope: Scope, receive: Receive, done: Done, body: BodyDigest
) -> Response | None:
    """The first answer, if the whole body is the first one's. None if the client went away."""
    limit = done.body_bytes + (1 << 16 if body.is_form else 0)  # boundaries differ in length
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body.add(message.get("body", b""))
        if body.size_bytes > limit:
            break
        more = message.get("more_body", False)
    if more or body.sha256() != done.body_sha256:
        raise _reused("This key was used for a request with another body.")
    if done.status is None:
        raise ApiError(
            409,
            "request-already-done",
            "This request was carried out, and its answer was not kept: it held a secret, or the "
            f"service ended too early. What it did is {done.action} to {done.target}.",
            title="The request was carried out already",
            action=done.action,
            target=done.target,
        )
    answer = Response(done.content, status_code=done.status)
    kept = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in done.headers]
    answer.raw_headers += kept
    answer.headers[REPLAYED] = "true"
    return answer


async def _extend(services: Services, hold: Hold) -> None:
    """A request may take hours, as uploads do, and is its key's all the time."""
    while True:
        await asyncio.sleep(EXTEND_SECONDS)
        await run_in_threadpool(_extend_once, services, hold)


def _extend_once(services: Services, hold: Hold) -> None:
    try:
        with services.database.transaction() as session:
            idempotency.extend(session, hold, hold_seconds=HOLD_SECONDS)
    except SQLAlchemyError as error:
        _log.warning("idempotency.not_extended", error=str(error))


def _let_go(services: Services, hold: Hold) -> None:
    try:
        with services.database.transaction() as session:
            idempotency.let_go(session, hold)
    except SQLAlchemyError as error:
        # After its time the key is free by itself.
        _log.warning("idempotency.not_let_go", error=str(error))
