"""Sends one message to one webhook, to an address that was checked and to no other.

It stands on httpcore, below httpx: nothing there reads proxies from the environment, follows a
redirect or keeps a cookie, and its network backend is ours to give. That resolves the host, has
every address checked, and connects to those addresses themselves; TLS still holds the certificate
against the host's name. So a name that means another address a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio
import httpcore

from jobs.webhook_signing import signed_headers
from jobs.webhook_targets import (
    Network,
    Resolver,
    Target,
    TargetRefused,
    TargetUnknown,
    addresses_of,
    parse_target,
    resolve,
)
from jobs.webhooks import Attempt, Outcome

MAX_ANSWER_BYTES = 1 << 14  # read and forgotten, so that a short answer ends in peace
ANSWER_SECONDS = 2.0
_BROKEN = (httpcore.NetworkError, httpcore.ProtocolError)


@dataclass(frozen=True)
class Sender:
    """`timeout_seconds` bounds a whole attempt, however slowly the other side speaks."""

    timeout_seconds: float
    allowed: Sequence[Network] = ()
    resolver: Resolver = resolve
    tls: ssl.SSLContext | None = None

    def send(self, attempt: Attempt) -> Outcome:
        """What came of it; never raises for what the other side does."""
        started = time.monotonic()
        status, error = asyncio.run(self._send(attempt))
        return Outcome(status, error, round(1000 * (time.monotonic() - started)))

    async def _send(self, attempt: Attempt) -> tuple[int | None, str | None]:
        try:
            async with asyncio.timeout(self.timeout_seconds):
                return await self._post(attempt), None
        except (TargetRefused, TargetUnknown) as error:
            return None, error.message
        except (TimeoutError, httpcore.TimeoutException):
            return None, f"no answer within {self.timeout_seconds:g} seconds"
        except httpcore.ConnectError as error:
            return None, f"no connection: {error}"[:300]
        except _BROKEN as error:
            return None, f"the connection broke: {type(error).__name__} {error}"[:300]

    async def _post(self, attempt: Attempt) -> int:
        target = parse_target(attempt.url)
        headers = {
            "host": target.authority,
            "content-type": "application/json",
            "user-agent": "Widthwise",
            **signed_headers(
                attempt.secret,
                id=attempt.delivery_id,
                timestamp=int(time.time()),
                body=attempt.body,
            ),
        }
        url = httpcore.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path
        )
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=self.tls or ssl.create_default_context(),
                max_connections=1,
                network_backend=_CheckedAddresses(target, self.resolver, self.allowed),
            ) as pool,
            pool.stream("POST", url, headers=list(headers.items()), content=attempt.body) as answer,
        ):
            await _read_a_little(answer)
            return answer.status


async def _read_a_little(answer: httpcore.Response) -> None:
    """The status has said all: a body without an end, or that breaks off, changes nothing."""
    read = 0
    with anyio.move_on_after(ANSWER_SECONDS), suppress(*_BROKEN):
        async for chunk in answer.aiter_stream():
            read += len(chunk)
            if read > MAX_ANSWER_BYTES:
                break


class _CheckedAddresses(httpcore.AsyncNetworkBackend):
    """Connects to the target's addresses, in their order, if each of them may be called."""

    def __init__(self, target: Target, resolver: Resolver, allowed: Sequence[Network]) -> None:
        self._target = target
        self._resolver = resolver
        self._allowed = allowed
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await anyio.to_thread.run_sync(
            lambda: addresses_of(self._target, resolver=self._resolver, allowed=self._allowed),
            abandon_on_cancel=True,
        )
        for number, address in enumerate(addresses, 1):
            try:
                return await self._network.connect_tcp(
                    str(address), self._target.port, timeout, local_address, socket_options
                )
            except httpcore.ConnectError:
                if number == len(addresses):
                    raise
        raise AssertionError("there is an address, or addresses_of raises")

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise TargetRefused("No socket in the file system is called.")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)
