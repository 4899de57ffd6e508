"""The user whose jobs the faults hit, with an API that answers as it is told."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.chaos.user import User


def test_a_job_whose_answer_was_lost_is_asked_for_again_when_no_more_are_wanted(
    tmp_path: Path,
) -> None:
    """The service may have it: it would otherwise be one that nobody has asked for."""
    keys: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/jobs":
            return httpx.Response(201, json={"id": f"of {request.url.path}"})
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 1:
            raise httpx.ReadError("the API was killed", request=request)
        return httpx.Response(202, json={"id": "job_1", "state": "queued"})

    user = User("http://api", "key", seed=1, jobs=3, folder=tmp_path)
    user._http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://api")
    assert user.has_all
    user.tick(most=1)
    user.want_no_more()
    assert user.wants_more and not user.has_all
    user.tick(most=0)
    assert user.asked == ["job_1"]
    assert keys == ["job-1-0", "job-1-0"]
    assert not user.wants_more
