"""Jobs: planned, refused before anything is stored, created, listed, cancelled."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from api import jobs as jobs_routes
from jobs.roles import Role
from jobs.states import JobState
from tests.api.conftest import Service, archive, assert_problem, serving, wait_for
from tests.builders import tiny_bert, tiny_dataset


def count(service: Service) -> int:
    seen, after = 0, None
    while True:
        query = {"limit": 200} | ({"after": after} if after else {})
        page = service.client.get("/v1/jobs", params=query).json()
        seen += len(page["items"])
        if (after := page["next"]) is None:
            return seen


def test_a_dry_run_answers_with_the_plan_and_stores_nothing(service: Service) -> None:
    before = count(service)
    answer = service.client.post("/v1/jobs?dry_run=true", json=service.job_body())
    assert answer.status_code == 200
    plan = answer.json()["plan"]
    assert [network["width_mult"] for network in plan["subnetworks"]] == ["1", "3/4", "1/2", "1/4"]
    assert [network["heads"] for network in plan["subnetworks"]] == [
        [4, 4], [3, 3], [2, 2], [1, 1],
    ]  # fmt: skip
    parameters = [network["parameters"] for network in plan["subnetworks"]]
    assert parameters == sorted(parameters, reverse=True)
    assert plan["labels"] == ["0", "1"]
    assert not plan["fine_tune"]
    assert count(service) == before


def test_a_job_is_stored_queued_and_nudged(service: Service) -> None:
    waiting = service.settings.data_dir / "broker" / "waiting"
    before = set(waiting.iterdir())
    body = service.job_body(supernet={"width_mults": [0.5, "1"]}) | {"name": "  reviews  "}
    answer = service.client.post("/v1/jobs", json=body)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["name"], job["runs"]) == ("queued", "reviews", 0)
    assert (job["model"], job["dataset"]) == (service.model_id, service.dataset_id)
    assert job["spec"]["supernet"]["width_mults"] == ["1/2", "1"]
    assert job["plan"]["labels"] == ["0", "1"]
    assert service.client.get(answer.headers["location"]).json() == job
    wait_for(lambda: set(waiting.iterdir()) - before)
    (message,) = set(waiting.iterdir()) - before
    body = json.loads(base64.b64decode(json.loads(message.read_text())["body"]))
    assert body[0] == [job["id"]]  # the arguments: an id and nothing more
    events = service.client.get(f"/v1/jobs/{job['id']}/events").json()
    assert [event["kind"] for event in events["items"]] == ["queued"]


@pytest.mark.parametrize(
    ("spec", "code", "pointer"),
    [
        ({"supernet": {"width_mults": [1, "1/7"]}}, "invalid-spec", "/spec/supernet/width_mults/1"),
        ({"supernet": {"width_mults": ["1/7", 1]}}, "invalid-spec", "/spec/supernet/width_mults/0"),
        ({"supernet": {"width_mults": ["7/4"]}}, "invalid-request", "/spec/supernet/width_mults/0"),
        ({"supernet": {"width_mults": ["1/0"]}}, "invalid-request", "/spec/supernet/width_mults/0"),
        (
            {"supernet": {"width_mults": ["__import__('os')"]}},
            "invalid-request",
            "/spec/supernet/width_mults/0",
        ),
        (
            {"supernet": {"width_mults": [1, "2/2"]}},
            "invalid-request",
            "/spec/supernet/width_mults",
        ),
        ({"supernet": {"width_mults": []}}, "invalid-request", "/spec/supernet/width_mults"),
        ({"supernet": {"widths": [1]}}, "invalid-request", "/spec/supernet/widths"),
        ({"nope": 1}, "invalid-request", "/spec/nope"),
        ({"task": {"text": "absent"}}, "invalid-spec", "/spec/task/text"),
        ({"task": {"label": "absent"}}, "invalid-spec", "/spec/task/label"),
        ({"task": {"labels": ["a", "b"]}}, "invalid-spec", "/spec/task/labels"),
        ({"task": {"max_seq_len": 128}}, "invalid-spec", "/spec/task/max_seq_len"),
        ({"task": {"kind": "regression"}}, "invalid-spec", "/spec/task/kind"),
        ({"task": {"metric": "pearson"}}, "invalid-request", "/spec/task/metric"),
        ({"seed": -1}, "invalid-request", "/spec/seed"),
        ({"device": "tpu"}, "invalid-request", "/spec/device"),
        (
            {"constraints": {"max_latency_ms": 0}},
            "invalid-request",
            "/spec/constraints/max_latency_ms",
        ),
        (
            {"constraints": {"max_latency_ms": 8, "latency_at": {"threads": 8}}},
            "invalid-spec",
            "/spec/constraints/latency_at/threads",
        ),
        ({"distillation": {"epochs": "three"}}, "invalid-request", "/spec/distillation/epochs"),
        ({"export": {"formats": ["safetensors"]}}, "invalid-request", "/spec/export/formats"),
        ([], "invalid-request", "/spec"),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_run_is_refused_at_its_field(
    service: Service, spec: Any, code: str, pointer: str
) -> None:
    before = count(service)
    body = service.job_body()
    if isinstance(spec, dict):
        task = {"max_seq_len": 32} | spec.get("task", {})
        spec = spec | {"task": task}
    answer = service.client.post("/v1/jobs", json=body | {"spec": spec})
    problem = assert_problem(answer, 422, code)
    assert problem["pointer"] == pointer
    assert problem["errors"][0]["pointer"] == pointer
    assert count(service) == before


def test_half_a_surrogate_pair_is_refused_at_its_field(service: Service) -> None:
    spec = {"teacher": {"when": "always"}, "task": {"labels": ["0", "1", "\ud800"]}}
    answer = service.client.post(
        "/v1/jobs?dry_run=true",
        content=json.dumps(service.job_body(**spec)),  # in ASCII, as JSON may spell it
        headers={"Content-Type": "application/json"},
    )
    problem = assert_problem(answer, 422, "invalid-request")
    assert problem["pointer"] == "/spec/task/labels/2"


@pytest.mark.parametrize(
    ("change", "code", "pointer"),
    [
        ({"model": "mdl_absent"}, "unknown-reference", "/model"),
        ({"dataset": "dst_absent"}, "unknown-reference", "/dataset"),
        ({"model": 5}, "invalid-request", "/model"),
        ({"model": 65 * "m"}, "invalid-request", "/model"),
        ({"name": ""}, "invalid-request", "/name"),
        ({"name": "a\nb"}, "invalid-request", "/name"),
        ({"name": 201 * "n"}, "invalid-request", "/name"),
        ({"priority": 101}, "invalid-request", "/priority"),
        ({"priority": "high"}, "invalid-request", "/priority"),
        ({"time_limit_minutes": 0}, "invalid-request", "/time_limit_minutes"),
        ({"time_limit_minutes": 1e9}, "invalid-request", "/time_limit_minutes"),
        ({"nice": 1}, "invalid-request", "/nice"),
    ],
)
def test_a_request_that_means_nothing_is_refused_at_its_field(
    service: Service, change: dict[str, Any], code: str, pointer: str
) -> None:
    answer = service.client.post("/v1/jobs", json=service.job_body() | change)
    assert assert_problem(answer, 422, code)["pointer"] == pointer


def test_every_fault_of_a_request_is_named_at_once(service: Service) -> None:
    answer = service.client.post("/v1/jobs", json={"spec": {"seed": -1, "nope": 1}})
    problem = assert_problem(answer, 422, "invalid-request")
    assert {entry["pointer"] for entry in problem["errors"]} == {
        "/model", "/dataset", "/spec/seed", "/spec/nope",
    }  # fmt: skip


def test_a_dead_broker_does_not_lose_the_job(tmp_path: Any) -> None:
    with serving(tmp_path / "data", broker_url="redis://127.0.0.1:9/0") as service:
        job_id = service.new_job()
        assert service.client.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"
        problem = assert_problem(service.client.get("/readyz"), 503, "not-ready")
        assert problem["checks"]["database"] == problem["checks"]["store"] == "ok"
        assert problem["checks"]["broker"] != "ok"
        assert "127.0.0.1" not in problem["detail"]


def test_a_silent_broker_keeps_nobody_waiting(tmp_path: Any) -> None:
    """One that takes connections and says nothing; more jobs than the service has threads."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with serving(tmp_path / "data", broker_url=url, rate_limit_per_minute=0) as service:
            job_ids = {service.new_job() for _ in range(50)}
            assert service.client.get("/v1/me", timeout=5).status_code == 200
            listed = service.client.get("/v1/jobs?limit=50", timeout=5).json()["items"]
            assert {job["id"] for job in listed} == job_ids


