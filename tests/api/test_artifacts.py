"""Downloads: whole, in ranges, conditional; and the pure functions that read those headers."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from api.artifacts import content_disposition, matches, parse_range
from api.errors import ApiError
from api.middleware import SECURITY_HEADERS
from jobs.states import JobState
from tests.api.conftest import Service, assert_problem, serving, wait_for
from tests.services import free_port, nginx_server

ROOT = Path(__file__).resolve().parents[2]
CONTENT = random.Random(0).randbytes(3 * 2**20 + 17)  # several chunks of the store
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'


@pytest.fixture(scope="module")
def artifact_url(service: Service) -> str:
    claim = service.claim(service.new_job())
    artifact_id = service.publish(claim, "w1_2/onnx/model.onnx", CONTENT)
    service.finish(claim, report={"selection": None, "subnetworks": []})
    return f"/v1/artifacts/{artifact_id}/content"


def test_the_whole_file_comes_with_its_digest(client: httpx.Client, artifact_url: str) -> None:
    answer = client.get(artifact_url)
    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["etag"] == ETAG
    digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == 'attachment; filename="model.onnx"'
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_head_has_the_same_headers_and_no_body(client: httpx.Client, artifact_url: str) -> None:
    told, got = client.head(artifact_url), client.get(artifact_url)
    assert told.content == b""
    ranged = client.head(artifact_url, headers={"Range": "bytes=0-9"})  # defined for GET alone
    for name in ("content-length", "etag", "repr-digest", "accept-ranges", "content-type"):
        assert told.headers[name] == ranged.headers[name] == got.headers[name]
    assert ranged.status_code == 200


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-299", 100, 300),
        ("bytes=1048570-1048580", 1048570, 1048581),
        ("bytes=-17", len(CONTENT) - 17, len(CONTENT)),
        ("bytes=3145740-", 3145740, len(CONTENT)),
        ("bytes=3145740-99999999999", 3145740, len(CONTENT)),
        ("bytes=-99999999999", 0, len(CONTENT)),
    ],
)
def test_one_range_gives_these_bytes(
    client: httpx.Client, artifact_url: str, asked: str, start: int, end: int
) -> None:
    answer = client.get(artifact_url, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["etag"] == ETAG  # of the whole file, as a resuming client needs it


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", "bytes=-0"])
def test_a_range_outside_is_not_satisfiable(
    client: httpx.Client, artifact_url: str, asked: str
) -> None:
    answer = client.get(artifact_url, headers={"Range": asked})
    assert_problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=5-2",
        "bytes=",
        "bytes=-",
        "rows=1-2",
        "bytes=0-1,5-6",
        "bytes=a-b",
        "1-2",
        "bytes=" + 5000 * "9" + "-",
    ],
)
def test_a_range_that_means_nothing_here_is_ignored(
    client: httpx.Client, artifact_url: str, asked: str
) -> None:
    answer = client.get(artifact_url, headers={"Range": asked})
    assert answer.status_code == 200
    assert len(answer.content) == len(CONTENT)


def test_a_broken_download_resumes_only_on_the_same_file(
    client: httpx.Client, artifact_url: str
) -> None:
    same = client.get(artifact_url, headers={"Range": "bytes=10-19", "If-Range": ETAG})
    assert (same.status_code, same.content) == (206, CONTENT[10:20])
    for other in ('"another"', f"W/{ETAG}", "Sat, 01 Jan 2000 00:00:00 GMT"):
        whole = client.get(artifact_url, headers={"Range": "bytes=10-19", "If-Range": other})
        assert (whole.status_code, len(whole.content)) == (200, len(CONTENT))


def test_what_the_client_has_is_not_sent_again(client: httpx.Client, artifact_url: str) -> None:
    for tags in (ETAG, f'"x", W/{ETAG}', "*"):
        answer = client.get(artifact_url, headers={"If-None-Match": tags})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == ETAG
    assert client.get(artifact_url, headers={"If-None-Match": '"x"'}).status_code == 200
    refused = client.get(artifact_url, headers={"If-Match": '"x"'})
    assert_problem(refused, 412, "precondition-failed")
    assert client.get(artifact_url, headers={"If-Match": ETAG}).status_code == 200


def test_an_artifact_of_a_job_that_did_not_succeed_is_not_there(service: Service) -> None:
    claim = service.claim(service.new_job())
    artifact_id = service.publish(claim, "w1/onnx/model.onnx", b"unfinished")
    for path in (f"/v1/artifacts/{artifact_id}", f"/v1/artifacts/{artifact_id}/content"):
        assert_problem(service.client.get(path), 404, "not-found")
    service.finish(claim, JobState.CANCELLED)
    assert_problem(service.client.get(f"/v1/artifacts/{artifact_id}"), 404, "not-found")
    assert service.client.get(f"/v1/jobs/{claim.job_id}/artifacts").json()["items"] == []


def test_records_lead_to_the_bytes(service: Service) -> None:
    claim = service.claim(service.new_job())
    service.publish(claim, "w1/bundle.tar.gz", b"one")
    service.publish(claim, "w1_2/bundle.tar.gz", b"another")
    service.finish(claim, report={"selection": None})
    page = service.client.get(f"/v1/jobs/{claim.job_id}/artifacts").json()
    assert [item["path"] for item in page["items"]] == ["w1/bundle.tar.gz", "w1_2/bundle.tar.gz"]
    assert page["next"] is None
    for item in page["items"]:
        content = service.client.get(item["content_url"]).content
        assert hashlib.sha256(content).hexdigest() == item["sha256"]
        assert len(content) == item["size_bytes"]
        assert service.client.get(f"/v1/artifacts/{item['id']}").json() == item


def test_an_object_that_is_gone_is_a_fault_and_not_an_empty_file(service: Service) -> None:
    claim = service.claim(service.new_job())
    artifact_id = service.publish(claim, "w1/onnx/model.onnx", b"soon gone")
    service.finish(claim, report={"selection": None})
    service.services.store.delete_prefix(f"jobs/{claim.job_id}/")
    answer = service.client.get(f"/v1/artifacts/{artifact_id}/content")
    assert_problem(answer, 500, "internal-error")


def published(service: Service) -> str:
    """The path of an artifact's content."""
    claim = service.claim(service.new_job())
    artifact_id = service.publish(claim, "w1_2/onnx/model a.onnx", CONTENT)
    service.finish(claim, report={"selection": None, "subnetworks": []})
    return f"/v1/artifacts/{artifact_id}/content"


