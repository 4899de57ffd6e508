"""Rate limits by key: the counters, and what answers tell of them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import redis

from api.limits import MemoryCounter, RedisCounter, Usage, rate_limit_fields
from jobs.roles import Role
from tests.api.conftest import Service, assert_problem, serving
from tests.services import free_port


def left_of(answer: httpx.Response) -> int:
    match = re.fullmatch(r'"key";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert match is not None
    assert 1 <= int(match[2]) <= 60
    return int(match[1])


def test_a_key_that_has_used_up_its_minute_waits_and_others_do_not(tmp_path: Path) -> None:
    with serving(tmp_path / "data", rate_limit_per_minute=3) as service:
        client = service.as_key(service.new_key(Role.VIEWER).secret)
        # Whatever the answer is, it counts.
        paths = ("/v1/jobs", "/v1/keys", "/v1/jobs/job_absent")
        answers = [client.get(path) for path in paths]
        assert [answer.status_code for answer in answers] == [200, 403, 404]
        assert [left_of(answer) for answer in answers] == [2, 1, 0]
        assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"key";q=3;w=60'}
        for _ in range(2):
            answer = client.get("/v1/jobs")
            assert_problem(answer, 429, "rate-limit-exceeded")
            assert left_of(answer) == 0
            assert f"t={answer.headers['retry-after']}" in answer.headers["ratelimit"]
        assert left_of(service.client.get("/v1/jobs")) == 2
        assert client.get("/healthz").status_code == 200
        refused = httpx.get(f"{service.url}/v1/jobs", trust_env=False)
        assert refused.status_code == 401
        assert "ratelimit" not in refused.headers


def test_processes_on_one_redis_count_together(tmp_path: Path, redis_url: str) -> None:
    data = tmp_path / "data"
    settings = {"rate_limit_per_minute": 5, "broker_url": redis_url}
    counters = "widthwise:requests:*"
    with redis.Redis.from_url(redis_url) as client:
        others = set(client.scan_iter(counters))  # of tests that had this Redis before
    with serving(data, **settings) as first, serving(data, **settings) as second:
        asked = [service.client.get("/v1/jobs") for service in 3 * (first, second)]
        assert [answer.status_code for answer in asked] == [200] * 5 + [429]
        assert [left_of(answer) for answer in asked] == [4, 3, 2, 1, 0, 0]
    with redis.Redis.from_url(redis_url) as client:
        (name,) = set(client.scan_iter(counters)) - others
        assert 0 < client.ttl(name) <= 60  # it goes by itself
        client.delete(name)


def test_without_a_limit_nothing_is_counted(tmp_path: Path) -> None:
    with serving(tmp_path / "data", rate_limit_per_minute=0) as service:
        answer = service.client.get("/v1/jobs")
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("ratelimit")]


def test_by_default_a_minute_has_room_for_a_busy_pipeline(service: Service) -> None:
    assert service.client.get("/v1/jobs").headers["ratelimit-policy"] == '"key";q=3000;w=60'


def test_a_window_begins_with_the_first_request_and_ends_after_a_minute() -> None:
    at = 1000.0
    counter = MemoryCounter(lambda: at)

    async def asks() -> None:
        nonlocal at
        assert await counter.count("a") == Usage(1, 60)
        at = 1059.5
        assert await counter.count("a") == Usage(2, 0.5)
        assert await counter.count("b") == Usage(1, 60)
        at = 1060.0
        assert await counter.count("a") == Usage(1, 60)
        assert await counter.count("b") == Usage(2, 59.5)

    asyncio.run(asks())


def test_a_redis_that_is_gone_stops_nobody() -> None:
    async def asks() -> list[int]:
        counter = RedisCounter(f"redis://127.0.0.1:{free_port()}/0")
        usages = [await counter.count("a") for _ in range(3)]
        await counter.close()
        return [usage.requests for usage in usages]

    assert asyncio.run(asks()) == [1, 2, 3]


def test_what_is_left_is_never_negative_and_time_is_rounded_up() -> None:
    fields = rate_limit_fields(2, Usage(requests=5, ends_in=0.01))
    assert fields["RateLimit"] == '"key";r=0;t=1'
