"""How many requests a key may make: a count for each key over a minute that begins with its first
request. In Redis where the queue is, for all processes of the API together; else in each.

Told by the fields of draft-ietf-httpapi-ratelimit-headers-10: RateLimit-Policy says what there is
(`q` requests in `w` seconds), RateLimit what is left of it (`r`) and when it begins anew (`t`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, api_problem
from jobs.settings import Settings

WINDOW_SECONDS = 60
POLICY = "key"
REDIS_PAUSE_SECONDS = 5.0  # without asking a Redis that has just not answered

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Usage:
    """Of a key's window: the requests in it, the one that is being counted too, and the seconds
    until it ends."""

    requests: int
    ends_in: float


class Counter(Protocol):
    async def count(self, key_id: str) -> Usage: ...

    async def close(self) -> None: ...


class MemoryCounter:
    """Counts in this process. It holds one entry for each valid key that was ever used here."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, tuple[float, int]] = {}

    async def count(self, key_id: str) -> Usage:
        at = self._clock()
        ends, requests = self._windows.get(key_id, (at, 0))
        if ends <= at:
            ends, requests = at + WINDOW_SECONDS, 0
        self._windows[key_id] = ends, requests + 1
        return Usage(requests + 1, ends - at)

    async def close(self) -> None:
        return


class RedisCounter:
    """Counts in Redis. While that does not answer, in this process: a limit that guards the
    service must not stop it."""

    def __init__(self, url: str) -> None:
        pool = BlockingConnectionPool.from_url(
            url, max_connections=20, timeout=0.5, socket_connect_timeout=0.5, socket_timeout=0.5
        )
        self._redis = Redis.from_pool(pool)
        self._meanwhile = MemoryCounter()
        self._asks_again_at = 0.0

    async def count(self, key_id: str) -> Usage:
        if time.monotonic() >= self._asks_again_at:
            try:
                return await self._count(key_id)
            except (RedisError, OSError) as error:
                self._asks_again_at = time.monotonic() + REDIS_PAUSE_SECONDS
                _log.warning("rate_limit.redis_unreachable", error=str(error))
        return await self._meanwhile.count(key_id)

    async def _count(self, key_id: str) -> Usage:
        name = f"widthwise:requests:{key_id}"
        async with self._redis.pipeline(transaction=True) as commands:
            commands.set(name, 0, nx=True, ex=WINDOW_SECONDS)
            commands.incr(name)
            commands.pttl(name)
            _, requests, milliseconds = await commands.execute()
        return Usage(int(requests), int(milliseconds) / 1000)

    async def close(self) -> None:
        await self._redis.aclose()


def make_counter(settings: Settings) -> Counter | None:
    """None where the settings set no limit."""
    if settings.rate_limit_per_minute == 0:
        return None
    return MemoryCounter() if settings.redis_url is None else RedisCounter(settings.redis_url)


class RateLimit:
    """429 for a key that has used up its minute; on every other answer, how much is left."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal = scope.get("state", {}).get("principal")
        counter = None if principal is None else scope["app"].state.services.counter
        if counter is None:
            await self.app(scope, receive, send)
            return
        limit = scope["app"].state.services.settings.rate_limit_per_minute
        usage: Usage = await counter.count(principal.key_id)
        fields = rate_limit_fields(limit, usage)

        async def telling_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(fields)
            await send(message)

        if usage.requests > limit:
            answer = api_problem(scope, _refusal(limit, usage))
            await answer(scope, receive, telling_send)
            return
        await self.app(scope, receive, telling_send)


def rate_limit_fields(limit: int, usage: Usage) -> dict[str, str]:
    left = max(0, limit - usage.requests)
    return {
        "RateLimit-Policy": f'"{POLICY}";q={limit};w={WINDOW_SECONDS}',
        "RateLimit": f'"{POLICY}";r={left};t={_seconds(usage)}',
    }


def _refusal(limit: int, usage: Usage) -> ApiError:
    return ApiError(
        429,
        "rate-limit-exceeded",
        f"This API key has made its {limit} requests of a minute; ask again in "
        f"{_seconds(usage)} seconds.",
        title="Too many requests",
        headers={"Retry-After": str(_seconds(usage))},
    )


def _seconds(usage: Usage) -> int:
    return max(1, math.ceil(usage.ends_in))
