"""Disks that are full, and really so: a small tmpfs in a mount namespace of the API's own."""

from __future__ import annotations

import base64
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from jobs.db import is_full
from jobs.records import Blob
from tests.api.conftest import Service, api_process, archive, assert_problem, serving
from tests.builders import device_profile, tiny_bert
from tests.services import postgresql_server

SMALL, LARGE = 32, 256  # hidden sizes: of a model that finds room, and of one that does not
ROOM = 1 << 20


@contextmanager
def serving_with_little_room(
    tmp_path: Path, folder: str, *, room: int = ROOM
) -> Iterator[tuple[httpx.Client, Callable[[], list[str]]]]:
    """The API as a process for which this folder of its data has 1 MiB (where mounting takes
    root, it becomes that in a user namespace): a client, and what lists the files in the folder."""
    small = tmp_path / "data" / folder
    small.mkdir(parents=True)
    namespaces = ["unshare", "--mount"] + ([] if os.getuid() == 0 else ["--map-root-user"])
    mount = f'mount -t tmpfs -o size={room} tmpfs "$0" && exec "$@"'
    inside = [*namespaces, "sh", "-c", mount, str(small)]
    with api_process(tmp_path / "data", tmp_path / "log", inside=inside) as (process, client):
        # The tmpfs is seen from inside its namespace alone.
        seen = f"/proc/{process.pid}/root{small}"
        yield client, lambda: files_below(seen)


def files_below(folder: str) -> list[str]:
    return sorted(
        os.path.join(path, name)
        for path, _, names in os.walk(folder)
        for name in names
        if name != ".lock"
    )


def described(name: str) -> str:
    """Upload-Metadata of a model's archive."""
    words = {"kind": "model", "filename": name}
    return ",".join(
        f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in words.items()
    )


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("objects", "The object store has no room left."),
        ("spool", "The disk that uploads are received on is full."),
    ],
)
def test_a_full_disk_refuses_in_a_sentence_and_keeps_no_half(
    tmp_path: Path, folder: str, sentence: str
) -> None:
    small = archive(tiny_bert(tmp_path / "small", hidden=SMALL))
    large = archive(tiny_bert(tmp_path / "large", hidden=LARGE, ffn=4 * LARGE))
    with serving_with_little_room(tmp_path, folder) as (client, files):
        before = files()
        problem = assert_problem(
            client.post("/v1/models?filename=large.tar.gz", content=large), 507, "store-full"
        )
        assert problem["detail"] == sentence
        assert files() == before
        assert client.get("/v1/models").json()["items"] == []
        # What finds room is taken, now as before.
        assert client.post("/v1/models?filename=s.tar.gz", content=small).status_code == 201
        assert client.get("/readyz").status_code == 200


def test_a_bucket_that_refuses_is_told_and_nothing_is_kept(tmp_path: Path, s3_url: str) -> None:
    content = archive(tiny_bert(tmp_path / "model"))
    absent = s3_url.replace("//bucket/", "//absent/")
    with serving(tmp_path / "data", store_url=absent) as service:
        answer = service.client.post("/v1/models?filename=m.tar.gz", content=content)
        problem = assert_problem(answer, 507, "store-refused")
        expected = "The object store did not take a file: its bucket or folder is not there."
        assert problem["detail"] == expected
        assert service.client.get("/v1/models").json()["items"] == []
        with service.services.database.reading() as session:
            assert session.query(Blob).all() == []


def test_a_disk_too_small_to_unpack_on_is_not_the_uploads_fault(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "large", hidden=LARGE, ffn=4 * LARGE)
    weights = model / "model.safetensors"
    content = weights.read_bytes()  # random bytes do not compress; zeros do
    header = int.from_bytes(content[:8], "little") + 8
    weights.write_bytes(content[:header] + bytes(len(content) - header))
    packed = archive(model)
    assert len(packed) < ROOM // 4 < ROOM < len(content)
    with serving_with_little_room(tmp_path, "spool") as (client, files):
        answer = client.post("/v1/models?filename=large.tar.gz", content=packed)
        problem = assert_problem(answer, 507, "store-full")
        assert "inspected" in problem["detail"]
        assert files() == []


