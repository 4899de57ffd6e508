"""Problem details for whatever goes wrong, and what the log says of it."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import structlog

from api.errors import json_pointer
from tests.api.conftest import Service, assert_problem, serving, wait_for
from tests.services import free_port, new_database, postgresql_folder, running_postgresql


def test_an_unknown_path_is_a_problem(client: httpx.Client) -> None:
    for path in ("/nope", "/v1/nope", "/docs/nope.js", "/v1/jobs/job_x/nope"):
        assert_problem(client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/job_absent",
        "/v1/models/mdl_absent",
        "/v1/datasets/dst_absent",
        "/v1/artifacts/art_absent",
        "/v1/artifacts/art_absent/content",
        "/v1/jobs/job_absent/events",
        "/v1/jobs/job_absent/subnetworks",
        "/v1/jobs/job_absent/artifacts",
        "/v1/jobs/..%2F..%2Fetc",
        "/v1/jobs/'%20OR%201=1",
        "/v1/jobs?after=job_absent",
    ],
)
def test_an_unknown_id_is_a_problem(client: httpx.Client, path: str) -> None:
    assert_problem(client.get(path), 404, "not-found")


def test_what_cannot_be_an_id_is_refused_on_every_database(
    database_url: str, tmp_path: Path
) -> None:
    with serving(tmp_path / "data", database_url=database_url) as service:
        for text in ("%00", "a%00b", 1000 * "x"):
            for path in (f"/v1/jobs/{text}", f"/v1/models?after={text}"):
                assert_problem(service.client.get(path), 422, "invalid-request")
        for text in ("%FF", "%F0%9F%98%80", "'", "%25", "..%2f"):
            assert_problem(service.client.get(f"/v1/jobs/{text}"), 404, "not-found")
        job = {"model": "a\0b", "dataset": "\0"}
        assert_problem(service.client.post("/v1/jobs", json=job), 422, "invalid-request")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/jobs", "GET, HEAD, POST"),
        ("PATCH", "/v1/jobs/job_x", "DELETE, GET, HEAD"),
        ("GET", "/v1/jobs/job_x/cancel", "POST"),
        ("HEAD", "/v1/jobs/job_x/cancel", "POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD, POST, PUT"),
    ],
)
def test_a_wrong_method_names_the_right_ones(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert_problem(answer, 405, "method-not-allowed")
    assert answer.status_code == 405


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/docs", "/openapi.json", "/v1/jobs", "/v1/models"]
)
def test_head_works_where_get_does(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers["content-type"] == client.get(path).headers["content-type"]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=201", "limit=1e3", "limit=99999999999999999999", "limit=",
     "state=sleeping", "after=" + 65 * "x"],
)  # fmt: skip
def test_a_bad_parameter_is_named(client: httpx.Client, query: str) -> None:
    problem = assert_problem(client.get(f"/v1/jobs?{query}"), 422, "invalid-request")
    assert problem["errors"][0]["parameter"] == query.partition("=")[0]
    assert "pointer" not in problem


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1/jobs?aftr=job_x&limit=1", "there are after, limit, state"),
        ("/v1/jobs?limit=1&Limit=2", "there are after, limit, state"),
        ("/v1/jobs?=", "there are after, limit, state"),
        ("/v1/me?verbose", "there are none"),
    ],
)
def test_a_parameter_that_is_not_known_is_named(client: httpx.Client, path: str, told: str) -> None:
    problem = assert_problem(client.get(path), 422, "invalid-request")
    wrong = {"aftr", "Limit", "", "verbose"}
    (entry,) = problem["errors"]
    assert entry["parameter"] in wrong
    assert told in entry["detail"]
    assert client.head(path).status_code == 422


def test_no_route_below_v1_passes_over_a_parameter(service: Service) -> None:
    """And each takes those that the document lists: what is wrong with them is another thing."""
    document = service.client.get("/openapi.json").json()
    asked = 0
    for path, operations in document["paths"].items():
        url = re.sub(r"{[a-z_]+}", "absent", path)
        for method, operation in operations.items():
            listed = [
                each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"
            ]
            if not path.startswith("/v1"):
                assert listed == []
                continue
            headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "1", "Upload-Offset": "0"}
            for name in [*listed, "unlisted"]:
                answer = service.client.request(
                    method, url, params={name: "x"}, headers=headers, json={"name": "x"}
                )
                errors = answer.json().get("errors", []) if answer.content else []
                unknown = [each for each in errors if "no such parameter" in each["detail"]]
                if name == "unlisted" and not any("pointer" in each for each in errors):
                    assert answer.status_code == 422, (method, path, answer.text)
                    assert [each["parameter"] for each in unknown] == ["unlisted"]
                    asked += 1
                else:
                    assert unknown == [], (method, path)
    assert asked > 50


def test_what_is_no_route_of_the_api_may_be_asked_with_anything(client: httpx.Client) -> None:
    for path in ("/healthz?verbose", "/readyz?t=1", "/docs?x", "/docs/swagger-ui.css?v=2",
                 "/openapi.json?x=1"):  # fmt: skip
        assert client.get(path).status_code == 200, path
        assert client.head(path).status_code == 200, path


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"model": NaN', b"[" * 100_000])
def test_a_body_that_is_not_json_is_a_problem(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_another_media_type_is_refused(client: httpx.Client) -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.post("/v1/jobs", content=b"{}", headers={"Content-Type": media_type})
        assert_problem(answer, 415, "unsupported-media-type")


def test_a_large_json_body_is_refused(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/jobs", content=b" " * (2**20 + 1), headers={"Content-Type": "application/json"}
    )
    assert_problem(answer, 413, "content-too-large")


def test_a_fault_is_told_in_the_log_and_not_in_the_answer(service: Service) -> None:
    with service.services.database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO jobs_away")
    try:
        with structlog.testing.capture_logs() as log:
            answer = service.client.get("/v1/jobs", headers={"X-Request-ID": "abc-1"})
    finally:
        with service.services.database.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE jobs_away RENAME TO jobs")
    problem = assert_problem(answer, 500, "internal-error")
    assert problem["request_id"] == answer.headers["x-request-id"] == "abc-1"
    assert "jobs" not in problem["detail"]
    faults = [line for line in log if line["event"] == "request.fault"]
    assert [fault["request_id"] for fault in faults] == ["abc-1"]


def test_a_database_that_is_away_is_told_as_such(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        file = service.settings.data_dir / "widthwise.db"
        service.services.database.close()  # its connections; new ones find no database
        files = [path for path in file.parent.iterdir() if path.name.startswith(file.name)]
        away = tmp_path / "away"
        away.mkdir()
        for path in files:
            path.rename(away / path.name)
        file.mkdir()
        with structlog.testing.capture_logs() as log:
            answers = [
                service.client.get("/v1/jobs"),
                service.client.post("/v1/jobs", json={}, headers={"Idempotency-Key": "k"}),
            ]
        for answer in answers:
            problem = assert_problem(answer, 503, "database-unreachable")
            assert problem["request_id"] == answer.headers["x-request-id"]
            assert answer.headers["retry-after"] == "5"
        told = [line["event"] for line in log if line["event"].startswith("request.")]
        assert told == 2 * ["request.without_database"]
        file.rmdir()
        for path in away.iterdir():
            path.rename(file.parent / path.name)
        assert service.client.get("/v1/jobs").status_code == 200


def test_requests_are_logged_without_keys(service: Service) -> None:
    with structlog.testing.capture_logs() as log:
        service.client.get(f"/v1/jobs?key={service.key}", headers={"X-Api-Key": service.key})
        service.client.get("/v1/jobs", headers={"X-Request-ID": "a\tb " + service.key})
        # A request's line comes after its answer.
        wait_for(lambda: sum(line["event"] == "request" for line in log) == 2)
    lines = [line for line in log if line["event"] == "request"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("GET", "/v1/jobs", 422),
        ("GET", "/v1/jobs", 200),
    ]
    assert service.key not in repr(log)


def test_pointers_are_escaped() -> None:
    assert json_pointer(["spec", "a/b~c", 2]) == "/spec/a~1b~0c/2"
    assert json_pointer([]) == ""


def test_a_database_that_is_away_is_told_and_may_come_back(tmp_path: Path) -> None:
    port = free_port()
    with postgresql_folder() as folder, ExitStack() as clean:
        with running_postgresql(folder, port=port) as server:
            url = new_database(server, "away")
            service = clean.enter_context(serving(tmp_path / "data", database_url=url))
            assert service.client.get("/v1/jobs").status_code == 200
        for _ in range(2):  # by the connections that are broken, then by those that cannot be made
            answer = service.client.get("/v1/jobs")
            assert_problem(answer, 503, "database-unreachable")
            assert int(answer.headers["retry-after"]) > 0
        with running_postgresql(folder, port=port):
            assert service.client.get("/v1/jobs").status_code == 200
