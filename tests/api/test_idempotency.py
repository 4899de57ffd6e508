"""Idempotency-Key: sent twice, done once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import func, select

from jobs.records import IdempotencyKey
from jobs.roles import Role
from tests.api.conftest import Service, archive, assert_problem, wait_for
from tests.builders import tiny_bert


def named(key: str | None = None, **headers: str) -> dict[str, str]:
    return {"Idempotency-Key": key or str(uuid4()), **headers}


def jobs_of(service: Service) -> set[str]:
    items, after = [], None
    while True:
        query = {"limit": 200} | ({"after": after} if after else {})
        page = service.client.get("/v1/jobs", params=query).json()
        items += page["items"]
        if (after := page["next"]) is None:
            return {item["id"] for item in items}


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return archive(tiny_bert(tmp_path_factory.mktemp("upload") / "model"))


def test_a_job_is_created_once_and_answered_alike(service: Service) -> None:
    before, body, key = jobs_of(service), service.job_body(), str(uuid4())
    first = service.client.post("/v1/jobs", json=body, headers=named(key))
    again = service.client.post("/v1/jobs", json=body, headers=named(f'"{key}"'))
    assert first.status_code == again.status_code == 202
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert jobs_of(service) - before == {first.json()["id"]}
    entries = service.client.get(f"/v1/audit?target={first.json()['id']}").json()["items"]
    assert [entry["action"] for entry in entries] == ["job.created"]
    other = service.client.post("/v1/jobs", json=body, headers=named())
    assert other.json()["id"] != first.json()["id"]


def test_another_body_route_or_query_is_refused(service: Service) -> None:
    body, key = service.job_body(), str(uuid4())
    job_id = service.client.post("/v1/jobs", json=body, headers=named(key)).json()["id"]
    before = jobs_of(service)
    for path, sent in (
        ("/v1/jobs", body | {"name": "another"}),
        ("/v1/jobs", {}),
        ("/v1/jobs?dry_run=true", body),
        (f"/v1/jobs/{job_id}/cancel", None),
    ):
        answer = service.client.post(path, json=sent, headers=named(key))
        problem = assert_problem(answer, 422, "idempotency-key-reused")
        assert problem["title"] == "Idempotency-Key is already used"
    assert jobs_of(service) == before
    assert service.client.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"


def test_each_project_has_its_own_keys(service: Service) -> None:
    key, body = str(uuid4()), {"name": "k", "role": "viewer"}
    other = service.as_key(service.new_key(Role.ADMIN, project_id=service.new_project()).secret)
    made = [client.post("/v1/keys", json=body, headers=named(key)) for client in
            (service.client, other)]  # fmt: skip
    assert [answer.status_code for answer in made] == [201, 201]


def test_a_role_that_was_taken_away_gets_no_stored_answer(service: Service) -> None:
    body, key = service.job_body(), str(uuid4())
    service.client.post("/v1/jobs", json=body, headers=named(key))
    viewer = service.as_key(service.new_key(Role.VIEWER).secret)
    answer = viewer.post("/v1/jobs", json=body, headers=named(key))
    assert_problem(answer, 403, "role-insufficient")


def test_what_failed_may_be_mended_under_the_same_key(service: Service) -> None:
    key = str(uuid4())
    wrong = service.job_body() | {"model": "mdl_absent"}
    for _ in range(2):
        answer = service.client.post("/v1/jobs", json=wrong, headers=named(key))
        assert_problem(answer, 422, "unknown-reference")
    answer = service.client.post("/v1/jobs", json=service.job_body(), headers=named(key))
    assert answer.status_code == 202


def test_of_many_sent_at_once_one_is_carried_out(service: Service) -> None:
    before, body, key = jobs_of(service), service.job_body(), str(uuid4())
    barrier = threading.Barrier(6)
    answers: list[httpx.Response] = []

    def race() -> None:
        barrier.wait()
        answers.append(service.client.post("/v1/jobs", json=body, headers=named(key)))

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (made,) = jobs_of(service) - before
    carried_out = [answer for answer in answers if answer.status_code == 202]
    assert carried_out
    assert {answer.json()["id"] for answer in carried_out} == {made}
    for answer in answers:
        if answer.status_code != 202:
            assert_problem(answer, 409, "request-in-progress")
            assert answer.headers["retry-after"] == "1"


def keys_held(service: Service) -> int:
    with service.services.database.reading() as session:
        held = IdempotencyKey.held_until.is_not(None)
        return session.scalar(select(func.count()).select_from(IdempotencyKey).where(held)) or 0


def test_a_streamed_upload_is_held_while_it_comes_and_compared_at_its_end(
    service: Service, upload: bytes
) -> None:
    key, path = str(uuid4()), "/v1/models?filename=tiny.tar.gz"
    begun, go_on = threading.Event(), threading.Event()
    answers: list[httpx.Response] = []

    def slowly() -> Iterator[bytes]:
        yield upload[:1000]
        begun.set()
        assert go_on.wait(30)
        yield upload[1000:]

    def send() -> None:
        answers.append(service.client.post(path, content=slowly(), headers=named(key)))

    held = keys_held(service)
    thread = threading.Thread(target=send)
    thread.start()
    assert begun.wait(30)
    wait_for(lambda: keys_held(service) == held + 1, seconds=30)  # the service has seen it
    answer = service.client.post(path, content=upload, headers=named(key))
    assert_problem(answer, 409, "request-in-progress")
    go_on.set()
    thread.join(60)
    (first,) = answers
    assert first.status_code == 201, first.text
    before = service.kept()
    again = service.client.post(path, content=upload, headers=named(key))
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["location"] == first.headers["location"]
    for other in (upload[:-1], upload + b"x", upload[:-1] + b"x", os.urandom(2 << 20)):
        answer = service.client.post(path, content=other, headers=named(key))
        assert_problem(answer, 422, "idempotency-key-reused")
    assert service.kept() == before


def test_a_form_is_the_same_with_another_boundary(service: Service, tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model")
    parts = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    key = str(uuid4())

    def send(boundary: str, files: Any) -> httpx.Response:
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return service.client.post("/v1/models", files=files, headers=named(key, **kind))

    first = send("one", parts)
    assert first.status_code == 201, first.text
    again = send("quite-another-one", parts)
    assert (again.status_code, again.json()) == (201, first.json())
    renamed = [("file", ("other" + name, content)) for _, (name, content) in parts]
    for files in (renamed, parts[:-1], parts[::-1]):
        assert_problem(send("one", files), 422, "idempotency-key-reused")


@pytest.mark.parametrize(
    ("boundary", "body"), [(300 * "b", b""), ("b", b"--b\r\n\x00: x"), ("b", b"no form")]
)
def test_a_form_that_is_malformed_is_refused_as_without_a_key(
    service: Service, boundary: str, body: bytes
) -> None:
    form = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    told = [
        service.client.post("/v1/models", content=body, headers=form | key)
        for key in ({}, {"Idempotency-Key": f"malformed-{len(boundary)}-{len(body)}"})
    ]
    assert told[0].status_code == 400
    assert told[0].json() == told[1].json()


def test_an_upload_that_was_cut_off_leaves_the_key_free(service: Service, upload: bytes) -> None:
    key, path = str(uuid4()), "/v1/models?filename=tiny.tar.gz"
    answer = service.client.post(path, content=upload[:2000], headers=named(key))
    assert answer.status_code == 422
    answer = service.client.post(path, content=upload, headers=named(key))
    assert answer.status_code == 201


@pytest.mark.parametrize("body", [None, b"{}"])
def test_a_body_that_the_route_does_not_read_is_compared_too(
    service: Service, body: bytes | None
) -> None:
    path, key = f"/v1/jobs/{service.new_job()}/cancel", str(uuid4())
    answers = [service.client.post(path, content=body, headers=named(key)).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["state"] == "cancelled"
    answer = service.client.post(path, content=b"[]", headers=named(key))
    assert_problem(answer, 422, "idempotency-key-reused")


def test_a_new_secret_is_made_once_and_stored_nowhere(service: Service) -> None:
    key, body = str(uuid4()), {"name": "CI", "role": "viewer"}
    made = service.client.post("/v1/keys", json=body, headers=named(key)).json()
    problem = assert_problem(
        service.client.post("/v1/keys", json=body, headers=named(key)), 409, "request-already-done"
    )
    assert (problem["action"], problem["target"]) == ("key.created", made["id"])
    kept = b"".join(path.read_bytes() for path in service.settings.data_dir.glob("widthwise.db*"))
    assert made["id"].encode() in kept
    assert made["key"].encode() not in kept


@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256, '"unclosed', "caf\xe9", 'a"'])
def test_a_key_that_is_none_is_refused(service: Service, key: str) -> None:
    headers = [(b"idempotency-key", key.encode("latin-1"))]
    answer = service.client.post("/v1/jobs", json=service.job_body(), headers=headers)
    assert_problem(answer, 400, "idempotency-key-invalid")


def test_two_keys_are_refused(service: Service) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    answer = service.client.post("/v1/jobs", json=service.job_body(), headers=headers)
    assert_problem(answer, 400, "idempotency-key-invalid")


def test_every_post_is_documented_to_take_one(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            names = [parameter["name"] for parameter in operation.get("parameters", ())]
            assert ("Idempotency-Key" in names) == (method == "post"), (method, path)