def test_a_resumable_upload_waits_for_room(tmp_path: Path) -> None:
    """What came before the disk was full is kept, and the client is told where to go on."""
    tus = {"Tus-Resumable": "1.0.0", "Upload-Metadata": described("m.tar.gz")}
    with serving_with_little_room(tmp_path, "uploads") as (client, files):
        much = {**tus, "Upload-Length": str(2 * ROOM)}
        assert_problem(client.post("/v1/uploads", headers=much), 507, "store-full")
        size = ROOM * 3 // 4
        paths = []
        for _ in range(2):  # room for each of them, and not for both
            begun = client.post("/v1/uploads", headers={**tus, "Upload-Length": str(size)})
            assert begun.status_code == 201, begun.text
            paths.append(begun.headers["location"])
        headers = {**tus, "Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}
        first = client.patch(paths[0], content=bytes(size - 1), headers=headers)
        assert first.status_code == 204
        second = client.patch(paths[1], content=bytes(size), headers=headers)
        assert_problem(second, 507, "store-full")
        offset = int(client.head(paths[1], headers=tus).headers["upload-offset"])
        assert 0 < offset <= ROOM // 4
        assert client.delete(paths[0], headers=tus).status_code == 204
        rest = bytes(size - offset - 1)
        third = client.patch(
            paths[1], content=rest, headers={**headers, "Upload-Offset": str(offset)}
        )
        assert third.headers["upload-offset"] == str(size - 1)
        assert client.delete(paths[1], headers=tus).status_code == 204
        assert files() == []


def filled(folder: str) -> Path:
    """A file that takes what room there is."""
    filler = Path(folder) / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    return filler


def test_a_database_without_room_is_told_and_goes_on_when_there_is_some(tmp_path: Path) -> None:
    with serving_with_little_room(tmp_path, "", room=8 * ROOM) as (client, files):
        (database,) = [name for name in files() if name.endswith("/widthwise.db")]
        filler = filled(os.path.dirname(database))
        made = 0
        # SQLite's log of writes has some room in it that it uses again.
        while (answer := client.post("/v1/profiles", json=device_profile())).status_code == 201:
            made += 1
            assert made < 1000
        problem = assert_problem(answer, 507, "store-full")
        assert problem["detail"] == (
            "A disk that the service writes on, or its database, has no room left."
        )
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert "retry-after" not in answer.headers
        assert client.get("/v1/models").status_code == 200
        upload = client.post("/v1/models?filename=m.tar.gz", content=b"x" * 5000)
        assert_problem(upload, 507, "store-full")
        filler.unlink()
        assert client.post("/v1/profiles", json=device_profile()).status_code == 201
    assert "request.without_room" in (tmp_path / "log").read_text()


def refuse_when(refused: Callable[..., bool], real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, for which the disk is full whenever `refused`."""

    def call(*arguments: Any, **named: Any) -> Any:
        if refused(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)

    return call


@pytest.mark.parametrize("where", ["upload", "received", "clean", "link", "gathering", "pipes"])
def test_a_disk_that_is_full_between_the_steps_of_an_upload_is_told_too(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    content = archive(tiny_bert(tmp_path / "model"))
    spool = service.services.spool.folder
    tus = {"Tus-Resumable": "1.0.0"}
    before = service.kept()
    begun = service.client.post(
        "/v1/uploads",
        headers={
            **tus,
            "Upload-Metadata": described("m.tar.gz"),
            "Upload-Length": str(len(content)),
        },
    )
    path, octets = begun.headers["location"], {"Content-Type": "application/offset+octet-stream"}
    with monkeypatch.context() as patch:
        if where == "upload":
            mkdir = refuse_when(lambda path: path.parent == spool, Path.mkdir)
            patch.setattr(Path, "mkdir", mkdir)
        elif where in ("received", "clean"):
            patch.setattr(Path, "mkdir", refuse_when(lambda path: path.name == where, Path.mkdir))
        elif where == "link":
            patch.setattr(os, "link", refuse_when(lambda *_: True, os.link))
        elif where == "gathering":
            gathers = refuse_when(lambda path, *_: "/uploads/" in str(path), os.open)
            patch.setattr(os, "open", gathers)
        else:
            pipes = refuse_when(lambda *_: True, tempfile.TemporaryFile)
            patch.setattr(tempfile, "TemporaryFile", pipes)
        if where not in ("link", "gathering"):
            plain = service.client.post("/v1/models?filename=m.tar.gz", content=content)
            assert_problem(plain, 507, "store-full")
        answer = service.client.patch(
            path, content=content, headers={**tus, **octets, "Upload-Offset": "0"}
        )
        assert_problem(answer, 507, "store-full")
    assert service.kept() == before
    offset = service.client.head(path, headers=tus).headers["upload-offset"]
    rest = {**tus, **octets, "Upload-Offset": offset}
    done = service.client.patch(path, content=content[int(offset) :], headers=rest)
    assert done.status_code == 204, done.text
    assert done.headers["location"].startswith("/v1/models/")
    service.client.delete(done.headers["location"])


def test_postgresql_without_room_is_known_by_its_own_code() -> None:
    with (
        postgresql_server() as url,
        create_engine(f"{url}/postgres", poolclass=NullPool).connect() as connection,
    ):
        for state, full in (("53100", True), ("53300", False)):
            words = f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$"
            with pytest.raises(DBAPIError) as told:
                connection.exec_driver_sql(words)
            assert is_full(told.value) == full
            connection.rollback()


def test_every_write_is_documented_to_find_no_room(service: Service) -> None:
    for path, operations in service.client.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            writes = method in ("post", "put", "patch", "delete")
            assert ("507" in operation["responses"]) == writes, (method, path)
