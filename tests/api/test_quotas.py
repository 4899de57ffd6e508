"""Quotas, deletion and the retention listing over REST."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.roles import Role
from jobs.states import JobState
from tests.api.conftest import Service, archive, assert_problem, serving
from tests.builders import tiny_bert

PATH = "/v1/projects/prj_default/quotas"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("quotas") / "data") as running:
        yield running


@pytest.fixture(autouse=True)
def unlimited(service: Service) -> Iterator[None]:
    yield
    assert service.client.put(PATH, json={}).status_code == 200


def limit(service: Service, **quotas: int) -> dict[str, Any]:
    answer = service.client.put(PATH, json=quotas)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def assert_over(answer: Any, quota: str, status: int) -> None:
    problem = assert_problem(answer, status, "quota-exceeded")
    assert problem["quota"] == quota
    assert problem["used"] > problem["limit"] or quota == "bytes"
    assert "The project may have" in problem["detail"]


def test_a_project_with_no_room_for_more_is_told_before_it_sends(
    service: Service, tmp_path: Path
) -> None:
    service.model_id, service.dataset_id  # noqa: B018
    told = service.client.get(PATH).json()
    assert told["limits"] == {
        "bytes": None, "uploads": None, "running_jobs": None, "queued_jobs": None,
    }  # fmt: skip
    used = told["used"]
    assert used["bytes"] > 0
    assert used["uploads"] == 2
    content = archive(tiny_bert(tmp_path / "model", seed=3))
    before = service.kept()
    described = f"kind {base64.b64encode(b'model').decode()},filename bS56aXA="
    begin = {"Tus-Resumable": "1.0.0", "Upload-Length": "1000", "Upload-Metadata": described}
    for quota, most, status in (
        ("bytes", used["bytes"] + 500, 507),
        ("uploads", used["uploads"], 403),
    ):
        assert limit(service, **{quota: most})["limits"][quota] == most
        assert_over(
            service.client.post("/v1/models?filename=m.tar.gz", content=content), quota, status
        )
        assert_over(service.client.post("/v1/uploads", headers=begin), quota, status)
        assert service.kept() == before
    # What an archive unpacks to counts, not what it was sent as.
    limit(service, bytes=used["bytes"] + len(content) + 1)
    assert_over(service.client.post("/v1/models?filename=m.tar.gz", content=content), "bytes", 507)
    assert service.kept() == before
    # The same bytes again cost nothing.
    again = archive(tiny_bert(tmp_path / "again"))
    limit(service, bytes=used["bytes"] + len(again))
    assert service.client.post("/v1/models?filename=a.tar.gz", content=again).status_code == 201


def test_no_more_jobs_than_may_wait(service: Service) -> None:
    job_id = service.new_job()
    queued = service.client.get(PATH).json()["used"]["queued_jobs"]
    create, clone, retry = "/v1/jobs", f"/v1/jobs/{job_id}/clone", f"/v1/jobs/{job_id}/retry"
    limit(service, queued_jobs=queued)
    for path, body in ((create, service.job_body()), (clone, {})):
        assert_over(service.client.post(path, json=body), "queued_jobs", 403)
    assert service.client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    service.new_job()
    assert_over(service.client.post(retry), "queued_jobs", 403)
    limit(service, bytes=0)
    for path, body in ((create, service.job_body()), (clone, {}), (retry, None)):
        assert_over(service.client.post(path, json=body), "bytes", 507)
    documented = service.client.get("/openapi.json").json()["paths"]
    for path in (create, clone, retry):
        operation = documented[path.replace(job_id, "{job_id}")]["post"]
        assert {"403", "507"} <= set(operation["responses"])
    limit(service)
    assert service.client.post(retry).status_code == 202


def test_quotas_are_the_operators_to_set(service: Service) -> None:
    other = service.new_project()
    admin = service.as_key(service.new_key(Role.ADMIN, project_id=other).secret)
    path = f"/v1/projects/{other}/quotas"
    assert admin.get(path).status_code == 200
    assert_problem(admin.put(path, json={"bytes": 1}), 403, "operator-only")
    assert_problem(admin.get(PATH), 404, "not-found")
    assert service.client.put(path, json={"bytes": 1}).json()["limits"]["bytes"] == 1
    for wrong in (
        {"bytes": -1},
        {"bytes": 2**63},
        {"uploads": 2**31},
        {"files": 1},
        {"bytes": "1x"},
    ):
        assert_problem(service.client.put(path, json=wrong), 422, "invalid-request")
    assert_problem(service.client.put("/v1/projects/prj_x/quotas", json={}), 404, "not-found")


def test_what_is_not_needed_can_be_deleted(service: Service) -> None:
    client = service.client
    for cancelled in client.get("/v1/jobs").json()["items"]:
        client.post(f"/v1/jobs/{cancelled['id']}/cancel")
    claim = service.claim(service.new_job())
    artifact_id = service.publish(claim, "w1/onnx/model.onnx", b"bytes")
    model, dataset = f"/v1/models/{service.model_id}", f"/v1/datasets/{service.dataset_id}"
    for path in (model, dataset):
        problem = assert_problem(client.delete(path), 409, "in-use")
        assert claim.job_id in problem["detail"]
    service.finish(claim, JobState.SUCCEEDED, report={"selection": None, "subnetworks": []})
    used = client.get(PATH).json()["used"]["bytes"]
    for path in (f"/v1/artifacts/{artifact_id}", model, dataset):
        assert client.delete(path).status_code == 204
        assert_problem(client.get(path), 410, "gone")
        assert_problem(client.delete(path), 410, "gone")
    assert_problem(client.get(f"/v1/artifacts/{artifact_id}/content"), 410, "gone")
    assert client.get(PATH).json()["used"]["bytes"] < used
    assert client.get(f"/v1/jobs/{claim.job_id}").json()["model"] == service.model_id
    assert service.model_id not in client.get("/v1/models").text
    body = {"model": service.model_id, "dataset": service.dataset_id}
    assert_problem(client.post("/v1/jobs", json=body), 422, "unknown-reference")
    service._uploaded.clear()


def test_what_retention_would_delete_is_listed(service: Service) -> None:
    claim = service.claim(service.new_job())
    artifact_id = service.publish(claim, "w1/onnx/model.onnx", b"bytes")
    service.finish(claim, JobState.SUCCEEDED, report={"selection": None, "subnetworks": []})
    assert service.client.get("/v1/retention").json() == {"days": None, "items": []}
    listed = service.client.get("/v1/retention?days=0").json()
    assert artifact_id in {item["id"] for item in listed["items"]}
    assert service.client.get("/v1/retention?days=1").json()["items"] == []
    other = service.as_key(service.new_key(Role.VIEWER, project_id=service.new_project()).secret)
    assert other.get("/v1/retention?days=0").json()["items"] == []
    assert service.client.get(f"/v1/artifacts/{artifact_id}").status_code == 200
    assert_problem(service.client.get("/v1/retention?days=-1"), 422, "invalid-request")
