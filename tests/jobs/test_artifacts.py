from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import artifacts
from jobs.artifacts import ObjectStore, open_store, run_prefix
from jobs.errors import ObjectExists, ObjectMissing, StoreFull, StoreRefused, StoreUnreachable
from tests.services import free_port

CONTENT = bytes(range(256)) * 9000  # more than two chunks


@pytest.fixture(params=["folder", "bucket"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "bucket":
        return open_store(request.getfixturevalue("s3_url"))
    return open_store((tmp_path / "objects").as_uri())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


async def read(objects: ObjectStore, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in objects.read(key, start, end)])


def test_what_is_put_is_what_is_got(objects: ObjectStore, file: Path, tmp_path: Path) -> None:
    objects.put_file("models/m/a b.bin", file)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    objects.get_to_file("models/m/a b.bin", tmp_path / "copy", sha256=sha256)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert objects.size("models/m/a b.bin") == len(CONTENT)
    assert objects.size("models/m/other") is None


@pytest.mark.parametrize("single_put_bytes", [1 << 30, 1 << 20], ids=["whole", "in parts"])
def test_nothing_is_overwritten(
    objects: ObjectStore,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    single_put_bytes: int,
) -> None:
    monkeypatch.setattr(artifacts, "_SINGLE_PUT_BYTES", single_put_bytes)
    objects.put_file("k/a", file)
    other = tmp_path / "other"
    other.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(ObjectExists):
        objects.put_file("k/a", other)
    assert asyncio.run(read(objects, "k/a")) == CONTENT


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, None), (5, None), (5, 9), (0, 1), (1048570, 1048590), (0, len(CONTENT) + 5), (7, 7)],
)
def test_ranges_are_slices(objects: ObjectStore, file: Path, start: int, end: int | None) -> None:
    objects.put_file("k/a", file)
    assert asyncio.run(read(objects, "k/a", start, end)) == CONTENT[start:end]


def test_missing_and_altered_objects_are_told(
    objects: ObjectStore, file: Path, tmp_path: Path
) -> None:
    objects.put_file("k/a", file)
    with pytest.raises(ObjectMissing):
        objects.get_to_file("k/b", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ObjectMissing):
        asyncio.run(read(objects, "k/b"))
    with pytest.raises(ObjectMissing, match="hash"):
        objects.get_to_file("k/a", tmp_path / "a", sha256="0" * 64)


def test_deleting_a_run_leaves_the_others(objects: ObjectStore, file: Path) -> None:
    for fence in (1, 10, 11):
        objects.put_file(run_prefix("job_a", fence) + "w1/m", file)
    objects.put_file(run_prefix("job_ab", 1) + "m", file)
    assert objects.delete_prefix(run_prefix("job_a", 1)) == 1
    assert objects.delete_prefix(run_prefix("job_a", 1)) == 0
    assert sorted(objects.keys("jobs/")) == [
        "jobs/job_a/10/w1/m",
        "jobs/job_a/11/w1/m",
        "jobs/job_ab/1/m",
    ]
    for careless in ("", "/", "jobs"):
        with pytest.raises(ValueError, match="prefix"):
            objects.delete_prefix(careless)


def test_a_key_cannot_leave_the_folder(objects: ObjectStore, file: Path, tmp_path: Path) -> None:
    for key in ("../outside", "a/../../outside"):
        with pytest.raises(Exception):  # noqa: B017 - obstore's own type, whichever
            objects.put_file(key, file)
    assert not (tmp_path / "outside").exists()


def test_a_file_on_another_file_system_is_copied(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    objects = open_store((tmp_path / "objects").as_uri())
    monkeypatch.setattr(os, "link", refuse)
    objects.put_file("k/a", file)
    with pytest.raises(ObjectExists):
        objects.put_file("k/a", file)
    assert asyncio.run(read(objects, "k/a")) == CONTENT


KILLED_IN_MID_PUT = """
import os, signal, sys
from obstore.store import LocalStore

def pieces():
    yield bytes(20 << 20)
    os.kill(os.getpid(), signal.SIGKILL)

LocalStore(sys.argv[1]).put(sys.argv[2], pieces())
"""


def test_what_a_killed_process_has_left_of_an_object_can_be_deleted(
    tmp_path: Path, file: Path
) -> None:
    folder = tmp_path / "objects"
    objects = open_store(folder.as_uri())
    for key in ("jobs/j/1/w1/m", "jobs/j/10/m"):
        command = [sys.executable, "-c", KILLED_IN_MID_PUT, str(folder), key]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    objects.put_file("jobs/j/1/whole", file)
    assert objects.keys("jobs/") == ["jobs/j/1/whole"]  # a store does not tell of the others
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3
    assert objects.delete_drafts("jobs/j/1/") == 1
    assert objects.delete_drafts("jobs/j/1/") == objects.delete_drafts("jobs/j/absent/") == 0
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(path.parent.name for path in left) == ["1", "10"]
    assert objects.keys("jobs/") == ["jobs/j/1/whole"]


def test_what_is_not_in_memory_is_read_too(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: object) -> int:
        raise BlockingIOError

    objects = open_store((tmp_path / "objects").as_uri())
    objects.put_file("k/a", file)
    monkeypatch.setattr(os, "preadv", wait)
    assert asyncio.run(read(objects, "k/a", 5)) == CONTENT[5:]


def test_a_bucket_that_is_not_there_refuses(s3_url: str, file: Path) -> None:
    with pytest.raises(StoreRefused, match="is not there"):
        open_store(s3_url.replace("//bucket/", "//absent/")).put_file("k/a", file)


class Refusing(BaseHTTPRequestHandler):
    """A bucket that takes nothing: `status` and `code` are the server's attributes."""

    server: HTTPServer

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, code = self.server.answer  # type: ignore[attr-defined]
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.parametrize(
    ("status", "code", "error", "told"),
    [
        (403, "AccessDenied", StoreRefused, "access was denied"),
        (403, "QuotaExceeded", StoreFull, "no room left"),
        (507, "XMinioStorageFull", StoreFull, "no room left"),
        (500, "InternalError", StoreUnreachable, "does not answer as it should"),
    ],
)
def test_a_bucket_that_takes_nothing_is_told_from_a_full_one(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    error: type[Exception],
    told: str,
) -> None:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.answer = (status, code)  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "tests"),
            ("AWS_SECRET_ACCESS_KEY", "tests"),
        ):
            monkeypatch.setenv(name, value)
        try:
            with pytest.raises(error, match=told):
                open_store("s3://bucket/x", patience_seconds=0.5).put_file("k/a", file)
        finally:
            server.shutdown()


