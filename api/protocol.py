"""Uvicorn's protocol, with a bound on what comes between the bodies of requests.

Its parser takes headers without an end, before anybody has shown a key, and what a chunked body has
beside its bytes: extensions of its chunks, and trailers. How slowly they may come is the
proxy's to say (docker/nginx.conf).
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.middleware import SECURITY_HEADERS

MAX_HEAD_BYTES = 1 << 16  # request line and headers
# Written past the application, which gives all other answers their headers.
_REFUSAL = "\r\n".join(
    (
        "HTTP/1.1 431 Request Header Fields Too Large",
        "content-length: 0",
        "connection: close",
        *(f"{name.lower()}: {value}" for name, value in SECURITY_HEADERS.items()),
        "\r\n",
    )
).encode("ascii")


class BoundedHeadProtocol(HttpToolsProtocol):
    """431 where nothing is being answered, and the end of the connection, once more has come than a
    head may have without its end or a piece of a body."""

    _unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._unread_bytes += len(data)
        super().data_received(data)
        if self._unread_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_REFUSAL)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._unread_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        super().on_message_complete()