def test_pages_hold_every_job_once_newest_first(service: Service) -> None:
    made = [service.new_job() for _ in range(5)]
    seen: list[str] = []
    after = None
    while True:
        query = {"limit": 2} | ({"after": after} if after else {})
        page = service.client.get("/v1/jobs", params=query).json()
        seen += [item["id"] for item in page["items"]]
        if len(seen) == 2:
            service.new_job()  # what comes meanwhile shifts no page
        after = page["next"]
        if after is None:
            break
    assert seen[:5] == made[::-1]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("what", ["jobs", "profiles"])
def test_who_deletes_what_a_page_shows_reads_on_from_there(service: Service, what: str) -> None:
    made = [service.new_job() if what == "jobs" else service.new_profile() for _ in range(5)]
    if what == "jobs":
        for id in made:
            service.client.post(f"/v1/jobs/{id}/cancel")
    path, after = f"/v1/{what}", None
    seen: list[str] = []
    while len(seen) < len(made):
        query = {"limit": 2} | ({"after": after} if after else {})
        answer = service.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        mine = [item["id"] for item in answer.json()["items"] if item["id"] in made]
        assert mine  # they are the newest
        for id in mine:
            assert service.client.delete(f"{path}/{id}").status_code == 204
        seen += mine
        after = answer.json()["next"]
    assert seen == made[::-1]


