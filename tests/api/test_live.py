"""Many watchers, slow ones, too many of them, and a Redis that goes and comes back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from api import live
from api.live import CHUNK_BYTES, WINDOW_BYTES, WINDOW_EVENTS, Entry, Feed, Watcher
from jobs import nudges, store
from jobs.db import Database
from jobs.roles import Role
from jobs.states import JobState
from tests import services
from tests.api.conftest import Service, assert_problem, serving, wait_for

STREAM = {"Accept": "text/event-stream"}
WATCHERS = 300


def progress(step: int, message: str = "") -> tuple[str, dict[str, Any]]:
    return "progress", {"stage": "distil", "step": step, "message": message}


def ids_in(content: bytes) -> list[int]:
    return [int(line[4:]) for line in content.split(b"\n") if line.startswith(b"id: ")]


def ids(answer: httpx.Response) -> Iterator[int]:
    """As they come, until the stream ends."""
    left = b""
    for chunk in answer.iter_raw():
        *lines, left = (left + chunk).split(b"\n")
        yield from ids_in(b"\n".join(lines))


async def watch(service: Service, job_id: str, seen: list[int]) -> None:
    """Every id that comes, until the stream ends. A bare connection: hundreds cost little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(request_of(service, job_id))
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    while line := await reader.readline():
        seen += ids_in(line.rstrip())
    writer.close()
    await writer.wait_closed()


def request_of(service: Service, job_id: str) -> bytes:
    lines = (
        f"GET /v1/jobs/{job_id}/events HTTP/1.1",
        "Host: x",
        "Accept: text/event-stream",
        f"Authorization: Bearer {service.key}",
        "Connection: close",
    )
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def statements_of(service: Service, words: str) -> Iterator[list[str]]:
    found: list[str] = []

    def note(_: Any, __: Any, statement: str, *more: Any) -> None:
        if words in statement:
            found.append(statement)

    engine = service.services.database.engine
    event.listen(engine, "before_cursor_execute", note)
    yield found
    event.remove(engine, "before_cursor_execute", note)


def test_three_hundred_watchers_of_one_job_read_the_database_as_one(service: Service) -> None:
    claim = service.claim(service.new_job())

    async def all_of_them() -> list[list[int]]:
        seen: list[list[int]] = [[] for _ in range(WATCHERS)]
        watchers = [asyncio.create_task(watch(service, claim.job_id, each)) for each in seen]
        while min(len(each) for each in seen) < 2:  # what there was when they came
            await asyncio.sleep(0.01)
        with statements_of(service, "FROM events") as reads:
            for step in range(5):
                service.add_events(claim, progress(step), progress(step))
                while min(len(each) for each in seen) < 4 + 2 * step:
                    await asyncio.sleep(0.01)
            service.finish(claim, report={"selection": None})
            await asyncio.gather(*watchers)
        assert len(reads) < 60  # a poll for each would be more than a thousand
        return seen

    assert asyncio.run(all_of_them()) == [list(range(1, 14))] * WATCHERS
    wait_for(lambda: service.services.live.streams.total() == 0)


def test_who_waits_asks_nothing_of_the_database(service: Service) -> None:
    """A poll is one query for all jobs and one for all keys, however many watch."""
    jobs = [service.new_job() for _ in range(3)]

    async def wait_for_polls() -> None:
        seen: list[list[int]] = [[] for _ in range(30)]
        watchers = [
            asyncio.create_task(watch(service, jobs[index % 3], each))
            for index, each in enumerate(seen)
        ]
        while not all(seen):
            await asyncio.sleep(0.01)
        with statements_of(service, "") as every:
            while len([each for each in every if "FROM jobs" in each]) < 4:
                await asyncio.sleep(0.01)
            assert len(every) < 30  # a poll for each watcher would be 30 a look
        for job_id in jobs:
            service.client.post(f"/v1/jobs/{job_id}/cancel")
        await asyncio.gather(*watchers)
        assert seen == [[1, 2]] * 30

    asyncio.run(wait_for_polls())


