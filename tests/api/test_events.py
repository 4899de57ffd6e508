"""A job's history: JSON by cursor and the stream, which tells the same and then ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from api import events
from api.events import prefers_event_stream
from jobs.states import JobState
from tests.api.conftest import Service, assert_problem, serving, wait_for

STREAM = {"Accept": "text/event-stream"}


def progress(step: int) -> tuple[str, dict[str, Any]]:
    return "progress", {"stage": "distil", "step": step, "message": "ä\n\u2028step"}


@contextmanager
def stream(
    service: Service, job_id: str, **headers: str
) -> Iterator[tuple[httpx.Response, Iterator[dict[str, str]]]]:
    with service.client.stream(
        "GET", f"/v1/jobs/{job_id}/events", headers=STREAM | headers
    ) as answer:
        yield answer, parse(answer)


def parse(answer: httpx.Response) -> Iterator[dict[str, str]]:
    """As EventSource reads it; comments come as {"": ...}."""
    event: dict[str, str] = {}
    for line in lines(answer):
        if not line and event:
            yield event
            event = {}
        elif line:
            name, _, value = line.partition(": ")
            event[name] = value if name not in event else event[name] + "\n" + value


def lines(answer: httpx.Response) -> Iterator[str]:
    """At line feeds alone: str.splitlines would also break at U+2028."""
    left = b""
    for chunk in answer.iter_bytes():
        *whole, left = (left + chunk).split(b"\n")
        for line in whole:
            yield line.decode()


def test_pages_hold_every_event_once(service: Service) -> None:
    claim = service.claim(service.new_job())
    service.add_events(claim, *[progress(step) for step in range(7)])
    url = f"/v1/jobs/{claim.job_id}/events"
    numbers, after = [], 0
    while True:
        page = service.client.get(url, params={"after": after, "limit": 3}).json()
        numbers += [event["number"] for event in page["items"]]
        assert page["next"] == max([after, *[event["number"] for event in page["items"]]])
        assert not page["ended"]
        after = page["next"]
        if not page["items"]:
            break
    assert numbers == list(range(1, 10))
    service.finish(claim, report={"selection": None})
    last = service.client.get(url, params={"after": after}).json()
    assert [event["kind"] for event in last["items"]] == ["succeeded"]
    assert last["ended"]
    assert service.client.get(url, params={"limit": 3}).json()["ended"] is False


def test_the_stream_tells_the_same_and_ends_with_the_job(service: Service) -> None:
    claim = service.claim(service.new_job())
    service.add_events(claim, *[progress(step) for step in range(3)])
    with stream(service, claim.job_id) as (answer, told):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        seen = []
        for event in told:
            if "id" not in event:
                continue
            seen.append(event)
            if event["id"] == "5":  # all there was; what follows happens while we listen
                service.add_events(claim, progress(3))
            if event["id"] == "6":
                service.finish(claim, report={"selection": None})
    page = service.client.get(f"/v1/jobs/{claim.job_id}/events").json()
    assert [json.loads(event["data"]) for event in seen] == page["items"]
    assert [event["id"] for event in seen] == [str(item["number"]) for item in page["items"]]
    assert [event["event"] for event in seen] == [item["kind"] for item in page["items"]]
    assert seen[-1]["event"] == "succeeded"


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_broken_stream_is_taken_up_after_the_last_event_seen(
    service: Service, state: JobState
) -> None:
    claim = service.claim(service.new_job())
    service.add_events(claim, *[progress(step) for step in range(4)])
    service.finish(claim, state)
    with stream(service, claim.job_id, **{"Last-Event-ID": "4"}) as (_, told):
        assert [event["id"] for event in told if "id" in event] == ["5", "6", "7"]
    for seen in ("7", "999"):
        with stream(service, claim.job_id, **{"Last-Event-ID": seen}) as (_, told):
            assert [event for event in told if "id" in event] == []


def test_last_event_id_comes_before_after(service: Service) -> None:
    job_id = service.new_job()
    service.client.post(f"/v1/jobs/{job_id}/cancel")
    url = f"/v1/jobs/{job_id}/events?after=2"
    with service.client.stream("GET", url, headers=STREAM | {"Last-Event-ID": "1"}) as answer:
        assert [event["id"] for event in parse(answer) if "id" in event] == ["2"]


@pytest.mark.parametrize("seen", ["x", "-1", "1.5", "٣", "9999999999"])
def test_a_last_event_id_of_nobody_is_refused(service: Service, seen: str) -> None:
    answer = service.client.get(
        f"/v1/jobs/{service.new_job()}/events",
        headers=[(b"Accept", b"text/event-stream"), (b"Last-Event-ID", seen.encode())],
    )
    assert_problem(answer, 400, "invalid-last-event-id")


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=99999999999999", "limit=0"])
def test_a_bad_cursor_is_refused(service: Service, query: str) -> None:
    answer = service.client.get(f"/v1/jobs/{service.new_job()}/events?{query}")
    assert_problem(answer, 422, "invalid-request")


def test_an_unknown_job_is_a_problem_and_not_a_stream(service: Service) -> None:
    answer = service.client.get("/v1/jobs/job_absent/events", headers=STREAM)
    assert_problem(answer, 404, "not-found")


def test_head_of_a_stream_returns(service: Service) -> None:
    answer = service.client.head(f"/v1/jobs/{service.new_job()}/events", headers=STREAM)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_quiet_stream_is_kept_alive(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.1)
    with stream(service, service.new_job()) as (_, told):
        quiet = [event for event in (next(told) for _ in range(4)) if "id" not in event]
    assert {"": "ping"} in quiet


def test_open_streams_hold_no_connection_of_the_database(service: Service) -> None:
    """More of them than there are connections."""
    pool = service.services.database.engine.pool
    job_id = service.new_job()
    url = f"{service.url}/v1/jobs/{job_id}/events"
    headers = STREAM | {"Authorization": f"Bearer {service.key}"}
    limits = httpx.Limits(max_connections=50)
    ended = []

    def listen(client: httpx.Client) -> None:
        with client.stream("GET", url, headers=headers) as answer:
            ended.append([event.get("event") for event in parse(answer)][-1])

    with httpx.Client(trust_env=False, timeout=60, limits=limits) as client:
        threads = [threading.Thread(target=listen, args=(client,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        assert service.client.get(f"/v1/jobs/{job_id}").status_code == 200
        service.client.post(f"/v1/jobs/{job_id}/cancel")
        for thread in threads:
            thread.join(60)
    assert ended == ["cancelled"] * 40
    wait_for(lambda: pool.checkedout() == 0)  # type: ignore[attr-defined]


def test_a_server_that_stops_ends_its_streams(tmp_path: Any) -> None:
    with serving(tmp_path / "data") as service:
        job_id = service.new_job()
        headers = STREAM | {"Authorization": f"Bearer {service.key}"}
        reader = httpx.Client(trust_env=False, timeout=60)
        answer = reader.send(
            reader.build_request("GET", f"{service.url}/v1/jobs/{job_id}/events", headers=headers),
            stream=True,
        )
        told = parse(answer)
        while next(told).get("event") != "queued":
            pass
    # `serving` has returned: the stop did not wait for the reader.
    assert list(told) == []
    answer.close()
    reader.close()


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("text/event-stream", True),
        ("TEXT/Event-Stream; q=0.5", True),
        ("application/json, text/event-stream", True),
        ("application/json, text/event-stream;q=0.9", False),
        ("text/event-stream;q=0", False),
        ("*/*", False),
        ("application/json", False),
        ("", False),
        ("text/event-stream;q=nonsense", True),
    ],
)
def test_accept_decides(accept: str, wanted: bool) -> None:
    assert prefers_event_stream(accept) is wanted