def test_a_cursor_shows_nothing_of_another_project(service: Service) -> None:
    made = [service.new_job() for _ in range(2)]
    after = service.client.get("/v1/jobs?limit=1").json()["next"]
    assert after.startswith(made[1])
    other = service.as_key(service.new_key(Role.VIEWER, project_id=service.new_project()).secret)
    assert other.get("/v1/jobs", params={"after": after}).json() == {"items": [], "next": None}
    for odd in (f"{made[1]}~", "~1", "a~b", f"{made[1]}~-1", f"{made[1]}~{10**17}"):
        assert_problem(service.client.get("/v1/jobs", params={"after": odd}), 404, "not-found")
    for cursor, left in (
        (after, made[:1]),
        (made[1], made[:1]),  # an id will do, of a record that is there
        (f"x~{10**17 - 1}", made[::-1]),
        ("x~0", []),
    ):
        page = service.client.get("/v1/jobs", params={"after": cursor}).json()
        assert [item["id"] for item in page["items"] if item["id"] in made] == left


def test_jobs_are_found_by_their_state(service: Service) -> None:
    cancelled = service.new_job()
    service.client.post(f"/v1/jobs/{cancelled}/cancel")
    page = service.client.get("/v1/jobs", params={"state": "cancelled"}).json()
    assert cancelled in [item["id"] for item in page["items"]]
    assert {item["state"] for item in page["items"]} == {"cancelled"}


def test_a_queued_job_is_cancelled_at_once_and_for_good(service: Service) -> None:
    job_id = service.new_job()
    for _ in range(2):
        answer = service.client.post(f"/v1/jobs/{job_id}/cancel")
        assert answer.status_code == 202
        assert answer.json()["state"] == "cancelled"
        assert answer.json()["finished_at"] is not None
    events = service.client.get(f"/v1/jobs/{job_id}/events").json()
    assert [event["kind"] for event in events["items"]] == ["queued", "cancelled"]
    assert events["ended"]


def test_a_running_job_is_asked_to_stop(service: Service) -> None:
    claim = service.claim(service.new_job())
    job = service.client.post(f"/v1/jobs/{claim.job_id}/cancel").json()
    assert (job["state"], job["cancel_requested"]) == ("running", True)


def test_a_finished_job_cannot_be_cancelled(service: Service) -> None:
    claim = service.claim(service.new_job())
    service.finish(claim, report={"selection": None})
    answer = service.client.post(f"/v1/jobs/{claim.job_id}/cancel")
    assert_problem(answer, 409, "job-finished")
    assert_problem(service.client.post("/v1/jobs/job_absent/cancel"), 404, "not-found")


def test_a_job_knows_its_place_in_the_queue_and_its_limit(service: Service) -> None:
    body = service.job_body(device="gpu")
    first = service.client.post("/v1/jobs", json=body | {"time_limit_minutes": 90}).json()
    urgent = service.client.post("/v1/jobs", json=body | {"priority": 3}).json()
    assert (first["priority"], first["time_limit_minutes"]) == (0, 90)
    assert (urgent["priority"], urgent["time_limit_minutes"]) == (3, 7 * 24 * 60)
    assert first["queue"]["device"] == "gpu"
    assert (first["queue"]["position"], urgent["queue"]["position"]) == (1, 1)
    again = service.client.get(f"/v1/jobs/{first['id']}").json()
    assert again["queue"] == first["queue"] | {"position": 2}
    service.claim(urgent["id"])
    assert service.client.get(f"/v1/jobs/{urgent['id']}").json()["queue"] is None
    assert service.client.get(f"/v1/jobs/{first['id']}").json()["queue"]["position"] == 1


