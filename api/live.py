"""Events of jobs as they happen, for many watchers in this process: one read for all of them.

Each watched job has a feed, a short window of its newest events ready to be sent. One task reads
what is new for all feeds together and has every watcher take it from there, so that a watcher
costs no poll of the database. A watcher pulls: nothing is kept for one that reads slowly, who finds
the window gone on and reads a page from the database instead.

That a job has moved is told by Redis where there is one (jobs.nudges), else by one shared query
every half second. Redis forgets whom it could not reach, so the query also comes every few seconds
where it is there. Numbers and cursors are the database's alone: no event is skipped or told twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice

import anyio
import structlog
from fastapi.sse import format_sse_event
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from api.auth import Principal
from api.errors import ApiError
from api.schemas import EventOut
from jobs import access, store
from jobs.db import Database
from jobs.nudges import EVENTS_CHANNEL
from jobs.settings import Settings

POLL_SECONDS = 0.5  # without Redis: between two looks at whether watched jobs have moved
REDIS_POLL_SECONDS = 5.0  # with it
KEY_SECONDS = 1.0  # between two looks at whether the watchers' keys still hold
MIN_PASS_SECONDS = 0.02  # events that come quicker are read together
PAGE = 200  # events of a job in one read for all
OWN_PAGE = 50  # and in one for a watcher who is behind
WINDOW_EVENTS = 256
WINDOW_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16  # sent to a watcher at once, beside the event that passes it
_JOBS_A_PASS = 100
_IDS_A_QUERY = 500
_REDIS_RETRY_SECONDS = 1.0
_REDIS_SILENCE_SECONDS = 10.0
_REDIS_TRUST_SECONDS = 3.0  # after its return; whoever publishes may notice that a little later

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """An event as it is sent. `read_in`: the pass that read it and then checked whose keys hold."""

    number: int
    content: bytes
    read_in: int


@dataclass(eq=False)
class Feed:
    """A watched job. The window holds the events after `floor` up to `last`, without gaps."""

    job_id: str
    floor: int
    last: int
    ended: bool = False
    window: deque[Entry] = field(default_factory=deque)
    window_bytes: int = 0
    watchers: set[Watcher] = field(default_factory=set)
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """All who wait; each asks for the event anew before it waits again."""
        woken, self.moved = self.moved, asyncio.Event()
        woken.set()

    def add(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.window.append(entry)
            self.window_bytes += len(entry.content)
            self.last = entry.number
        while self.window and (
            len(self.window) > WINDOW_EVENTS or self.window_bytes > WINDOW_BYTES
        ):
            gone = self.window.popleft()
            self.window_bytes -= len(gone.content)
            self.floor = gone.number


@dataclass(eq=False)
class Watcher:
    """One stream. `after`: the number of the last event taken; `holds`: whether its key does."""

    feed: Feed
    key_id: str
    after: int
    joined_in: int
    holds: bool = True

    def take(self) -> bytes | None:
        """What comes next, up to some CHUNK_BYTES; empty where nothing is new; None where the
        window does not have it, or where the pass that read it did not know this watcher's key
        yet: then it must be read for this watcher alone."""
        feed = self.feed
        if self.after >= feed.last:
            return b""
        if self.after < feed.floor:
            return None
        chunk, size = [], 0
        for entry in islice(feed.window, self.after - feed.floor, None):
            if entry.read_in <= self.joined_in:
                return None
            chunk.append(entry.content)
            size += len(entry.content)
            self.after = entry.number
            if size >= CHUNK_BYTES:
                break
        return b"".join(chunk)

    @property
    def is_done(self) -> bool:
        return self.feed.ended and self.after >= self.feed.last


@dataclass(frozen=True)
class _Found:
    entries: list[Entry]
    ended: bool
    is_full: bool


def as_sse(event: EventOut) -> bytes:
    return format_sse_event(
        data_str=event.model_dump_json(), event=event.kind, id=str(event.number)
    )


class LiveEvents:
    """The watched jobs of this process. All but the reads happens on the event loop."""

    def __init__(self, settings: Settings, database: Database, stopping: asyncio.Event) -> None:
        self._database = database
        self._stopping = stopping
        self._most = settings.event_streams
        self._most_per_project = settings.event_streams_per_project
        self._redis = None
        if settings.redis_url is not None:
            # No silent reconnection: while there is none, the query must come more often.
            self._redis = Redis.from_url(
                settings.redis_url, socket_connect_timeout=3, retry=Retry(NoBackoff(), 0)
            )
        self.redis_answers = False
        self._redis_trusted_at = 0.0
        self.streams: Counter[str] = Counter()  # open ones by project
        self._feeds: dict[str, Feed] = {}
        self._moved: dict[str, None] = {}  # ids of jobs to be read, the oldest nudge first
        self._anything_moved = asyncio.Event()
        self._pass = 0
        self._reads = anyio.CapacityLimiter(4)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def open_streams(self) -> int:
        return self.streams.total()

    @property
    def uses_redis(self) -> bool:
        return self._redis is not None

    def start(self) -> None:
        loops: list[Callable[[], Awaitable[None]]] = [self._read, self._poll]
        if self._redis is not None:
            loops.append(self._listen)
        self._tasks = [asyncio.create_task(self._keep_on(loop)) for loop in loops]
        self._tasks.append(asyncio.create_task(self._end_streams()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._redis is not None:
            await self._redis.aclose()

    async def read_page(self, watcher: Watcher) -> bytes:
        """For a watcher whom the window cannot serve; its key is looked at after its events, so
        that nothing newer than the key's end gets out. A few of them read at once."""

        def read() -> tuple[list[EventOut], bool]:
            with self._database.reading() as session:
                found = store.events_after(
                    session, watcher.feed.job_id, watcher.after, limit=OWN_PAGE
                )
                events = [EventOut.of(event) for event in found]
                return events, access.key_holds(session, watcher.key_id)

        events, watcher.holds = await anyio.to_thread.run_sync(read, limiter=self._reads)
        if not events:  # they went with their job: there is nothing to wait for
            watcher.after = max(watcher.after, watcher.feed.last)
        content = b""
        for event in events if watcher.holds else ():
            content += as_sse(event)
            watcher.after = event.number
            if len(content) >= CHUNK_BYTES:
                break  # a watcher that takes nothing must not keep more of it
        return content

    @contextmanager
    def watching(
        self, job_id: str, principal: Principal, *, after: int, last: int
    ) -> Iterator[Watcher]:
        """A watcher of what comes after the event `after`; `last` is the job's last so far.
        ApiError where there are too many streams already."""
        self._admit(principal.project_id)
        feed = self._feeds.setdefault(job_id, Feed(job_id, floor=last, last=last))
        watcher = Watcher(feed, principal.key_id, after, joined_in=self._pass)
        feed.watchers.add(watcher)
        self.streams[principal.project_id] += 1
        self._mark([job_id])  # what came between the first page and this
        try:
            yield watcher
        finally:
            self.streams[principal.project_id] -= 1
            if not self.streams[principal.project_id]:
                del self.streams[principal.project_id]
            feed.watchers.discard(watcher)
            if not feed.watchers:
                self._feeds.pop(job_id, None)

    def _admit(self, project_id: str) -> None:
        advice = "close some, or read the same events as JSON with ?after= (see `next`)."
        if self.streams[project_id] >= self._most_per_project:
            raise ApiError(
                429,
                "too-many-event-streams",
                f"This project has {self._most_per_project} event streams open, as many as it "
                f"may: {advice}",
                headers={"Retry-After": "10"},
            )
        if self.open_streams >= self._most:
            raise ApiError(
                503,
                "too-many-event-streams",
                f"This server has {self._most} event streams open, as many as it may: {advice}",
                headers={"Retry-After": "10"},
            )

    def _mark(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            if job_id in self._feeds:
                self._moved[job_id] = None
                self._anything_moved.set()

    async def _keep_on(self, loop: Callable[[], Awaitable[None]]) -> None:
        """A database or a Redis that is away ends no stream: what was missed is read later."""
        told = 0.0
        while True:
            try:
                await loop()
            except Exception as error:
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    known = isinstance(error, RedisError | OSError)
                    log.warning("live events wait", error=str(error), exc_info=not known)
            self.redis_answers = self.redis_answers and loop != self._listen
            await asyncio.sleep(_REDIS_RETRY_SECONDS)

    async def _end_streams(self) -> None:
        await self._stopping.wait()
        for feed in self._feeds.values():
            feed.wake()

    # --- what is new, for all watchers ------------------------------------------------------

    async def _read(self) -> None:
        while True:
            await self._anything_moved.wait()
            started = time.monotonic()
            feeds = []
            for job_id in list(islice(self._moved, _JOBS_A_PASS)):
                del self._moved[job_id]
                if job_id in self._feeds:
                    feeds.append(self._feeds[job_id])
            if not self._moved:
                self._anything_moved.clear()
            jobs = {feed.job_id: feed.last for feed in feeds}
            keys = {watcher.key_id for feed in feeds for watcher in feed.watchers}
            self._pass += 1
            try:
                found, holding = await anyio.to_thread.run_sync(
                    self._look, jobs, keys, self._pass, limiter=self._reads
                )
            except Exception:
                self._mark(jobs)
                raise
            for feed in feeds:  # some of which nobody watches any more
                self._publish(feed, found[feed.job_id], keys - holding)
            await asyncio.sleep(max(0.0, MIN_PASS_SECONDS - (time.monotonic() - started)))

    def _look(
        self, jobs: dict[str, int], keys: set[str], number: int
    ) -> tuple[dict[str, _Found], set[str]]:
        """Events first and keys after them: see `read_page`."""
        found = {}
        with self._database.reading() as session:
            heads = store.event_heads(session, list(jobs))
            for job_id, after in jobs.items():
                if job_id not in heads:
                    found[job_id] = _Found([], ended=True, is_full=False)  # it was deleted
                    continue
                events = [
                    EventOut.of(event)
                    for event in store.events_after(session, job_id, after, limit=PAGE)
                ]
                entries = [Entry(event.number, as_sse(event), number) for event in events]
                reached = entries[-1].number if entries else after
                head = heads[job_id]
                ended = head.state.is_final and reached >= head.last_event
                found[job_id] = _Found(entries, ended, is_full=len(entries) == PAGE)
            return found, access.holding_keys(session, keys)

    def _publish(self, feed: Feed, found: _Found, gone: set[str]) -> None:
        for watcher in feed.watchers:
            if watcher.key_id in gone:
                watcher.holds = False
        feed.add(found.entries)
        if found.entries or found.ended != feed.ended or gone:
            feed.ended = found.ended
            feed.wake()
        if found.is_full:
            self._mark([feed.job_id])

    # --- who has moved ----------------------------------------------------------------------

    async def _poll(self) -> None:
        """One query for all watched jobs, and one for all keys."""
        next_keys = next_jobs = 0.0
        while True:
            await asyncio.sleep(POLL_SECONDS)
            at = time.monotonic()
            if not self._feeds:
                continue
            jobs = {}
            if at >= next_jobs or not self.redis_answers or at < self._redis_trusted_at:
                next_jobs = at + REDIS_POLL_SECONDS
                jobs = {job_id: (feed.last, feed.ended) for job_id, feed in self._feeds.items()}
            keys: set[str] = set()
            if at >= next_keys:
                next_keys = at + KEY_SECONDS - POLL_SECONDS / 2
                keys = {each.key_id for feed in self._feeds.values() for each in feed.watchers}
            moved, holding = await anyio.to_thread.run_sync(
                self._look_around, jobs, keys, limiter=self._reads
            )
            self._mark(moved)
            for feed in self._feeds.values():
                gone = [each for each in feed.watchers if each.key_id in keys - holding]
                for watcher in gone:
                    watcher.holds = False
                if gone:
                    feed.wake()

    def _look_around(
        self, jobs: dict[str, tuple[int, bool]], keys: set[str]
    ) -> tuple[list[str], set[str]]:
        moved: list[str] = []
        holding: set[str] = set()
        with self._database.reading() as session:
            for ids in _in_portions(jobs):
                heads = store.event_heads(session, ids)
                for job_id in ids:
                    last, ended = jobs[job_id]
                    head = heads.get(job_id)
                    is_over = head is None or (head.state.is_final and last >= head.last_event)
                    if is_over != ended or (head is not None and head.last_event > last):
                        moved.append(job_id)
            for ids in _in_portions(keys):
                holding |= access.holding_keys(session, ids)
        return moved, holding

    async def _listen(self) -> None:
        assert self._redis is not None
        async with self._redis.pubsub() as subscription:
            await subscription.subscribe(EVENTS_CHANNEL)
            heard = time.monotonic()
            while True:
                message = await subscription.get_message(timeout=_REDIS_SILENCE_SECONDS / 3)
                at = time.monotonic()
                if message is None:
                    if at - heard > _REDIS_SILENCE_SECONDS:
                        raise TimeoutError("Redis is silent")
                    await subscription.ping()
                    continue
                heard = at
                if message["type"] == "subscribe":
                    self.redis_answers = True
                    self._redis_trusted_at = at + _REDIS_TRUST_SECONDS
                    self._mark(list(self._feeds))  # nudges before this were lost
                elif message["type"] == "message":
                    with suppress(UnicodeDecodeError):
                        self._mark([message["data"].decode()])


def _in_portions(ids: Iterable[str]) -> Iterator[list[str]]:
    """As many as one query may name."""
    left = list(ids)
    while left:
        yield left[:_IDS_A_QUERY]
        left = left[_IDS_A_QUERY:]
