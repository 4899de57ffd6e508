"""Every route of the OpenAPI document, asked with no key, a wrong one, a revoked one, an expired
one, each role's, and another project's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from api.main import ROUTES
from jobs import webhooks
from jobs.access import new_key
from jobs.roles import Role
from jobs.states import JobState
from tests.api.conftest import Key, Service, assert_problem
from tests.builders import device_profile

# Who may at least, and with what body the request gets past its validation.
VIEWER, SUBMITTER, ADMIN = Role
ROLES: dict[tuple[str, str], Role] = {
    ("GET", "/v1/models"): VIEWER,
    ("POST", "/v1/models"): SUBMITTER,
    ("PUT", "/v1/models"): SUBMITTER,
    ("GET", "/v1/models/{model_id}"): VIEWER,
    ("DELETE", "/v1/models/{model_id}"): SUBMITTER,
    ("GET", "/v1/datasets"): VIEWER,
    ("POST", "/v1/datasets"): SUBMITTER,
    ("PUT", "/v1/datasets"): SUBMITTER,
    ("GET", "/v1/datasets/{dataset_id}"): VIEWER,
    ("DELETE", "/v1/datasets/{dataset_id}"): SUBMITTER,
    ("OPTIONS", "/v1/uploads"): VIEWER,
    ("GET", "/v1/uploads"): VIEWER,
    ("POST", "/v1/uploads"): SUBMITTER,
    ("GET", "/v1/uploads/{upload_id}"): VIEWER,
    ("PATCH", "/v1/uploads/{upload_id}"): SUBMITTER,
    ("DELETE", "/v1/uploads/{upload_id}"): SUBMITTER,
    ("GET", "/v1/profiles"): VIEWER,
    ("POST", "/v1/profiles"): SUBMITTER,
    ("GET", "/v1/profiles/{profile_id}"): VIEWER,
    ("DELETE", "/v1/profiles/{profile_id}"): SUBMITTER,
    ("GET", "/v1/jobs"): VIEWER,
    ("POST", "/v1/jobs"): SUBMITTER,
    ("GET", "/v1/jobs/{job_id}"): VIEWER,
    ("DELETE", "/v1/jobs/{job_id}"): SUBMITTER,
    ("POST", "/v1/jobs/{job_id}/cancel"): SUBMITTER,
    ("POST", "/v1/jobs/{job_id}/retry"): SUBMITTER,
    ("POST", "/v1/jobs/{job_id}/clone"): SUBMITTER,
    ("GET", "/v1/jobs/{job_id}/events"): VIEWER,
    ("GET", "/v1/jobs/{job_id}/subnetworks"): VIEWER,
    ("GET", "/v1/jobs/{job_id}/artifacts"): VIEWER,
    ("POST", "/v1/jobs/{job_id}/selection"): VIEWER,
    ("GET", "/v1/artifacts/{artifact_id}"): VIEWER,
    ("DELETE", "/v1/artifacts/{artifact_id}"): SUBMITTER,
    ("GET", "/v1/artifacts/{artifact_id}/content"): VIEWER,
    ("GET", "/v1/workers"): VIEWER,
    ("POST", "/v1/workers/{worker_id}/drain"): ADMIN,
    ("DELETE", "/v1/workers/{worker_id}/drain"): ADMIN,
    ("GET", "/v1/me"): VIEWER,
    ("GET", "/v1/projects"): VIEWER,
    ("POST", "/v1/projects"): ADMIN,
    ("GET", "/v1/projects/{project_id}"): VIEWER,
    ("GET", "/v1/projects/{project_id}/quotas"): VIEWER,
    ("PUT", "/v1/projects/{project_id}/quotas"): ADMIN,
    ("GET", "/v1/retention"): VIEWER,
    ("GET", "/v1/keys"): ADMIN,
    ("POST", "/v1/keys"): ADMIN,
    ("GET", "/v1/keys/{key_id}"): ADMIN,
    ("POST", "/v1/keys/{key_id}/revoke"): ADMIN,
    ("GET", "/v1/audit"): ADMIN,
    ("GET", "/v1/webhooks"): ADMIN,
    ("POST", "/v1/webhooks"): ADMIN,
    ("GET", "/v1/webhooks/{webhook_id}"): ADMIN,
    ("DELETE", "/v1/webhooks/{webhook_id}"): ADMIN,
    ("POST", "/v1/webhooks/{webhook_id}/enable"): ADMIN,
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"): ADMIN,
    ("POST", "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver"): ADMIN,
}
OPEN = {"/healthz", "/readyz", "/docs", "/docs/{name}", "/openapi.json"}
# Of the installation and of no project: another project's admin is told so.
OPERATION = {
    ("POST", "/v1/projects"),
    ("POST", "/v1/workers/{worker_id}/drain"),
    ("DELETE", "/v1/workers/{worker_id}/drain"),
}
UNLISTED: set[tuple[str, str]] = set()  # routes that the document does not tell of
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/jobs/{job_id}/selection"): {"constraints": {}},
    ("POST", "/v1/keys"): {"name": "made by the walk", "role": "viewer"},
    ("POST", "/v1/profiles"): device_profile(),
    ("POST", "/v1/projects"): {"name": "made by the walk"},
    ("PUT", "/v1/projects/{project_id}/quotas"): {},
    ("POST", "/v1/jobs/{job_id}/clone"): {"name": "made by the walk"},
    ("POST", "/v1/webhooks"): {"url": "https://203.0.114.7/made-by-the-walk"},
}
HEADERS: dict[tuple[str, str], dict[str, str]] = {
    ("PATCH", "/v1/uploads/{upload_id}"): {
        "Tus-Resumable": "1.0.0",
        "Content-Type": "application/offset+octet-stream",
        "Upload-Offset": "0",
    },
}
EVERY = sorted(ROLES)


@dataclass(frozen=True)
class House:
    """A service with two projects: the first one has a record of each kind, and others of some
    that may be deleted."""

    service: Service
    ids: dict[str, str]
    spare: dict[str, str]
    keys: dict[str, Key]

    def ask(self, method: str, path: str, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        ids = self.ids
        if method == "DELETE":  # what the next question needs must not go
            ids = ids | self.spare
            if "{webhook_id}" in path:
                ids["webhook_id"] = new_webhook(self.service)
        return httpx.request(
            method,
            self.service.url + path.format_map(ids),
            json=BODIES.get((method, path)),
            headers=headers | HEADERS.get((method, path), {}),
            timeout=60,
            trust_env=False,
        )


def new_webhook(service: Service) -> str:
    with service.services.database.transaction() as session:
        return webhooks.add_webhook(
            session,
            project_id="prj_default",
            url="https://203.0.114.7/",
            events=webhooks.JOB_ENDS,
            secret="whsec_c2VjcmV0",
        ).id


@pytest.fixture(scope="module")
def house(service: Service) -> Iterator[House]:
    job_id = service.new_job()
    webhook_id = new_webhook(service)
    claim = service.claim(job_id)
    artifact_id = service.publish(claim, "w1/onnx/model.onnx", b"bytes")
    spare = {"artifact_id": service.publish(claim, "w1/onnx/spare.onnx", b"more")}
    service.finish(claim, report={"subnetworks": [], "selection": None})
    service.new_job()  # needs the model and the dataset, so that they are not deleted
    described = "kind bW9kZWw=,filename bS56aXA="
    begin = {"Tus-Resumable": "1.0.0", "Upload-Length": "9", "Upload-Metadata": described}
    uploads = [service.client.post("/v1/uploads", headers=begin) for _ in range(2)]
    spare["profile_id"] = service.new_profile()
    spare["job_id"] = service.new_job()
    service.client.post(f"/v1/jobs/{spare['job_id']}/cancel")
    upload_id, spare["upload_id"] = (each.headers["location"].split("/")[-1] for each in uploads)
    sent = service.client.get(f"/v1/webhooks/{webhook_id}/deliveries").json()["items"]
    keys = {role.value: service.new_key(role) for role in Role}
    keys["revoked"] = service.new_key(Role.ADMIN)
    keys["expired"] = service.new_key(Role.ADMIN, seconds=-1)
    keys["victim"] = service.new_key(Role.VIEWER)
    answer = service.client.post(f"/v1/keys/{keys['revoked'].id}/revoke")
    assert answer.status_code == 200, answer.text
    other = service.new_project()
    keys["other"] = service.new_key(Role.ADMIN, project_id=other)
    with service.worker() as worker_id:
        yield House(
            service,
            ids={
                "model_id": service.model_id,
                "dataset_id": service.dataset_id,
                "profile_id": service.new_profile(),
                "job_id": job_id,
                "artifact_id": artifact_id,
                "upload_id": upload_id,
                "key_id": keys["victim"].id,
                "project_id": "prj_default",
                "worker_id": worker_id,
                "webhook_id": webhook_id,
                "delivery_id": sent[0]["id"],
            },
            spare=spare,
            keys=keys,
        )


def test_the_table_names_every_route_there_is(service: Service) -> None:
    """Those of the document, and those of the application that are not in it."""
    routed = {
        (method, route.path)
        for module in ROUTES
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert {entry for entry in routed if entry[1] not in OPEN} == set(ROLES)
    assert {path for _, path in routed - set(ROLES)} == OPEN - {"/openapi.json"}
    document = service.client.get("/openapi.json").json()
    documented = {(m.upper(), path) for path, ops in document["paths"].items() for m in ops}
    below = {entry for entry in documented if entry[1] not in OPEN}
    assert below == set(ROLES) - UNLISTED
    assert {path for _, path in documented - below} == {"/healthz", "/readyz"}
    for (method, path), role in ROLES.items():
        if (method, path) not in UNLISTED:
            operation = document["paths"][path][method.lower()]
            assert operation["description"].endswith(f"Needs the role `{role}`.")
            assert ("403" in operation["responses"]) == (role != VIEWER)


def test_what_is_open_is_named(house: House) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/docs/favicon.png", "/openapi.json"):
        assert house.ask("GET", path).status_code == 200


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_without_a_valid_key_nothing_answers(house: House, method: str, path: str) -> None:
    assert_problem(house.ask(method, path), 401, "missing-api-key")
    for key in (new_key(), house.keys["revoked"].secret, house.keys["expired"].secret):
        assert_problem(house.ask(method, path, key), 401, "invalid-api-key")


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_each_role_may_what_the_table_says(house: House, method: str, path: str) -> None:
    for role in Role:
        answer = house.ask(method, path, house.keys[role].secret)
        if role.includes(ROLES[method, path]):
            # Not the end of the story for a request without a body, but past the door.
            allowed = [200, 201, 202, 204, 400, 409, 415, 422]
            allowed += [404, 410] if method == "DELETE" else []  # the role before has deleted it
            assert answer.status_code in allowed, answer.text
            if method == "GET" or (method, path) in BODIES:
                assert answer.status_code in (200, 201, 202), answer.text
        else:
            problem = assert_problem(answer, 403, "role-insufficient")
            assert f"the role {ROLES[method, path]};" in problem["detail"]
            assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_another_projects_key_finds_nothing(house: House, method: str, path: str) -> None:
    answer = house.ask(method, path, house.keys["other"].secret)
    if (method, path) in OPERATION:
        assert_problem(answer, 403, "operator-only")
    elif "{" in path:
        assert_problem(answer, 404, "not-found")
    elif method == "GET":
        assert answer.status_code == 200
        for kind, id in house.ids.items():
            assert id not in answer.text or kind == "worker_id"  # who serve all projects


@pytest.mark.parametrize(
    ("listing", "kind"),
    [
        ("models", "model_id"),
        ("datasets", "dataset_id"),
        ("uploads", "upload_id"),
        ("profiles", "profile_id"),
        ("jobs", "job_id"),
        ("keys", "key_id"),
        ("webhooks", "webhook_id"),
    ],
)
def test_another_projects_id_is_no_cursor(house: House, listing: str, kind: str) -> None:
    client = house.service.as_key(house.keys["other"].secret)
    answer = client.get(f"/v1/{listing}?after={house.ids[kind]}")
    assert_problem(answer, 404, "not-found")


def test_another_projects_audit_log_is_closed(house: House) -> None:
    client = house.service.as_key(house.keys["other"].secret)
    entries = house.service.client.get("/v1/audit").json()["items"]
    assert_problem(client.get(f"/v1/audit?after={entries[0]['id']}"), 404, "not-found")
    for query in (f"key={entries[0]['key']}", f"target={entries[0]['target']}"):
        assert client.get(f"/v1/audit?{query}").json()["items"] == []


def test_another_projects_model_is_an_unknown_reference(house: House) -> None:
    body = {"model": house.ids["model_id"], "dataset": house.ids["dataset_id"]}
    answer = house.service.as_key(house.keys["other"].secret).post("/v1/jobs", json=body)
    assert_problem(answer, 422, "unknown-reference")


@pytest.mark.parametrize("path", ["/v1/keys/%0A", "/v1/keys/a%2Fb", "/v1/audit/x", "/v1/keys/"])
def test_odd_paths_do_not_lead_around_the_table(house: House, path: str) -> None:
    assert_problem(house.ask("GET", path, house.keys["submitter"].secret), 403, "role-insufficient")


def test_a_refused_upload_is_not_read(house: House) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 100_000

    client = house.service.as_key(house.keys["viewer"].secret)
    try:
        answer = client.post("/v1/models?filename=x.tar.gz", content=endless())
    except httpx.WriteError:
        return  # the connection was closed in the middle of the body
    assert_problem(answer, 403, "role-insufficient")


# --- what the routes of projects and keys do ------------------------------------------------


def test_a_key_is_shown_once_works_and_ends_at_once(service: Service) -> None:
    body = {"name": "CI", "role": "submitter", "expires_at": "2099-01-01T00:00:00+01:00"}
    created = service.client.post("/v1/keys", json=body)
    assert created.status_code == 201
    assert created.headers["cache-control"] == "no-store"
    secret, id = created.json()["key"], created.json()["id"]
    assert re.fullmatch(r"wwk_[A-Za-z0-9_-]{43}", secret)
    assert created.headers["location"] == f"/v1/keys/{id}"

    client = service.as_key(secret)
    me = client.get("/v1/me").json()
    assert (me["key"], me["role"], me["is_operator"]) == (id, "submitter", False)
    assert me["project"]["id"] == "prj_default"
    assert me["expires_at"] == "2098-12-31T23:00:00Z"
    revoked = service.client.post(f"/v1/keys/{id}/revoke").json()
    assert revoked["revoked_at"] is not None
    assert_problem(client.get("/v1/me"), 401, "invalid-api-key")
    assert service.client.post(f"/v1/keys/{id}/revoke").json() == revoked
    for path in ("/v1/keys", f"/v1/keys/{id}", "/v1/audit"):
        assert secret not in service.client.get(path).text


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"name": "x", "role": "owner"}, "/role"),
        ({"name": "x"}, "/role"),
        ({"name": " ", "role": "viewer"}, "/name"),
        ({"name": "x", "role": "viewer", "expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
        ({"name": "x", "role": "viewer", "expires_at": "2099-01-01T00:00:00"}, "/expires_at"),
        ({"name": "x", "role": "viewer", "expires_at": "9999-12-31T23:59:59-12:00"}, "/expires_at"),
        ({"name": "x", "role": "viewer", "expires_at": "0001-01-01T00:00:00+12:00"}, "/expires_at"),
        ({"name": "x", "role": "viewer", "project_id": "prj_x"}, "/project_id"),
    ],
)
def test_a_key_that_would_be_wrong_is_not_made(
    service: Service, body: dict[str, Any], pointer: str
) -> None:
    before = service.client.get("/v1/keys?limit=200").json()
    problem = assert_problem(service.client.post("/v1/keys", json=body), 422, "invalid-request")
    assert problem["pointer"] == pointer
    assert service.client.get("/v1/keys?limit=200").json() == before


def test_a_new_project_is_its_admins_own(service: Service) -> None:
    created = service.client.post("/v1/projects", json={"name": "Search"}).json()
    listed = service.client.get("/v1/projects?limit=200").json()["items"]
    assert created["id"] in [project["id"] for project in listed]
    assert service.client.get(f"/v1/projects/{created['id']}").status_code == 200
    client = service.as_key(created["first_key"]["key"])
    own = client.get("/v1/projects").json()
    assert [project["id"] for project in own["items"]] == [created["id"]]
    assert client.get("/v1/me").json()["role"] == "admin"
    made = client.post("/v1/keys", json={"name": "x", "role": "viewer"}).json()
    assert client.get("/v1/models").json()["items"] == []
    # The operator made the project, and sees nothing of what it holds.
    assert service.client.get(f"/v1/keys/{made['id']}").status_code == 404
    assert made["id"] not in service.client.get("/v1/audit?limit=200").text
    (entry,) = client.get("/v1/audit").json()["items"]
    assert (entry["action"], entry["target"]) == ("key.created", made["id"])


def test_an_event_stream_ends_with_its_key(service: Service) -> None:
    job_id = service.new_job()
    key = service.new_key(Role.VIEWER)
    accept = {"Accept": "text/event-stream"}
    client = service.as_key(key.secret)
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=accept) as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("data:"):
            pass
        service.client.post(f"/v1/keys/{key.id}/revoke")
        claim = service.claim(job_id)  # which would be the next event
        assert not any(line.startswith("data:") for line in lines)  # and it ends
    service.finish(claim, JobState.FAILED, error={})


# --- the audit log --------------------------------------------------------------------------


def test_every_change_leaves_one_entry(service: Service) -> None:
    """Exactly those routes that change something, each by what it did."""
    client = service.client
    service.model_id, service.dataset_id  # noqa: B018
    job = client.post("/v1/jobs", json=service.job_body(), headers={"X-Request-ID": "r-17"}).json()
    client.post(f"/v1/jobs/{job['id']}/cancel")
    key = client.post("/v1/keys", json={"name": "k", "role": "viewer"}).json()
    client.post(f"/v1/keys/{key['id']}/revoke")
    client.post(f"/v1/keys/{key['id']}/revoke")
    project = client.post("/v1/projects", json={"name": "p"}).json()
    profile = client.post("/v1/profiles", json=device_profile()).json()
    webhook = client.post("/v1/webhooks", json={"url": "https://203.0.114.7/s3cret"}).json()
    client.post(f"/v1/webhooks/{webhook['id']}/enable")  # it was not disabled
    client.delete(f"/v1/webhooks/{webhook['id']}")
    client.post("/v1/jobs?dry_run=true", json=service.job_body())
    client.post(f"/v1/jobs/{job['id']}/selection", json={"constraints": {}})
    client.post(f"/v1/jobs/{job['id']}/clone?dry_run=true")
    clone = client.post(f"/v1/jobs/{job['id']}/clone").json()
    client.post(f"/v1/jobs/{job['id']}/retry")
    client.post(f"/v1/jobs/{job['id']}/retry")
    with service.worker() as worker_id:
        for _ in range(2):
            client.post(f"/v1/workers/{worker_id}/drain")
        for _ in range(2):
            client.delete(f"/v1/workers/{worker_id}/drain")

    me = client.get("/v1/me").json()["key"]
    expected = {
        service.model_id: ["model.uploaded"],
        service.dataset_id: ["dataset.uploaded"],
        job["id"]: ["job.retried", "job.cancel_requested", "job.created"],
        clone["id"]: ["job.created"],
        worker_id: ["worker.undrained", "worker.drained"],
        key["id"]: ["key.revoked", "key.created"],
        project["id"]: ["project.created"],
        profile["id"]: ["profile.uploaded"],
        webhook["id"]: ["webhook.deleted", "webhook.created"],
    }
    for target, actions in expected.items():
        entries = client.get(f"/v1/audit?target={target}").json()["items"]
        assert [entry["action"] for entry in entries] == actions
        assert {entry["key"] for entry in entries} == {me}
        assert {entry["client"] for entry in entries} == {"127.0.0.1"}
    (*_, created) = client.get(f"/v1/audit?target={job['id']}").json()["items"]
    assert created["request_id"] == "r-17"
    assert "s3cret" not in client.get("/v1/audit?limit=200").text
    paged = client.get("/v1/audit?limit=2").json()
    rest = client.get(f"/v1/audit?limit=200&after={paged['next']}").json()["items"]
    every = client.get("/v1/audit?limit=200").json()["items"]
    assert [*paged["items"], *rest] == every
