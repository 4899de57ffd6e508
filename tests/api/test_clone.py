"""Jobs made from other ones by a merge patch."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.merge_patch import TooDeep, merge_patch
from tests.api.conftest import Service, assert_problem


@pytest.mark.parametrize(
    ("target", "patch", "merged"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_patch_does_what_the_rfc_says(target: Any, patch: Any, merged: Any) -> None:
    before = json.dumps(target)
    assert merge_patch(target, patch) == merged
    assert json.dumps(target) == before


def test_a_patch_has_an_end() -> None:
    patch: dict[str, Any] = {}
    for _ in range(33):
        patch = {"a": patch}
    with pytest.raises(TooDeep):
        merge_patch({}, patch)


@pytest.fixture(scope="module")
def original(service: Service) -> dict[str, Any]:
    body = service.job_body(supernet={"width_mults": [1, "1/2"]}, seed=3)
    details = {"name": "first", "priority": 2, "time_limit_minutes": 30}
    return dict(service.client.post("/v1/jobs", json=body | details).json())


def clone(service: Service, original: dict[str, Any], patch: Any = None) -> dict[str, Any]:
    answer = service.client.post(f"/v1/jobs/{original['id']}/clone", json=patch)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return dict(answer.json())


@pytest.mark.parametrize("patch", [None, {}])
def test_without_changes_it_is_the_same_job_again(
    service: Service, original: dict[str, Any], patch: Any
) -> None:
    made = clone(service, original, patch)
    assert made["id"] != original["id"]
    own = {"id", "created_at", "queue"}
    assert {name: value for name, value in made.items() if name not in own} == {
        name: value for name, value in original.items() if name not in own
    }
    (entry,) = service.client.get(f"/v1/audit?target={made['id']}").json()["items"]
    assert entry["details"]["cloned_from"] == original["id"]


def test_changes_replace_add_and_take_back(service: Service, original: dict[str, Any]) -> None:
    patch = {
        "name": None,
        "priority": None,
        "time_limit_minutes": 45,
        "spec": {"seed": 4, "supernet": None, "distillation": {"max_steps": 5}},
    }
    made = clone(service, original, patch)
    assert made["name"] != "first"  # the default
    assert (made["priority"], made["time_limit_minutes"]) == (0, 45)
    assert made["spec"]["seed"] == 4
    assert made["spec"]["supernet"]["width_mults"] == ["1", "3/4", "1/2", "1/4"]
    assert made["spec"]["distillation"]["max_steps"] == 5
    assert made["spec"]["task"] == original["spec"]["task"]
    assert len(made["plan"]["subnetworks"]) == 4
    assert service.client.get(f"/v1/jobs/{original['id']}").json()["spec"] == original["spec"]


def test_a_dry_run_of_a_clone_stores_nothing(service: Service, original: dict[str, Any]) -> None:
    newest = service.client.get("/v1/jobs?limit=1").json()["items"][0]["id"]
    answer = service.client.post(
        f"/v1/jobs/{original['id']}/clone?dry_run=true", json={"spec": {"supernet": None}}
    )
    assert answer.status_code == 200
    assert len(answer.json()["plan"]["subnetworks"]) == 4
    assert service.client.get("/v1/jobs?limit=1").json()["items"][0]["id"] == newest


@pytest.mark.parametrize(
    ("patch", "code", "pointer"),
    [
        ({"spec": {"seed": -1}}, "invalid-request", "/spec/seed"),
        ({"spec": {"nope": 1}}, "invalid-request", "/spec/nope"),
        ({"spec": [1]}, "invalid-request", "/spec"),
        ({"spec": {"supernet": {"width_mults": ["1/7"]}}}, "invalid-spec",
         "/spec/supernet/width_mults/0"),
        ({"model": "mdl_absent"}, "unknown-reference", "/model"),
        ({"model": None}, "invalid-request", "/model"),
        ({"id": "job_x"}, "invalid-request", "/id"),
        ({"time_limit_minutes": 1e6}, "invalid-request", "/time_limit_minutes"),
    ],
)  # fmt: skip
def test_a_patch_that_makes_no_job_is_refused_at_its_field(
    service: Service, original: dict[str, Any], patch: Any, code: str, pointer: str
) -> None:
    newest = service.client.get("/v1/jobs?limit=1").json()["items"][0]["id"]
    answer = service.client.post(f"/v1/jobs/{original['id']}/clone", json=patch)
    assert assert_problem(answer, 422, code)["pointer"] == pointer
    assert service.client.get("/v1/jobs?limit=1").json()["items"][0]["id"] == newest


def test_a_patch_that_is_none_is_refused(service: Service, original: dict[str, Any]) -> None:
    path = f"/v1/jobs/{original['id']}/clone"
    for patch in ([], "x", 5):
        assert_problem(service.client.post(path, json=patch), 422, "invalid-request")
    deep = b'{"spec":' * 60 + b"{}" + b"}" * 60
    json_type = {"Content-Type": "application/json"}
    assert_problem(
        service.client.post(path, content=deep, headers=json_type), 422, "invalid-request"
    )
    assert_problem(
        service.client.post(path, content=b"{", headers=json_type), 400, "malformed-json"
    )
    merge = {"Content-Type": "application/merge-patch+json"}
    answer = service.client.post(path, content=b'{"priority": 1}', headers=merge)
    assert (answer.status_code, answer.json()["priority"]) == (202, 1)