def test_a_bucket_sends_the_bytes_itself_where_it_is_set_so(tmp_path: Path, s3_url: str) -> None:
    with serving(tmp_path / "data", store_url=s3_url, signed_url_seconds=60) as service:
        path = published(service)
        redirect = service.client.get(path)
        assert redirect.status_code == 307
        assert redirect.headers["cache-control"] == "private, no-store"
        assert "X-Amz-Expires=60&" in redirect.headers["location"]
        direct = httpx.get(redirect.headers["location"], trust_env=False)
        assert direct.content == CONTENT
        ranged = service.client.get(path, headers={"Range": "bytes=5-9"}, follow_redirects=True)
        assert (ranged.status_code, ranged.content) == (206, CONTENT[5:10])
        # What needs no bytes is answered here.
        assert service.client.get(path, headers={"If-None-Match": ETAG}).status_code == 304
        assert service.client.head(path).headers["etag"] == ETAG
        stranger = httpx.get(service.url + path, trust_env=False)
        assert_problem(stranger, 401, "missing-api-key")


def test_a_bucket_is_read_through_the_api_by_default(tmp_path: Path, s3_url: str) -> None:
    with serving(tmp_path / "data", store_url=s3_url) as service:
        path = published(service)
        assert service.client.get(path).content == CONTENT
        ranged = service.client.get(path, headers={"Range": "bytes=1048570-"})
        assert ranged.content == CONTENT[1048570:]


def nginx_example() -> str:
    """The server block's inside, as the documentation has it."""
    text = (ROOT / "docs" / "uploads-and-downloads.md").read_text()
    (block,) = re.findall(r"```nginx\n(.*?)```", text, re.DOTALL)
    return block