def test_a_slow_watcher_holds_nobody_up_and_is_told_everything(service: Service) -> None:
    claim = service.claim(service.new_job())
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.connect(("127.0.0.1", service.port))
        slow.sendall(request_of(service, claim.job_id))
        wait_for(lambda: claim.job_id in service.services.live._feeds)
        feed = service.services.live._feeds[claim.job_id]
        (watcher,) = feed.watchers
        with service.client.stream(
            "GET", f"/v1/jobs/{claim.job_id}/events", headers=STREAM
        ) as quick:
            told, seen = ids(quick), [0]
            for start in range(0, 1200, 100):
                steps = range(start, start + 100)
                service.add_events(claim, *[progress(step, "x" * 8000) for step in steps])
                while seen[-1] < start + 102:
                    seen.append(next(told))
            assert seen == list(range(1203))
            assert len(feed.window) <= WINDOW_EVENTS
            assert feed.window_bytes <= WINDOW_BYTES
            assert watcher.after < feed.floor  # it has fallen behind what is kept
            service.finish(claim, report={"selection": None})
        content = b""
        while chunk := slow.recv(1 << 20):
            content += chunk
    assert content.startswith(b"HTTP/1.1 200")
    # The ids of a chunked body, some of which a border of chunks may have cut in two.
    assert b"event: succeeded" in content
    body = unchunked(content.partition(b"\r\n\r\n")[2])
    assert ids_in(body) == list(range(1, 1204))


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return whole


def test_too_many_watchers_are_told_so(tmp_path: Path) -> None:
    limits = {"event_streams": 3, "event_streams_per_project": 2}
    with serving(tmp_path / "data", **limits) as service:
        url = f"/v1/jobs/{service.new_job()}/events"
        other = service.new_key(Role.VIEWER, project_id=service.new_project())
        streams = []

        def watch(client: httpx.Client) -> httpx.Response:
            answer = client.send(client.build_request("GET", url, headers=STREAM), stream=True)
            if answer.status_code == 200:
                streams.append(answer)
            else:
                answer.read()
            return answer

        for _ in range(2):
            assert watch(service.client).status_code == 200
        problem = assert_problem(watch(service.client), 429, "too-many-event-streams")
        assert "?after=" in problem["detail"]
        assert watch(service.client).headers["retry-after"] == "10"
        assert service.client.head(url, headers=STREAM).status_code == 200
        assert service.client.get(url).status_code == 200
        # Another project's are counted for themselves, up to what this process can bear.
        service.services.live.streams[other.id] += 1
        streams.pop().close()
        wait_for(lambda: service.services.live.streams.total() == 2)
        assert watch(service.client).status_code == 200
        service.services.live.streams["prj_third"] += 1
        streams.pop().close()
        wait_for(lambda: service.services.live.streams.total() == 3)
        assert_problem(watch(service.client), 503, "too-many-event-streams")
        for answer in streams:
            answer.close()