class RefusingLater(Refusing):
    """A bucket that takes the first part of an object and no other; it writes down what is begun
    and given up."""

    def do_HEAD(self) -> None:
        self._say(404, "")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.told.append("completed" if "uploadId=" in self.path else "begun")  # type: ignore[attr-defined]
        self._say(
            200,
            "<InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>x/k/a</Key>"
            "<UploadId>u1</UploadId></InitiateMultipartUploadResult>",
        )

    def do_PUT(self) -> None:
        if "partNumber=1&" in f"{self.path}&":
            self.rfile.read(int(self.headers["content-length"]))
            self._say(200, "", ETag='"1"')
        else:
            super().do_PUT()

    def do_DELETE(self) -> None:
        self.server.told.append(f"deleted {self.path.partition('?')[2]}")  # type: ignore[attr-defined]
        self._say(204, "")

    def _say(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


def test_an_object_that_is_refused_in_its_middle_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "_SINGLE_PUT_BYTES", 1 << 20)
    large = tmp_path / "large"
    large.write_bytes(bytes(20 << 20))  # parts have five MiB at least
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingLater) as server:
        server.answer = (403, "AccessDenied")  # type: ignore[attr-defined]
        server.told = told = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "tests"),
            ("AWS_SECRET_ACCESS_KEY", "tests"),
        ):
            monkeypatch.setenv(name, value)
        try:
            with pytest.raises(StoreRefused, match="access was denied"):
                open_store("s3://bucket/x", patience_seconds=0.5).put_file("k/a", large)
        finally:
            server.shutdown()
    assert told == ["begun", "deleted uploadId=u1"]


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_store_that_is_away_is_told_from_an_empty_one(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "folder":
        objects = open_store((tmp_path / "objects").as_uri())
        (tmp_path / "objects").rmdir()
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        for name in ("AWS_ALLOW_HTTP", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "true")
        objects = open_store("s3://bucket/x", patience_seconds=0.2)
    for ask in (
        lambda: objects.put_file("k/a", file),
        lambda: objects.get_to_file("k/a", tmp_path / "copy"),
        lambda: asyncio.run(read(objects, "k/a")),
        lambda: objects.size("k/a"),
        lambda: objects.keys("k/"),
        lambda: objects.delete(["k/a"]),
        objects.check,
    ):
        with pytest.raises(StoreUnreachable) as told:
            ask()
        assert told.value.reason
        assert "\n" not in told.value.reason
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "objects").exists()


def test_a_folder_whose_server_does_not_answer_is_away(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a network's file system that went: it is there, and cannot be looked at."""
    folder, stat = tmp_path / "objects", os.stat
    objects = open_store(folder.as_uri())

    def look(path: Any, **options: Any) -> os.stat_result:
        if path == folder:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", look)
    for ask in (
        lambda: objects.put_file("k/a", file),
        lambda: objects.get_to_file("k/a", tmp_path / "copy"),
        lambda: objects.size("k/a"),
        lambda: objects.keys("k/"),
        objects.check,
    ):
        with pytest.raises(StoreUnreachable, match="cannot be reached"):
            ask()


def test_a_bucket_that_is_not_there_is_told_from_a_missing_object(s3_url: str) -> None:
    open_store(s3_url).check()
    absent = open_store(s3_url.replace("//bucket/", "//absent/"))
    assert absent.size("k/a") is None  # all that HEAD says
    with pytest.raises(StoreUnreachable, match="cannot be reached") as told:
        absent.check()
    assert "NoSuchBucket" in told.value.reason


def test_a_signed_address_needs_no_key_and_ends(s3_url: str, file: Path) -> None:
    objects = open_store(s3_url)
    objects.put_file("k/a b.bin", file)
    url = objects.signed_url("k/a b.bin", seconds=60)
    assert url is not None
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == CONTENT
    assert "X-Amz-Expires=60" in url


def test_a_folder_signs_nothing(tmp_path: Path) -> None:
    assert open_store((tmp_path / "objects").as_uri()).signed_url("k/a", seconds=60) is None


def test_unknown_stores_are_refused() -> None:
    with pytest.raises(ValueError, match="ftp"):
        open_store("ftp://host/folder")