def test_a_device_that_nobody_has_is_told_or_refused(service: Service) -> None:
    before = count(service)
    for device in ("cpu", "gpu"):
        body = service.job_body(device=device)
        answer = service.client.post("/v1/jobs?require_worker=true", json=body)
        problem = assert_problem(answer, 409, "no-worker")
        assert problem["detail"] == f"No worker has announced the device {device}."
        dry = service.client.post("/v1/jobs?require_worker=true&dry_run=true", json=body)
        assert dry.status_code == 200
    assert count(service) == before
    queued = service.client.post("/v1/jobs", json=service.job_body(device="gpu")).json()
    assert "the device gpu" in queued["queue"]["warning"]
    with service.worker(slots=1, gpus=2):
        for device in ("cpu", "gpu", "gpu:1"):
            body = service.job_body(device=device)
            answer = service.client.post("/v1/jobs?require_worker=true", json=body)
            assert answer.status_code == 202
            assert answer.json()["queue"]["warning"] is None
        body = service.job_body(device="gpu", processes=4)
        answer = service.client.post("/v1/jobs?require_worker=true", json=body)
        assert "4 GPUs" in assert_problem(answer, 409, "no-worker")["detail"]


def test_a_message_goes_to_the_queue_of_the_device(service: Service) -> None:
    waiting = service.settings.data_dir / "broker" / "waiting"
    before = set(waiting.iterdir())
    service.client.post("/v1/jobs", json=service.job_body(device="gpu"))
    wait_for(lambda: set(waiting.iterdir()) - before)
    (message,) = set(waiting.iterdir()) - before
    assert message.name.endswith(".widthwise-gpu.msg")


def test_a_failed_or_cancelled_job_is_run_again(service: Service) -> None:
    claim = service.claim(service.new_job())
    path = f"/v1/jobs/{claim.job_id}"
    assert_problem(service.client.post(f"{path}/retry"), 409, "job-not-finished")
    service.finish(claim, JobState.FAILED, error={"code": "x", "message": "y"})
    answer = service.client.post(f"{path}/retry")
    assert answer.status_code == 202
    job = answer.json()
    assert (job["id"], job["state"], job["error"], job["runs"]) == (claim.job_id, "queued", None, 0)
    assert job["queue"]["position"] >= 1
    service.client.post(f"{path}/cancel")
    assert service.client.post(f"{path}/retry").json()["state"] == "queued"
    again = service.claim(claim.job_id)
    assert again.fence == 2
    service.finish(again, report={"selection": None})
    assert_problem(service.client.post(f"{path}/retry"), 409, "job-succeeded")
    events = service.client.get(f"{path}/events").json()
    assert [event["kind"] for event in events["items"]] == [
        "queued", "started", "failed", "queued", "cancelled", "queued", "started", "succeeded",
    ]  # fmt: skip
    entries = service.client.get(f"/v1/audit?target={claim.job_id}").json()["items"]
    assert [entry["action"] for entry in entries] == [
        "job.retried", "job.cancel_requested", "job.retried", "job.created",
    ]  # fmt: skip


def test_a_failed_job_says_why(service: Service) -> None:
    claim = service.claim(service.new_job())
    error = {
        "code": "export-failed",
        "message": "Nothing could be published.",
        "pointer": None,
        "rows": [],
        "last_lines": ["one", "two"],
    }
    service.finish(claim, JobState.FAILED, error=error)
    job = service.client.get(f"/v1/jobs/{claim.job_id}").json()
    assert (job["state"], job["error"]) == ("failed", error)
    assert job["report"] is None


def test_sub_networks_are_empty_until_the_job_has_succeeded(service: Service) -> None:
    claim = service.claim(service.new_job())
    path = f"/v1/jobs/{claim.job_id}/subnetworks"
    assert service.client.get(path).json() == {
        "state": "running", "main_metric": None, "teacher": None, "items": [], "selection": None,
    }  # fmt: skip
    report = {
        "main_metric": "f1",
        "teacher": {"accuracy": 0.9},
        "subnetworks": [{"name": "w1"}, {"name": "w1_2"}],
        "selection": {"subnetwork": "w1_2", "format": "onnx", "reason": "It is the fastest."},
    }
    service.finish(claim, report=report)
    measured = service.client.get(path).json()
    assert measured["main_metric"] == "f1"
    assert measured["items"] == report["subnetworks"]
    assert measured["selection"] == report["selection"]
    job = service.client.get(f"/v1/jobs/{claim.job_id}").json()
    assert job["report"] == report
    (listed,) = service.client.get("/v1/jobs?state=succeeded&limit=1").json()["items"]
    assert listed == {name: job[name] for name in listed}
    assert listed["selection"] == report["selection"]


