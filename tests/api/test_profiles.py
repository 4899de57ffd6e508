"""Profiles of devices: uploaded, listed, and named by the constraints of jobs and selections."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import httpx
import jsonschema
import pytest

from compression.teachers import EncoderConfig
from jobs import store
from jobs.records import DEFAULT_PROJECT
from jobs.roles import Role
from tests.api.conftest import Service, assert_problem
from tests.api.test_selection import measured
from tests.builders import device_profile

ENCODER = EncoderConfig(
    family="bert",
    vocab_size=50,
    hidden=32,
    layers=1,
    heads=(4,),
    head_dim=8,
    ffn=(64,),
    max_positions=128,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    activation="gelu",
    hidden_dropout=0.1,
    attention_dropout=0.1,
    pad_token_id=0,
    num_labels=2,
)


def upload(service: Service, name: str = "board", **changes: Any) -> dict[str, Any]:
    body = device_profile(**changes)
    answer = service.client.post("/v1/profiles", params={"name": name}, json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


@pytest.fixture(scope="module")
def profile(service: Service) -> dict[str, Any]:
    return upload(service)


def test_a_profile_is_stored_as_it_was_measured(service: Service, profile: dict[str, Any]) -> None:
    assert profile["profile"] == device_profile()
    assert (profile["name"], profile["heads"], profile["ffn"]) == ("board", [1, 4], [16, 64])
    assert (profile["batch_size"], profile["seq_len"], profile["threads"]) == ([1], [4, 64], [1])
    assert profile["errors"]["onnx"]["highest"] == pytest.approx(0.05)
    assert service.client.get(f"/v1/profiles/{profile['id']}").json() == profile
    listed = service.client.get("/v1/profiles?limit=200").json()["items"]
    (own,) = [each for each in listed if each["id"] == profile["id"]]
    assert own == {key: value for key, value in profile.items() if key != "profile"}
    answer = service.client.post("/v1/profiles", json=device_profile())
    assert answer.headers["location"] == f"/v1/profiles/{answer.json()['id']}"
    assert answer.json()["name"] == "Test Board rev 3"
    assert answer.json()["sha256"] == profile["sha256"]


def test_profiles_are_listed_in_pages(service: Service) -> None:
    newest = [upload(service, f"p{i}")["id"] for i in range(3)][::-1]
    first = service.client.get("/v1/profiles?limit=2").json()
    assert [each["id"] for each in first["items"]] == newest[:2]
    rest = service.client.get(f"/v1/profiles?limit=2&after={first['next']}").json()
    assert rest["items"][0]["id"] == newest[2]


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"widthwise_profile": 1}, "/widthwise_profile"),
        ({"tables": []}, "/tables"),
        ({"networks": []}, "/networks"),
        ({"errors": {"onnx": {"highest": 0}}}, "/errors"),
        ({"layers": 0}, "/layers"),
        ({"device": {}}, "/device/cpu"),
    ],
)
def test_what_is_no_profile_is_refused_at_its_field(
    service: Service, changes: dict[str, Any], pointer: str
) -> None:
    before = service.client.get("/v1/profiles?limit=200").json()
    answer = service.client.post("/v1/profiles", json={**device_profile(), **changes})
    assert assert_problem(answer, 422, "invalid-request")["pointer"] == pointer
    assert service.client.get("/v1/profiles?limit=200").json() == before


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "malformed-json"),
        (b"[" * 500_000, 400, "bad-request"),
        (b'{"layers": ' + b"9" * 10_000 + b"}", 400, "bad-request"),
        (b'{"layers": 1e999}', 422, "invalid-request"),
        (b"[]", 422, "invalid-request"),
        (b"null", 422, "invalid-request"),
        (b'{"x": "' + b"y" * (1 << 20) + b'"}', 413, "content-too-large"),
    ],
)
def test_hostile_bodies_are_refused(
    service: Service, content: bytes, status: int, code: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = service.client.post("/v1/profiles", content=content, headers=headers)
    assert_problem(answer, status, code)


def test_the_largest_profile_there_may_be_holds_nobody_up(service: Service) -> None:
    """Every size at its bound, and every network between eight settings."""
    counts = tuple(range(1, 41))
    body = device_profile(
        layers=64,
        heads=counts,
        ffn=counts,
        batch_size=(1, 3, 9, 20, 30),
        seq_len=(2, 5, 9, 100, 200),
        threads=(1, 3, 5, 9, 20),
        off=(0.1,),
    )
    network = body["networks"][0]
    drawn = {"heads": [7, 9] * 32, "ffn": [8, 11] * 32, "batch_size": 2, "seq_len": 3, "threads": 2}
    body["networks"] = [{**network, **drawn}] * 128
    answer = service.client.post("/v1/profiles", json=body)
    assert answer.status_code == 201, answer.text
    assert service.client.get("/healthz").status_code == 200


# --- in constraints -------------------------------------------------------------------------


def create(service: Service, *, dry_run: bool = False, **constraints: Any) -> httpx.Response:
    body = service.job_body(constraints=constraints)
    return service.client.post("/v1/jobs", params={"dry_run": dry_run}, json=body)


def test_a_job_carries_the_profile_that_it_selects_for(
    service: Service, profile: dict[str, Any]
) -> None:
    planned = create(service, dry_run=True, latency_on=profile["id"], max_latency_ms=10)
    told = planned.json()["plan"]["warnings"]
    assert any("not measured but predicted for Test Board rev 3 (4 cores" in each for each in told)
    answer = create(service, latency_on=profile["id"], max_latency_ms=10)
    assert answer.status_code == 202, answer.text
    assert answer.json()["spec"]["constraints"]["latency_on"] == profile["id"]
    assert service.claim(answer.json()["id"]).profile == device_profile()
    assert service.claim(service.new_job()).profile is None


def test_what_the_profile_cannot_answer_is_refused_at_submit(service: Service) -> None:
    narrow = upload(service, heads=(2, 4))["id"]
    answer = create(service, latency_on=narrow)
    problem = assert_problem(answer, 422, "invalid-spec")
    assert problem["pointer"] == "/spec/constraints/latency_on"
    assert "w1_4 cannot be predicted: heads 1 lies outside the profile" in problem["detail"]
    short = upload(service, seq_len=(4, 8))["id"]
    answer = create(service, latency_on=short, latency_at={"seq_len": 20})
    assert assert_problem(answer, 422, "invalid-spec")["pointer"] == (
        "/spec/constraints/latency_at/seq_len"
    )
    for unknown in ("prf_absent", service.model_id):
        answer = create(service, latency_on=unknown)
        problem = assert_problem(answer, 422, "unknown-reference")
        assert problem["pointer"] == "/spec/constraints/latency_on"
    answer = create(service, latency_on="prf_\x00")
    assert assert_problem(answer, 422, "invalid-request")["pointer"] == (
        "/spec/constraints/latency_on"
    )


def test_another_projects_profile_is_an_unknown_reference(
    service: Service, profile: dict[str, Any]
) -> None:
    other = service.new_project()
    client = service.as_key(service.new_key(Role.ADMIN, project_id=other).secret)
    assert_problem(client.get(f"/v1/profiles/{profile['id']}"), 404, "not-found")
    assert client.get("/v1/profiles").json()["items"] == []
    with service.services.database.reading() as session:
        assert store.list_profiles(session, project_id=other) == []
        assert store.list_profiles(session, project_id=DEFAULT_PROJECT)


def finished(service: Service, **teacher: Any) -> str:
    """A job of two sub-networks of one layer: 4 heads and 64 neurons, and half as many."""
    claim = service.claim(service.new_job())
    service.publish(claim, "w1_2/bundle.tar.gz", b"content")
    whole, half = (
        measured(name, width, drop=drop, ms=ms, mb=70)
        for name, width, drop, ms in (
            ("w1", Fraction(1), 0.0, 9.0),
            ("w1_2", Fraction(1, 2), 0.5, 8.9),
        )
    )
    report = {
        "subnetworks": [
            {**whole, "heads": [4], "ffn": [64]},
            {**half, "heads": [2], "ffn": [32]},
        ],
        "selection": {"subnetwork": "w1"},
        "teacher": teacher,
    }
    service.finish(claim, report=report)
    return claim.job_id


def select(service: Service, job_id: str, **constraints: Any) -> httpx.Response:
    return service.client.post(f"/v1/jobs/{job_id}/selection", json={"constraints": constraints})


def test_a_finished_job_is_asked_for_another_device(service: Service) -> None:
    job_id = finished(service, encoder=ENCODER.to_dict())
    profile = upload(service, threads=(1, 4))
    answer = select(service, job_id, latency_on=profile["id"], max_latency_ms=15, min_speedup=1.5)
    assert answer.status_code == 200, answer.text
    selection = answer.json()["selection"]
    # Twenty tokens, as the job measured: 1 + 2 * (4 + 6.4) and half of the blocks.
    assert selection["subnetwork"] == "w1_2"
    assert "11.4 ms" in selection["reason"]
    assert "latency is p50, predicted for Test Board rev 3" in selection["reason"]
    assert selection["latency_on"]["profile"] == profile["id"]
    assert selection["latency_on"]["sha256"] == profile["sha256"]
    assert selection["latency_on"]["errors"] == profile["errors"]
    (artifact,) = answer.json()["artifacts"]
    assert artifact["path"] == "w1_2/bundle.tar.gz"
    document = service.client.get("/openapi.json").json()
    schema = document["paths"]["/v1/jobs/{job_id}/selection"]["post"]["responses"]["200"]
    schema = schema["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json(), schema | {"components": document["components"]})

    four = select(
        service, job_id, latency_on=profile["id"], max_latency_ms=3, latency_at={"threads": 4}
    ).json()["selection"]
    assert four["subnetwork"] is None
    assert [each["latency_ms"] for each in four["nearest"]] == pytest.approx([3.6, 6.2])
    assert "predicted for Test Board" in four["reason"]
    as_measured = select(service, job_id, max_accuracy_drop=1).json()["selection"]
    assert as_measured["latency_on"] is None


@pytest.mark.parametrize(
    ("constraints", "code", "pointer"),
    [
        ({"latency_on": "prf_absent"}, "unknown-reference", "/constraints/latency_on"),
        ({"latency_at": {"percentile": 99}}, "invalid-spec", "/constraints/latency_at/percentile"),
        ({"latency_at": {"seq_len": 100}}, "invalid-spec", "/constraints/latency_at/seq_len"),
        ({"min_speedup": 2, "confidence": 0.9}, "invalid-spec", "/constraints/confidence"),
    ],
)
def test_what_cannot_be_predicted_is_refused_at_its_field(
    service: Service,
    profile: dict[str, Any],
    constraints: dict[str, Any],
    code: str,
    pointer: str,
) -> None:
    job_id = finished(service, encoder=ENCODER.to_dict())
    answer = select(service, job_id, **{"latency_on": profile["id"], **constraints})
    assert assert_problem(answer, 422, code)["pointer"] == pointer


def test_a_job_from_before_there_were_profiles_cannot_be_asked(
    service: Service, profile: dict[str, Any]
) -> None:
    answer = select(service, finished(service), latency_on=profile["id"])
    problem = assert_problem(answer, 422, "invalid-spec")
    assert problem["pointer"] == "/constraints/latency_on"
    assert "lacks the shape of its teacher" in problem["detail"]


def test_a_profile_of_an_unknown_form_is_refused_and_not_guessed(service: Service) -> None:
    with service.services.database.transaction() as session:
        odd = store.add_profile(
            session,
            project_id=DEFAULT_PROJECT,
            name="odd",
            sha256="0" * 64,
            summary={},
            content={"widthwise_profile": 99},
        ).id
    assert_problem(create(service, latency_on=odd), 409, "profile-unreadable")


def test_a_profile_is_deleted_once_no_job_needs_it(service: Service) -> None:
    id = service.new_profile()
    path = f"/v1/profiles/{id}"
    created = create(service, latency_on=id)
    assert created.status_code == 202, created.text
    job = f"/v1/jobs/{created.json()['id']}"
    problem = assert_problem(service.client.delete(path), 409, "in-use")
    assert created.json()["id"] in problem["detail"]
    assert service.client.post(f"{job}/cancel").json()["state"] == "cancelled"
    assert service.client.delete(path).status_code == 204
    for answer in (service.client.get(path), service.client.delete(path)):
        assert_problem(answer, 404, "not-found")
    assert id not in service.client.get("/v1/profiles?limit=200").text
    spec = service.client.get(job).json()["spec"]
    assert spec["constraints"]["latency_on"] == id
    assert_problem(service.client.post(f"{job}/retry"), 409, "input-deleted")
    problem = assert_problem(service.client.post(f"{job}/clone"), 422, "unknown-reference")
    assert problem["pointer"] == "/spec/constraints/latency_on"
    other = {"spec": {"constraints": {"latency_on": service.new_profile()}}}
    assert service.client.post(f"{job}/clone?dry_run=true", json=other).status_code == 200
    (line,) = service.client.get(f"/v1/audit?target={id}&limit=1").json()["items"]
    assert line["action"] == "profile.deleted"