def test_nginx_sends_the_bytes_as_the_documentation_has_it(tmp_path: Path) -> None:
    objects, port = tmp_path / "data" / "objects", free_port()
    with serving(tmp_path / "data", accel_prefix="/objects/") as service:
        configuration = nginx_example().replace("/var/lib/widthwise/objects", str(objects))
        configuration = configuration.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
        path = published(service)
        headers = {"Authorization": f"Bearer {service.key}"}
        with (
            nginx_server(configuration, port=port) as url,
            httpx.Client(base_url=url, headers=headers, trust_env=False) as client,
        ):
            whole = client.get(path)
            assert (whole.status_code, whole.content) == (200, CONTENT)
            assert whole.headers["server"].startswith("nginx")
            assert "x-accel-redirect" not in whole.headers
            told = client.head(path)
            for name in ("content-length", "etag", "repr-digest", "content-disposition",
                         "content-type", "cache-control", "x-content-type-options"):  # fmt: skip
                assert whole.headers.get_list(name) == told.headers.get_list(name), name
            for name, value in SECURITY_HEADERS.items():
                assert whole.headers.get_list(name) == [value], name
            assert {"ratelimit", "ratelimit-policy"} <= whole.headers.keys()
            for if_range, status in ((ETAG, 206), ('"another"', 200)):
                ranged = client.get(path, headers={"Range": "bytes=5-9", "If-Range": if_range})
                assert ranged.status_code == status
                assert ranged.headers["etag"] == ETAG
            assert client.get(path, headers={"Range": "bytes=5-9"}).content == CONTENT[5:10]
            outside = client.get(path, headers={"Range": f"bytes={len(CONTENT)}-"})
            assert outside.status_code == 416
            assert client.get(path, headers={"If-None-Match": ETAG}).status_code == 304
            # The location is nginx's own: nobody asks it from outside, key or not.
            key = next(iter(objects.rglob("model a.onnx"))).relative_to(objects)
            assert client.get(f"/objects/{key}").status_code == 404
            assert client.get(path, headers={"X-Accel-Redirect": "/objects/x"}).is_success
            assert client.get(f"{path}?x=1").status_code == 422


def test_a_store_that_does_not_answer_holds_up_downloads_alone(
    service: Service, artifact_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them at once than the service has threads."""
    store, size, answers = service.services.store, service.services.store.size, threading.Event()
    monkeypatch.setattr(store, "size", lambda key: size(key) if answers.wait(60) else None)
    with ThreadPoolExecutor(50) as many:
        asked = [many.submit(service.client.head, artifact_url) for _ in range(50)]
        try:
            waiting = service.services.storing
            wait_for(lambda: waiting.borrowed_tokens == waiting.total_tokens)
            assert service.client.get("/v1/me", timeout=10).status_code == 200
        finally:
            answers.set()
        assert {each.result().status_code for each in asked} == {200}


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_every_range_of_a_file_lies_in_it(size: int) -> None:
    for asked in [f"bytes={a}-{b}" for a in ("", 0, 1, 6, 7) for b in ("", 0, 6, 7, 2000)]:
        try:
            span = parse_range(asked, size)
        except ApiError as error:
            assert error.status == 416
            continue
        if span is not None:
            assert 0 <= span[0] < span[1] <= size


def test_entity_tags_are_compared_weakly_or_strongly() -> None:
    assert matches('"a", "b"', '"b"', weak=False)
    assert not matches('W/"b"', '"b"', weak=False)
    assert matches('W/"b"', '"b"', weak=True)
    assert not matches("b", '"b"', weak=True)
    assert matches(" * ", '"b"', weak=False)


def test_a_name_cannot_break_the_header() -> None:
    hostile = content_disposition('a"b\r\nX: y\u00e9.onnx')
    assert hostile.isascii()
    assert "\r" not in hostile
    assert "\n" not in hostile
    assert hostile.startswith("attachment; filename=\"a_b__X_ y_.onnx\"; filename*=UTF-8''")
