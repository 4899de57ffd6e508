"""Pages of other origins: none by default, those of the settings else."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.conftest import Service, assert_problem, serving

PORTAL = "https://portal.example"


@pytest.fixture(scope="module")
def open_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("cors") / "data", cors_origins=(PORTAL,)) as running:
        yield running


def preflight(service: Service, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,"
        "last-event-id,range",
    }
    return httpx.options(f"{service.url}/v1/jobs", headers=headers, trust_env=False)


def test_a_page_of_the_portal_may_ask_before_it_has_a_key(open_service: Service) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer = preflight(open_service, PORTAL, method)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PORTAL
        assert method in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert {"authorization", "content-type", "last-event-id", "range"} <= {
            name.strip() for name in allowed.split(",")
        }
        assert "access-control-allow-credentials" not in answer.headers


def test_the_portal_reads_answers_errors_and_their_headers(open_service: Service) -> None:
    answer = open_service.client.get("/v1/jobs", headers={"Origin": PORTAL})
    assert answer.headers["access-control-allow-origin"] == PORTAL
    assert "Origin" in answer.headers["vary"]
    exposed = answer.headers["access-control-expose-headers"]
    for name in ("Location", "ETag", "Repr-Digest", "RateLimit", "Retry-After", "X-Request-ID"):
        assert name in exposed
    refused = httpx.get(f"{open_service.url}/v1/jobs", headers={"Origin": PORTAL}, trust_env=False)
    assert_problem(refused, 401, "missing-api-key")
    assert refused.headers["access-control-allow-origin"] == PORTAL


def test_the_portal_reads_a_fault_of_ours_too(open_service: Service) -> None:
    engine = open_service.services.database.engine
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO jobs_away")
    try:
        answer = open_service.client.get("/v1/jobs", headers={"Origin": PORTAL})
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE jobs_away RENAME TO jobs")
    assert_problem(answer, 500, "internal-error")
    assert answer.headers["access-control-allow-origin"] == PORTAL


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "https://portal.example.evil", "http://portal.example", "null"],
)
def test_pages_of_other_origins_stay_out(open_service: Service, origin: str) -> None:
    assert preflight(open_service, origin).status_code == 400
    answer = open_service.client.get("/v1/jobs", headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_by_default_no_page_of_another_origin_may(service: Service) -> None:
    assert preflight(service, PORTAL).status_code == 401
    answer = service.client.get("/v1/jobs", headers={"Origin": PORTAL})
    assert not [name for name in answer.headers if name.startswith("access-control")]
