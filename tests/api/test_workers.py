"""Workers as users and the operator see them."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import update

from jobs.db import now
from jobs.records import Worker
from jobs.roles import Role
from tests.api.conftest import Service, assert_problem


def listed(service: Service, id: str) -> dict[str, object]:
    items = service.client.get("/v1/workers").json()["items"]
    return next(dict(item) for item in items if item["id"] == id)


def name_of(service: Service, id: str) -> str:
    return str(listed(service, id)["name"])


def test_a_worker_is_listed_with_what_it_runs(service: Service) -> None:
    with service.worker(slots=2, gpus=4) as id:
        worker = listed(service, id)
        assert worker["state"] == "active"
        assert worker["jobs"] == []
        assert worker["devices"] == [
            {"device": "cpu", "slots": 2, "busy": 0},
            {"device": "gpu", "slots": 4, "busy": 0},
        ]
        assert str(worker["last_heartbeat"]).endswith("Z")
        body = service.job_body(device="gpu", processes=2)
        job_id = service.client.post("/v1/jobs", json=body).json()["id"]
        claim = service.claim(job_id, worker=name_of(service, id))
        worker = listed(service, id)
        assert worker["jobs"] == [job_id]
        assert worker["devices"] == [
            {"device": "cpu", "slots": 2, "busy": 0},
            {"device": "gpu", "slots": 4, "busy": 2},
        ]
        other = service.new_key(Role.VIEWER, project_id=service.new_project())
        (seen,) = service.as_key(other.secret).get("/v1/workers").json()["items"]
        assert seen == worker | {"jobs": []}  # busy, with what is not told
        service.finish(claim, report={"selection": None})


def test_a_worker_without_gpus_offers_none(service: Service) -> None:
    with service.worker() as id:
        assert listed(service, id)["devices"] == [{"device": "cpu", "slots": 1, "busy": 0}]


def test_a_silent_worker_is_shown_as_lost(service: Service) -> None:
    with service.worker() as id:
        with service.services.database.transaction() as session:
            at = now(session) - timedelta(seconds=1)
            session.execute(update(Worker).where(Worker.id == id).values(lease_expires_at=at))
        assert listed(service, id)["state"] == "lost"
        answer = service.client.post("/v1/jobs?require_worker=true", json=service.job_body())
        assert_problem(answer, 409, "no-worker")


def test_a_worker_is_drained_and_put_back(service: Service) -> None:
    with service.worker() as id:
        path = f"/v1/workers/{id}/drain"
        claim = service.claim(service.new_job(), worker=name_of(service, id))
        for _ in range(2):
            answer = service.client.post(path)
            assert (answer.status_code, answer.json()["state"]) == (200, "draining")
            assert answer.json()["drain_requested_at"] is not None
        answer = service.client.post("/v1/jobs?require_worker=true", json=service.job_body())
        assert_problem(answer, 409, "no-worker")
        service.finish(claim, report={"selection": None})
        assert listed(service, id)["state"] == "drained"
        for _ in range(2):
            answer = service.client.delete(path)
            assert (answer.status_code, answer.json()["state"]) == (200, "active")
            assert answer.json()["drain_requested_at"] is None
        assert service.claim(service.new_job(), worker=name_of(service, id))


def test_an_unknown_worker_is_not_found(service: Service) -> None:
    for id in ("wrk_absent", "x" * 64, "%00"):
        answer = service.client.post(f"/v1/workers/{id}/drain")
        assert answer.status_code in (404, 422), answer.text
    assert_problem(service.client.delete("/v1/workers/wrk_absent/drain"), 404, "not-found")
