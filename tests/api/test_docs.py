"""/docs works on a closed network, and the OpenAPI document tells the truth."""

from __future__ import annotations

import re
from typing import Any

import httpx
import jsonschema
import pytest

from tests.api.conftest import Service

ROUTES = {
    ("post", "/v1/models"), ("put", "/v1/models"), ("get", "/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("post", "/v1/datasets"), ("put", "/v1/datasets"), ("get", "/v1/datasets"),
    ("get", "/v1/datasets/{dataset_id}"),
    ("post", "/v1/profiles"), ("get", "/v1/profiles"), ("get", "/v1/profiles/{profile_id}"),
    ("post", "/v1/jobs"), ("get", "/v1/jobs"), ("get", "/v1/jobs/{job_id}"),
    ("delete", "/v1/jobs/{job_id}"),
    ("post", "/v1/jobs/{job_id}/cancel"), ("get", "/v1/jobs/{job_id}/events"),
    ("get", "/v1/jobs/{job_id}/subnetworks"), ("get", "/v1/jobs/{job_id}/artifacts"),
    ("post", "/v1/jobs/{job_id}/retry"), ("post", "/v1/jobs/{job_id}/clone"),
    ("post", "/v1/jobs/{job_id}/selection"),
    ("get", "/v1/workers"), ("post", "/v1/workers/{worker_id}/drain"),
    ("delete", "/v1/workers/{worker_id}/drain"),
    ("get", "/v1/artifacts/{artifact_id}"), ("get", "/v1/artifacts/{artifact_id}/content"),
    ("delete", "/v1/models/{model_id}"), ("delete", "/v1/datasets/{dataset_id}"),
    ("delete", "/v1/artifacts/{artifact_id}"), ("delete", "/v1/profiles/{profile_id}"),
    ("options", "/v1/uploads"), ("post", "/v1/uploads"), ("get", "/v1/uploads"),
    ("get", "/v1/uploads/{upload_id}"), ("patch", "/v1/uploads/{upload_id}"),
    ("delete", "/v1/uploads/{upload_id}"),
    ("get", "/v1/projects/{project_id}/quotas"), ("put", "/v1/projects/{project_id}/quotas"),
    ("get", "/v1/retention"),
    ("get", "/v1/me"), ("get", "/v1/projects"), ("post", "/v1/projects"),
    ("get", "/v1/projects/{project_id}"), ("get", "/v1/audit"),
    ("get", "/v1/keys"), ("post", "/v1/keys"), ("get", "/v1/keys/{key_id}"),
    ("post", "/v1/keys/{key_id}/revoke"),
    ("get", "/v1/webhooks"), ("post", "/v1/webhooks"), ("get", "/v1/webhooks/{webhook_id}"),
    ("delete", "/v1/webhooks/{webhook_id}"), ("post", "/v1/webhooks/{webhook_id}/enable"),
    ("get", "/v1/webhooks/{webhook_id}/deliveries"),
    ("post", "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver"),
    ("get", "/healthz"), ("get", "/readyz"),
}  # fmt: skip


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return dict(service.client.get("/openapi.json").json())


def test_the_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) >= 3
    for address in loaded:
        assert address.startswith("/docs/")
        asset = client.get(address)
        assert asset.status_code == 200
        assert len(asset.content) > 100
    assert "https://" not in page
    assert "http://" not in page


def test_every_route_is_documented(document: dict[str, Any]) -> None:
    found = {(m, path) for path, operations in document["paths"].items() for m in operations}
    assert found == ROUTES
    assert all(op["summary"] for ops in document["paths"].values() for op in ops.values())


def test_every_route_below_v1_asks_for_a_key_and_tells_its_problems(
    document: dict[str, Any],
) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if not path.startswith("/v1"):
                continue
            assert operation["security"] == [{"API key": []}]
            for status in {"401", "422"}:
                (media_type,) = operation["responses"][status]["content"]
                assert media_type == "application/problem+json"
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in re.findall(r"'#/components/schemas/([^']+)'", repr(document)):
        assert name in schemas


def test_the_examples_of_a_job_fit_its_schema(document: dict[str, Any], service: Service) -> None:
    content = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) >= 3
    for example in content["examples"].values():
        value = example["value"]
        jsonschema.validate(value, content["schema"] | {"components": document["components"]})
        answer = service.client.post("/v1/jobs?dry_run=true", json=value)
        # Well formed: what is wrong with it here is only that the ids are of another service.
        assert answer.json()["type"] == "urn:widthwise:problem:unknown-reference"


def test_the_examples_of_a_profile_are_profiles(document: dict[str, Any], service: Service) -> None:
    operation = document["paths"]["/v1/profiles"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        schema = content["schema"] | {"components": document["components"]}
        jsonschema.validate(example["value"], schema)
        answer = service.client.post("/v1/profiles", json=example["value"])
        assert answer.status_code == 201, answer.text
        assert abs(answer.json()["errors"]["onnx"]["highest"]) < 0.2


def test_answers_fit_their_documented_schemas(document: dict[str, Any], service: Service) -> None:
    job_id, profile_id = service.new_job(), service.new_profile()
    with service.worker(gpus=1):
        _assert_answers_fit(document, service, job_id, profile_id)


def _assert_answers_fit(
    document: dict[str, Any], service: Service, job_id: str, profile_id: str
) -> None:
    for path, template in (
        (f"/v1/jobs/{job_id}", "/v1/jobs/{job_id}"),
        ("/v1/jobs", "/v1/jobs"),
        (f"/v1/jobs/{job_id}/events", "/v1/jobs/{job_id}/events"),
        (f"/v1/models/{service.model_id}", "/v1/models/{model_id}"),
        (f"/v1/datasets/{service.dataset_id}", "/v1/datasets/{dataset_id}"),
        (f"/v1/profiles/{profile_id}", "/v1/profiles/{profile_id}"),
        ("/v1/profiles", "/v1/profiles"),
        ("/v1/me", "/v1/me"),
        ("/v1/projects", "/v1/projects"),
        ("/v1/keys", "/v1/keys"),
        ("/v1/audit", "/v1/audit"),
        ("/v1/workers", "/v1/workers"),
        ("/v1/webhooks", "/v1/webhooks"),
    ):
        content = document["paths"][template]["get"]["responses"]["200"]["content"]
        schema = content["application/json"]["schema"] | {"components": document["components"]}
        jsonschema.validate(service.client.get(path).json(), schema)


def test_upload_bodies_are_documented(document: dict[str, Any]) -> None:
    for path in ("/v1/models", "/v1/datasets"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"application/octet-stream", "multipart/form-data"}