def test_uploads_are_listed_and_found(service: Service, client: httpx.Client) -> None:
    for noun, wanted in (("models", service.model_id), ("datasets", service.dataset_id)):
        page = client.get(f"/v1/{noun}", params={"limit": 1}).json()
        assert [item["id"] for item in page["items"]] == [wanted]
        assert page["next"] is None
        assert client.get(f"/v1/{noun}/{wanted}").json() == page["items"][0]
    model = client.get(f"/v1/models/{service.model_id}").json()
    assert (model["info"]["family"], model["info"]["layers"], model["info"]["heads"]) == (
        "bert", 2, 4,
    )  # fmt: skip
    assert model["info"]["legal_widths"] == ["1", "3/4", "1/2", "1/4"]
    dataset = client.get(f"/v1/datasets/{service.dataset_id}").json()
    assert {name: split["rows"] for name, split in dataset["profile"]["splits"].items()} == {
        "train": 256, "dev": 64, "test": 64,
    }  # fmt: skip


def test_a_job_that_has_ended_is_deleted_with_all_that_is_its_own(service: Service) -> None:
    claim = service.claim(service.new_job())
    path = f"/v1/jobs/{claim.job_id}"
    problem = assert_problem(service.client.delete(path), 409, "job-not-finished")
    assert problem["detail"].startswith("The job is running: cancel it first")
    content = bytes(range(256)) * 40_000  # more than a socket and the client take at once
    artifact = f"/v1/artifacts/{service.publish(claim, 'w1/bundle.tar.gz', content)}"
    service.finish(claim, report={"subnetworks": [], "selection": None})
    project = service.client.get("/v1/me").json()["project"]["id"]
    quotas = f"/v1/projects/{project}/quotas"
    before = service.client.get(quotas).json()["used"]["bytes"]
    with service.client.stream("GET", f"{artifact}/content") as download:
        blocks = download.iter_raw(1000)
        received = next(blocks)
        assert service.client.delete(path).status_code == 204
        received += b"".join(blocks)
    assert received == content
    assert service.client.get(quotas).json()["used"]["bytes"] == before - len(content)
    for answer in (
        *(service.client.get(path + rest) for rest in ("", "/events", "/subnetworks")),
        service.client.get(f"{path}/artifacts"),
        service.client.get(artifact),
        service.client.get(f"{artifact}/content"),
        service.client.delete(artifact),
        service.client.delete(path),
        *(service.client.post(f"{path}/{action}") for action in ("cancel", "retry", "clone")),
        service.client.post(f"{path}/selection", json={"constraints": {}}),
        service.client.get(f"/v1/jobs?after={claim.job_id}"),
    ):
        assert_problem(answer, 404, "not-found")
    assert claim.job_id not in service.client.get("/v1/jobs?limit=200").text
    lines = service.client.get(f"/v1/audit?target={claim.job_id}").json()["items"]
    assert [line["action"] for line in lines] == ["job.deleted", "job.created"]


@pytest.mark.parametrize("what", ["model", "dataset"])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/{}/clone"])
def test_what_is_deleted_while_a_job_is_planned_is_an_unknown_reference(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, path: str
) -> None:
    client, body = service.client, service.job_body()
    if what == "model":
        content = archive(tiny_bert(tmp_path / "model"))
        made = client.post("/v1/models?filename=m.tar.gz", content=content)
    else:
        files = sorted(tiny_dataset(tmp_path / "dataset").iterdir())
        parts = [("file", (file.name, file.read_bytes())) for file in files]
        made = client.post("/v1/datasets", files=parts)
    body[what] = made.json()["id"]
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    plan = jobs_routes._plan

    def plan_and_delete(*arguments: Any) -> Any:
        planned = plan(*arguments)
        assert client.delete(made.headers["location"]).status_code == 204
        return planned

    monkeypatch.setattr(jobs_routes, "_plan", plan_and_delete)
    before = count(service)
    sent = body if path == "/v1/jobs" else {}
    problem = assert_problem(client.post(path.format(job_id), json=sent), 422, "unknown-reference")
    assert problem["pointer"] == f"/{what}"
    assert count(service) == before
