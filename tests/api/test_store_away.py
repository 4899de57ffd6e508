"""While the object store is away: 503 with a type of its own, and one line in the log."""

from __future__ import annotations

import base64
import errno
import random
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from api import main
from jobs import artifacts
from jobs.artifacts import Block
from tests.api.conftest import Service, archive, assert_problem, serving
from tests.builders import tiny_bert
from tests.services import s3_server

CONTENT = random.Random(1).randbytes(3 * 2**20)  # several blocks


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that does not answer is asked again for half a second, and not for ten."""
    monkeypatch.setattr(main, "STORE_PATIENCE_SECONDS", 0.5)


def published(service: Service) -> str:
    """The path of an artifact."""
    claim = service.claim(service.new_job())
    artifact_id = service.publish(claim, "w1/onnx/model.onnx", CONTENT)
    service.finish(claim, report={"selection": None, "subnetworks": []})
    return f"/v1/artifacts/{artifact_id}"


def told(log: list[MutableMapping[str, Any]]) -> list[str]:
    """What the log says of requests that failed; other lines come at any time."""
    return [str(line["event"]) for line in log if line["event"].startswith("request.")]


def assert_without_store(service: Service, artifact: str, model: bytes) -> None:
    asked = [
        lambda client: client.get(f"{artifact}/content"),
        lambda client: client.get(f"{artifact}/content", headers={"Range": "bytes=0-9"}),
        lambda client: client.post("/v1/models?filename=m.tar.gz", content=model),
    ]
    for ask in asked:
        with structlog.testing.capture_logs() as log:
            answer = ask(service.client)
        problem = assert_problem(answer, 503, "store-unreachable")
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert int(answer.headers["retry-after"]) > 0
        assert told(log) == ["request.without_store"]
        assert not any("exc_info" in line for line in log)
        for line in log:
            if line["event"] == "request.without_store":
                assert line["error"]
                assert "\n" not in line["error"]
                assert line["error"] not in answer.text
    head = service.client.head(f"{artifact}/content")
    assert (head.status_code, head.content) == (503, b"")
    # What needs no store goes on.
    assert service.client.get(artifact).status_code == 200
    assert service.client.get("/v1/models").status_code == 200
    assert_problem(service.client.get("/readyz"), 503, "not-ready")


def records_of(service: Service) -> list[str]:
    return [item["id"] for item in service.client.get("/v1/models?limit=200").json()["items"]]


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    return archive(tiny_bert(tmp_path / "another", hidden=64))


@pytest.mark.parametrize("left", ["nothing", "a file"])
def test_a_folder_that_is_gone_is_told_and_may_come_back(
    tmp_path: Path, model: bytes, left: str
) -> None:
    with serving(tmp_path / "data") as service:
        artifact = published(service)
        records = records_of(service)
        objects = service.settings.data_dir / "objects"
        objects.rename(tmp_path / "away")
        if left == "a file":
            objects.write_text("")
        assert_without_store(service, artifact, model)
        assert records_of(service) == records
        if left == "a file":
            objects.unlink()
        assert not objects.exists()  # an empty one in its place would hide what is away
        (tmp_path / "away").rename(objects)
        assert service.client.get(f"{artifact}/content").content == CONTENT
        assert service.client.get("/readyz").status_code == 200
        # An object that is not there is still a fault of ours.
        next(objects.rglob("model.onnx")).unlink()
        assert_problem(service.client.get(f"{artifact}/content"), 500, "internal-error")


@pytest.mark.parametrize("signed_url_seconds", [0, 60])
def test_a_bucket_that_does_not_answer_is_told(
    tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch, signed_url_seconds: int
) -> None:
    with ExitStack() as clean:
        with s3_server() as variables:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            service = clean.enter_context(
                serving(
                    tmp_path / "data",
                    store_url="s3://bucket/x",
                    signed_url_seconds=signed_url_seconds,
                )
            )
            artifact = published(service)
            assert service.client.head(f"{artifact}/content").status_code == 200
        assert_without_store(service, artifact, model)


@contextmanager
def bucket_answering(status: int, code: str) -> Iterator[str]:
    """The address of one that says the same to everything."""

    class Refusing(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "upload"),
    [
        (403, "AccessDenied", (507, "store-refused")),  # it answers, and takes nothing
        (404, "NoSuchBucket", (507, "store-refused")),
        (500, "InternalError", (503, "store-unreachable")),
        (503, "SlowDown", (503, "store-unreachable")),
    ],
)
def test_a_bucket_that_refuses_to_be_read_is_away(
    tmp_path: Path,
    s3_url: str,
    model: bytes,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    upload: tuple[int, str],
) -> None:
    with serving(tmp_path / "data", store_url=s3_url) as service:
        artifact = published(service)
        with bucket_answering(status, code) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            refusing = artifacts.open_store(s3_url, patience_seconds=0.5)
            monkeypatch.setattr(service.services.store, "_store", refusing._store)
            with structlog.testing.capture_logs() as log:
                answer = service.client.get(f"{artifact}/content")
            assert_problem(answer, 503, "store-unreachable")
            assert told(log) == ["request.without_store"]
            sent = service.client.post("/v1/models?filename=m.tar.gz", content=model)
            assert_problem(sent, *upload)


def test_a_download_under_way_is_cut_off_with_one_line(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, read = f"{published(service)}/content", artifacts._read_cached

    def fail_later(descriptor: int, wanted: int, start: int) -> Block | None:
        if start > 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, wanted, start)

    monkeypatch.setattr(artifacts, "_read_cached", fail_later)
    with (
        structlog.testing.capture_logs() as log,
        caplog.at_level("ERROR"),
        pytest.raises(httpx.RemoteProtocolError),
    ):
        service.client.get(path)
    assert told(log) == ["request.without_store"]
    assert not any(record.exc_info for record in caplog.records)


def test_a_resumable_upload_waits_for_the_store(tmp_path: Path, model: bytes) -> None:
    described = ",".join(
        f"{key} {base64.b64encode(value.encode()).decode()}"
        for key, value in {"kind": "model", "filename": "m.tar.gz"}.items()
    )
    tus = {"Tus-Resumable": "1.0.0"}
    appending = {**tus, "Content-Type": "application/offset+octet-stream"}
    with serving(tmp_path / "data") as service:
        begin = {**tus, "Upload-Metadata": described, "Upload-Length": str(len(model))}
        path = service.client.post("/v1/uploads", headers=begin).headers["location"]
        objects = service.settings.data_dir / "objects"
        objects.rename(tmp_path / "away")
        sent = service.client.patch(
            path, content=model, headers={**appending, "Upload-Offset": "0"}
        )
        assert_problem(sent, 503, "store-unreachable")
        (tmp_path / "away").rename(objects)
        at = service.client.head(path, headers=tus).headers["upload-offset"]
        assert at == str(len(model))
        again = service.client.patch(path, headers={**appending, "Upload-Offset": at})
        assert again.status_code == 204, again.text
        assert service.client.get(again.headers["location"]).status_code == 200
