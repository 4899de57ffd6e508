"""The OpenAPI document tells the truth: a short seeded walk by schemathesis; `make fuzz` is a long
one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.conftest import Service, serving
from tests.hostile.fuzzing import walk

EXAMPLES = 3  # of each operation and phase


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Service]:
    """A service of its own: the walk makes records, revokes keys and cancels jobs."""
    with serving(tmp_path / "data", rate_limit_per_minute=10**9) as running:
        yield running


def test_no_request_of_a_walk_finds_what_the_document_does_not_say(
    fresh: Service, tmp_path: Path
) -> None:
    found = walk(fresh, tmp_path, examples=EXAMPLES, seed=1)
    document = fresh.client.get("/openapi.json").json()
    assert found.operations == sum(len(operations) for operations in document["paths"].values())
    assert found.operations_tested == found.operations
    assert found.cases > 10 * found.operations
    assert (found.exit_code, found.failures, found.errors) == (0, (), ()), found.output


def test_links_lead_from_every_collection_to_its_records(fresh: Service) -> None:
    """They make the walk stateful: an id from an answer is asked for in the next request."""
    paths = fresh.client.get("/openapi.json").json()["paths"]
    ids = {op["operationId"] for operations in paths.values() for op in operations.values()}
    assert len(ids) == sum(len(operations) for operations in paths.values())
    for noun, parameter in (("models", "model_id"), ("datasets", "dataset_id"), ("jobs", "job_id")):
        for method, status in (("get", "200"), ("post", "202" if noun == "jobs" else "201")):
            links = paths[f"/v1/{noun}"][method]["responses"][status]["links"]
            assert paths[f"/v1/{noun}/{{{parameter}}}"]["get"]["operationId"] in links
            for link in links.values():
                assert link["operationId"] in ids
                assert set(link["parameters"]) == {parameter}