def test_redis_tells_at_once_and_its_loss_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(live, "REDIS_POLL_SECONDS", 3600)  # what comes then, comes by Redis
    monkeypatch.setattr(live, "_REDIS_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(live, "_REDIS_TRUST_SECONDS", 0)
    monkeypatch.setattr(nudges, "_REDIS_PAUSE_SECONDS", 0)
    port = services.free_port()
    first = services.redis_server(port=port)
    url = first.__enter__()
    with serving(tmp_path / "data", broker_url=url, rate_limit_per_minute=0) as service:
        events = service.services.live
        wait_for(lambda: events.redis_answers)
        claim = service.claim(service.new_job())
        with service.client.stream(
            "GET", f"/v1/jobs/{claim.job_id}/events", headers=STREAM
        ) as answer:
            told, seen = ids(answer), [0]

            def wait_for_ids(last: int) -> None:
                while seen[-1] < last:
                    seen.append(next(told))

            wait_for_ids(2)
            wait_for(lambda: not events._moved)
            service.add_events(claim, progress(0))
            wait_for_ids(3)
            first.__exit__(None, None, None)
            wait_for(lambda: not events.redis_answers)
            service.add_events(claim, progress(1), progress(2))
            wait_for_ids(5)
            with services.redis_server(port=port):
                wait_for(lambda: events.redis_answers)
                service.add_events(claim, progress(3))
                wait_for_ids(6)
                service.finish(claim, JobState.FAILED, error={"code": "x", "message": "x"})
                wait_for_ids(7)
                assert list(told) == []
        assert seen == list(range(8))


def test_a_redis_that_has_just_come_is_not_relied_on(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may not have noticed yet, and publish nothing."""
    monkeypatch.setattr(live, "REDIS_POLL_SECONDS", 3600)
    monkeypatch.setattr(live, "_REDIS_TRUST_SECONDS", 3600)
    with serving(tmp_path / "data", broker_url=redis_url) as service:
        claim = service.claim(service.new_job())
        wait_for(lambda: service.services.live.redis_answers)
        silent = Database(service.settings.database_url)
        url = f"/v1/jobs/{claim.job_id}/events"
        with service.client.stream("GET", url, headers=STREAM) as answer:
            told = ids(answer)
            assert [next(told), next(told)] == [1, 2]
            with silent.transaction() as session:
                store.append_events(session, claim, [progress(0)])
            assert next(told) == 3
        silent.close()


def test_processes_on_one_redis_tell_each_others_watchers(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REDIS_POLL_SECONDS", 3600)
    monkeypatch.setattr(live, "_REDIS_TRUST_SECONDS", 0)
    settings: dict[str, Any] = {"broker_url": redis_url, "rate_limit_per_minute": 0}
    with (
        serving(tmp_path / "data", **settings) as writer,
        serving(tmp_path / "data", **settings) as teller,
    ):
        claim = writer.claim(writer.new_job())
        wait_for(lambda: teller.services.live.redis_answers)
        url = f"/v1/jobs/{claim.job_id}/events"
        with teller.client.stream("GET", url, headers=STREAM) as answer:
            told = ids(answer)
            seen = [next(told), next(told)]
            wait_for(lambda: not teller.services.live._moved)
            writer.finish(claim, report={"selection": None})
            assert [*seen, *told] == [1, 2, 3]


def test_the_database_away_for_a_while_ends_no_stream(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = service.claim(service.new_job())
    events = service.services.live
    looks = []

    def broken(*_: Any) -> Any:
        looks.append(1)
        raise OSError("the database is away")

    with service.client.stream("GET", f"/v1/jobs/{claim.job_id}/events", headers=STREAM) as answer:
        told = ids(answer)
        assert [next(told), next(told)] == [1, 2]
        with monkeypatch.context() as patch:
            patch.setattr(events, "_look", broken)
            service.add_events(claim, progress(0))
            wait_for(lambda: looks)
        service.finish(claim, report={"selection": None})
        assert list(told) == [3, 4]


# --- the window -----------------------------------------------------------------------------


def feed_of(*numbers: int, read_in: int = 1, size: int = 10) -> Feed:
    feed = Feed("job_x", floor=0, last=0)
    feed.add([Entry(number, b"%d," % number + b"x" * size, read_in) for number in numbers])
    return feed


def test_a_watcher_behind_the_window_of_a_deleted_job_is_done(service: Service) -> None:
    """What it still wanted is not there any more, and it must not wait for it."""
    job_id = service.new_job()
    claim = service.claim(job_id)
    service.add_events(claim, *(progress(step) for step in range(5)))
    feed = Feed(job_id, floor=4, last=7)
    watcher = Watcher(feed, service.new_key(Role.VIEWER).id, after=2, joined_in=0)
    feed.watchers.add(watcher)
    assert watcher.take() is None
    service.finish(claim, JobState.CANCELLED)
    assert service.client.delete(f"/v1/jobs/{job_id}").status_code == 204

    async def read() -> bytes:
        reader = live.LiveEvents(service.settings, service.services.database, asyncio.Event())
        found, _ = reader._look({job_id: feed.last}, {watcher.key_id}, 1)
        reader._publish(feed, found[job_id], set())
        return await reader.read_page(watcher)

    assert asyncio.run(read()) == b""
    assert watcher.holds
    assert watcher.is_done


def test_the_window_keeps_the_newest_and_says_what_it_lacks() -> None:
    feed = feed_of(*range(1, WINDOW_EVENTS + 11))
    assert (feed.floor, feed.last, len(feed.window)) == (10, WINDOW_EVENTS + 10, WINDOW_EVENTS)
    assert Watcher(feed, "key", after=9, joined_in=0).take() is None
    at_floor = Watcher(feed, "key", after=10, joined_in=0)
    assert at_floor.take()
    assert at_floor.after == feed.last
    assert at_floor.take() == b""
    assert Watcher(feed, "key", after=10**6, joined_in=0).take() == b""
    large = feed_of(*range(1, 9), size=WINDOW_BYTES // 4)
    assert large.window_bytes <= WINDOW_BYTES
    assert large.last == 8


def test_a_watcher_takes_a_bounded_chunk_in_order() -> None:
    feed = feed_of(*range(1, 11), size=CHUNK_BYTES // 3)
    watcher = Watcher(feed, "key", after=2, joined_in=0)
    taken = []
    while chunk := watcher.take():
        assert len(chunk) < 2 * CHUNK_BYTES
        taken += [int(part.rpartition(b"x")[2]) for part in chunk.split(b",")[:-1]]
    assert taken == list(range(3, 11))


def test_what_was_read_before_a_watcher_came_is_not_taken_unchecked() -> None:
    feed = feed_of(1, 2, read_in=4)
    feed.add([Entry(3, b"3", 5)])
    assert Watcher(feed, "key", after=0, joined_in=4).take() is None
    assert Watcher(feed, "key", after=2, joined_in=4).take() == b"3"
    assert Watcher(feed, "key", after=0, joined_in=3).take() is not None
