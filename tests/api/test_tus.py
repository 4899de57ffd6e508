"""Resumable uploads: tus 1.0 against its real client, sockets cut off anywhere, and restarts."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError, TusUploadFailed

from jobs import resumable
from jobs.db import now
from jobs.errors import StoreFull
from jobs.records import Upload
from jobs.roles import Role
from tests.api.conftest import (
    Service,
    api_process,
    archive,
    assert_problem,
    serving,
    wait_for,
)
from tests.builders import tiny_bert, tiny_dataset

TUS = {"Tus-Resumable": "1.0.0"}
BODY = {**TUS, "Content-Type": "application/offset+octet-stream"}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model, as an archive."""
    return archive(tiny_bert(tmp_path_factory.mktemp("tus") / "model"))


def metadata(**values: str) -> str:
    values = {"kind": "model", "filename": "tiny.tar.gz", **values}
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return ",".join(f"{key} {value}" for key, value in encoded.items())


def begin(client: httpx.Client, size: int, **values: str) -> str:
    headers = {**TUS, "Upload-Length": str(size), "Upload-Metadata": metadata(**values)}
    answer = client.post("/v1/uploads", headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["tus-resumable"] == "1.0.0"
    return str(answer.headers["location"])


def send(client: httpx.Client, path: str, offset: int, data: bytes, **more: str) -> httpx.Response:
    headers = {**BODY, "Upload-Offset": str(offset), **more}
    return client.patch(path, content=data, headers=headers)


def offset_of(client: httpx.Client, path: str) -> int:
    answer = client.head(path, headers=TUS)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    return int(answer.headers["upload-offset"])


def checksum(data: bytes, algorithm: str = "sha1") -> dict[str, str]:
    digest = base64.b64encode(hashlib.new(algorithm, data).digest()).decode()
    return {"Upload-Checksum": f"{algorithm} {digest}"}


def assert_became(client: httpx.Client, record: str, content: bytes) -> dict[str, Any]:
    """The record has the digest of what was to be uploaded."""
    body = dict(client.get(record).json())
    assert body["sha256"] == hashlib.sha256(content).hexdigest()
    assert body["size_bytes"] == len(content)
    return body


def gathering(service: Service) -> list[str]:
    folder = service.settings.data_dir / resumable.FOLDER
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- the protocol ---------------------------------------------------------------------------


def test_an_upload_in_pieces_becomes_a_model(client: httpx.Client, content: bytes) -> None:
    path = begin(client, len(content), name="mine")
    half = len(content) // 2
    first = send(client, path, 0, content[:half])
    assert first.status_code == 204
    assert first.headers["upload-offset"] == str(half)
    assert parsedate_to_datetime(first.headers["upload-expires"]) is not None
    told = client.get(path).json()
    assert (told["state"], told["offset"], told["record"]) == ("receiving", half, None)

    last = send(client, path, half, content[half:])
    assert last.status_code == 204, last.text
    assert last.headers["upload-offset"] == str(len(content))
    record = last.headers["location"]
    assert record.startswith("/v1/models/mdl_")
    body = assert_became(client, record, content)
    assert (body["name"], body["files"][0]["name"]) == ("mine", "tiny.tar.gz")
    told = client.get(path).json()
    assert (told["state"], told["record"], told["problem"]) == ("finished", record, None)
    # A client that lost that answer asks, or sends nothing at the end, and is told again.
    head = client.head(path, headers=TUS)
    assert head.headers["upload-offset"] == head.headers["upload-length"] == str(len(content))
    assert head.headers["location"] == record
    assert head.headers["upload-metadata"] == metadata(name="mine")
    assert send(client, path, len(content), b"").headers["location"] == record


def test_a_dataset_may_come_with_its_creation(client: httpx.Client, tmp_path: Path) -> None:
    train = (tiny_dataset(tmp_path / "dataset") / "train.tsv").read_bytes()
    headers = {
        **BODY,
        "Upload-Length": str(len(train)),
        "Upload-Metadata": metadata(kind="dataset", filename="train.tsv"),
    }
    answer = client.post("/v1/uploads", content=train, headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["upload-offset"] == str(len(train))
    told = client.get(answer.headers["location"]).json()
    assert told["record"].startswith("/v1/datasets/dst_")
    assert_became(client, told["record"], train)


def test_what_is_understood_is_told(service: Service) -> None:
    answer = service.client.options("/v1/uploads")
    assert answer.status_code == 204
    assert answer.headers["tus-version"] == "1.0.0"
    extensions = set(answer.headers["tus-extension"].split(","))
    assert {"creation", "termination", "checksum", "expiration"} <= extensions
    assert answer.headers["tus-max-size"] == str(service.settings.max_upload_bytes)
    assert "sha1" in answer.headers["tus-checksum-algorithm"].split(",")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Tus-Resumable": "0.2.2"}, 412, "tus-version"),
        ({"Tus-Resumable": None}, 412, "tus-version"),
        ({"Upload-Length": None}, 422, "invalid-request"),
        ({"Upload-Length": "-1"}, 422, "invalid-request"),
        ({"Upload-Length": "0"}, 400, "invalid-upload"),
        ({"Upload-Length": 30 * "9"}, 413, "upload-too-large"),
        ({"Upload-Metadata": None}, 400, "upload-metadata"),
        ({"Upload-Metadata": "kind bW9kZWw="}, 400, "invalid-filename"),  # model
        ({"Upload-Metadata": metadata(kind="job")}, 400, "upload-metadata"),
        ({"Upload-Metadata": metadata(filename="../x.zip")}, 400, "invalid-filename"),
        ({"Upload-Metadata": metadata(filename="a\x00b.zip")}, 400, "invalid-filename"),
        ({"Upload-Metadata": metadata(name=201 * "n")}, 400, "upload-metadata"),
        ({"Upload-Metadata": metadata(name="a\nb")}, 400, "upload-metadata"),
        ({"Upload-Metadata": metadata() + ",kind bW9kZWw="}, 400, "upload-metadata"),
        ({"Upload-Metadata": metadata() + ",x not+base64!"}, 400, "upload-metadata"),
        ({"Upload-Metadata": metadata(x=5000 * "x")}, 400, "upload-metadata"),
    ],
)
def test_an_upload_that_could_not_end_well_is_not_begun(
    service: Service, headers: dict[str, str | None], status: int, code: str
) -> None:
    asked = {**TUS, "Upload-Length": "10", "Upload-Metadata": metadata(), **headers}
    answer = service.client.post(
        "/v1/uploads", headers={key: value for key, value in asked.items() if value is not None}
    )
    assert_problem(answer, status, code)
    assert answer.headers["tus-resumable"] == "1.0.0"
    if status == 412:
        assert answer.headers["tus-version"] == "1.0.0"


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({"Tus-Resumable": "2.0.0"}, b"abc", 412, "tus-version"),
        ({"Content-Type": "application/octet-stream"}, b"abc", 415, "unsupported-media-type"),
        ({"Upload-Offset": "3"}, b"abc", 409, "upload-offset"),
        ({"Upload-Offset": "x"}, b"abc", 422, "invalid-request"),
        ({"Upload-Offset": "9" * 30}, b"", 409, "upload-offset"),
        ({}, 11 * b"x", 413, "upload-too-large"),
        ({"Upload-Checksum": "crc32 AAAA"}, b"abc", 400, "upload-checksum"),
        ({"Upload-Checksum": "sha1 AAAA"}, b"abc", 400, "upload-checksum"),
        ({"Upload-Checksum": "sha1"}, b"abc", 400, "upload-checksum"),
    ],
)
def test_bytes_that_do_not_belong_there_are_refused(
    client: httpx.Client, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    path = begin(client, 10)
    assert_problem(send(client, path, 0, body, **headers), status, code)
    assert offset_of(client, path) == 0


def test_more_than_was_announced_is_cut_off_where_its_length_is_not_told(
    client: httpx.Client,
) -> None:
    path = begin(client, 10)
    headers = {**BODY, "Upload-Offset": "0"}
    answer = client.patch(path, content=iter([b"12345", b"678901"]), headers=headers)
    assert_problem(answer, 413, "upload-too-large")
    assert offset_of(client, path) <= 5


def test_a_checksum_that_does_not_hold_leaves_nothing(client: httpx.Client, content: bytes) -> None:
    path = begin(client, len(content))
    for algorithm in ("sha1", "sha256", "sha512", "md5"):
        wrong = checksum(b"another", algorithm)
        assert_problem(send(client, path, 0, content, **wrong), 460, "checksum-mismatch")
        assert offset_of(client, path) == 0
    half = len(content) // 2
    assert send(client, path, 0, content[:half], **checksum(content[:half])).status_code == 204
    assert_problem(send(client, path, half, b"x", **checksum(b"y")), 460, "checksum-mismatch")
    assert offset_of(client, path) == half
    rest = content[half:]
    last = send(client, path, half, rest, **checksum(rest, "sha512"))
    assert_became(client, last.headers["location"], content)


def test_a_given_up_upload_is_gone(service: Service, content: bytes) -> None:
    path = begin(service.client, len(content))
    send(service.client, path, 0, content[:1000])
    assert gathering(service) != []
    before = gathering(service)
    assert service.client.delete(path, headers=TUS).status_code == 204
    assert len(gathering(service)) == len(before) - 1
    for answer in (
        service.client.head(path, headers=TUS),
        send(service.client, path, 1000, content[1000:]),
        service.client.delete(path, headers=TUS),
    ):
        assert answer.status_code == 404
    told = service.client.get("/v1/audit", params={"target": path.rpartition("/")[2]}).json()
    assert [entry["action"] for entry in told["items"]] == ["upload.deleted", "upload.created"]


def test_a_client_that_cannot_send_patch_says_what_it_means(
    service: Service, content: bytes
) -> None:
    path = begin(service.client, len(content))
    override = {"X-HTTP-Method-Override": "PATCH", **BODY, "Upload-Offset": "0"}
    answer = service.client.post(path, content=content[:10], headers=override)
    assert (answer.status_code, answer.headers["upload-offset"]) == (204, "10")
    viewer = service.as_key(service.new_key(Role.VIEWER).secret)
    for method in ("PATCH", "DELETE", "GET"):
        refused = viewer.post(path, headers={**override, "X-HTTP-Method-Override": method})
        assert_problem(refused, 403, "role-insufficient")
    dropped = service.client.post(path, headers={**TUS, "X-HTTP-Method-Override": "DELETE"})
    assert dropped.status_code == 204
    # Nowhere else does a header change what a request means.
    cancel = service.client.post("/v1/me", headers={"X-HTTP-Method-Override": "DELETE"})
    assert_problem(cancel, 405, "method-not-allowed")


def test_another_projects_upload_is_not_there(service: Service, content: bytes) -> None:
    path = begin(service.client, len(content))
    other = service.new_key(Role.ADMIN, project_id=service.new_project())
    stranger = service.as_key(other.secret)
    assert_problem(stranger.get(path), 404, "not-found")
    assert_problem(send(stranger, path, 0, content), 404, "not-found")
    assert_problem(stranger.delete(path), 404, "not-found")
    assert offset_of(service.client, path) == 0


# --- what becomes of it ---------------------------------------------------------------------


def test_what_inspection_refuses_is_told_and_not_kept(service: Service, content: bytes) -> None:
    before = service.kept()
    cut = content[: len(content) // 2]
    path = begin(service.client, len(cut))
    problem = assert_problem(send(service.client, path, 0, cut), 422, "damaged-archive")
    told = service.client.get(path).json()
    assert told["state"] == "refused"
    assert told["problem"]["detail"] == problem["detail"]
    assert_problem(send(service.client, path, len(cut), b""), 409, "upload-ended")
    assert service.kept() == before
    assert path.rpartition("/")[2] not in gathering(service)


def test_a_store_without_room_is_tried_again(
    service: Service, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(key: str, path: Path) -> None:
        raise StoreFull("The object store has no room left.")

    fresh = content + b"\0" * 512  # other bytes than those that are stored already
    path = begin(service.client, len(fresh))
    before = service.kept()
    with monkeypatch.context() as patch:
        patch.setattr(service.services.store, "put_file", full)
        patch.setattr("jobs.blobs._stored", lambda *_: None)
        assert_problem(send(service.client, path, 0, fresh), 507, "store-full")
    assert service.kept() == before
    assert service.client.get(path).json()["state"] == "arrived"
    done = send(service.client, path, len(fresh), b"")
    assert_became(service.client, done.headers["location"], fresh)


def test_what_the_store_did_not_take_is_tried_until_it_does(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks how far it is finds all bytes there, and sends nothing more: tuspy and
    tus-js-client take that for the end."""
    monkeypatch.setattr("api.tus.RETRY_SECONDS", 0.01)
    attempts: list[str] = []
    with serving(tmp_path / "data", reconcile_seconds=0.05) as service:
        put = service.services.store.put_file

        def put_later(key: str, path: Path) -> None:
            attempts.append(key)
            if len(attempts) <= 3:
                raise StoreFull("The object store has no room left.")
            put(key, path)

        monkeypatch.setattr(service.services.store, "put_file", put_later)
        path = begin(service.client, len(content))
        assert_problem(send(service.client, path, 0, content), 507, "store-full")
        assert offset_of(service.client, path) == len(content)
        wait_for(lambda: service.client.get(path).json()["state"] == "finished")
        assert_became(service.client, service.client.get(path).json()["record"], content)


def test_what_is_refused_without_a_request_is_counted_too(tmp_path: Path, content: bytes) -> None:
    cut = content[: len(content) // 2]
    with serving(tmp_path / "data", reconcile_seconds=0.05) as service:
        path = begin(service.client, len(cut))
        file = service.services.gathering.file(path.rpartition("/")[2])
        file.write_bytes(cut)  # as a process leaves it that is killed before the inspection
        wait_for(lambda: service.client.get(path).json()["state"] == "refused")
        refused = ("widthwise_uploads_refused_total", {"code": "damaged-archive"})
        registry = service.services.metrics.registry
        wait_for(lambda: registry.get_sample_value(*refused) == 1)


def test_expired_uploads_are_gone_and_swept(service: Service, content: bytes) -> None:
    path = begin(service.client, len(content))
    send(service.client, path, 0, content[:10])
    id = path.rpartition("/")[2]
    living = begin(service.client, len(content))
    send(service.client, living, 0, content[:10])
    with service.services.database.transaction() as session:
        session.execute(update(Upload).where(Upload.id == id).values(expires_at=now(session)))
    assert_problem(service.client.get(path), 410, "gone")
    assert_problem(send(service.client, path, 10, content[10:]), 410, "gone")
    removed = resumable.remove_expired(service.services.database, service.settings.data_dir)
    assert removed == [id]
    assert id not in gathering(service)
    assert_problem(service.client.get(path), 404, "not-found")
    assert offset_of(service.client, living) == 10


def test_nothing_is_remembered_of_what_another_process_removed(
    tmp_path: Path, content: bytes
) -> None:
    """As a worker on this host does."""
    with serving(tmp_path / "data", reconcile_seconds=0.2) as service:
        path = begin(service.client, len(content))
        id = path.rpartition("/")[2]
        assert send(service.client, path, 0, content[:10]).status_code == 204
        remembered = service.services.gathering._latest
        assert id in remembered
        with service.services.database.transaction() as session:
            session.execute(update(Upload).where(Upload.id == id).values(expires_at=now(session)))
        resumable.remove_expired(service.services.database, service.settings.data_dir)
        wait_for(lambda: id not in remembered)


def test_an_upload_does_not_expire_while_bytes_come(tmp_path: Path, content: bytes) -> None:
    """Another host has none of them, and removes what has expired as every one does."""
    other = tmp_path / "other host"
    other.mkdir()
    with serving(tmp_path / "data", upload_expires_seconds=2) as service:
        path = begin(service.client, len(content))

        def slowly() -> Iterator[bytes]:
            for n in range(10):
                yield content[n * 100 : (n + 1) * 100]
                time.sleep(0.3)
                assert resumable.remove_expired(service.services.database, other) == []
            yield content[1000:]

        headers = {**BODY, "Upload-Offset": "0"}
        last = service.client.patch(path, content=slowly(), headers=headers)
        assert last.status_code == 204, last.text
        assert_became(service.client, last.headers["location"], content)


def test_uploads_that_may_go_on_are_listed(service: Service, content: bytes) -> None:
    """Page by page, newest first, and no other."""
    client = service.as_key(
        service.new_key(Role.SUBMITTER, project_id=service.new_project()).secret
    )
    begun = [begin(client, len(content), name=f"number {n}") for n in range(6)]
    finished, refused, given_up, expired, receiving, untouched = begun
    assert send(client, finished, 0, content).status_code == 204
    assert send(client, refused, 0, b"x" * len(content)).status_code == 422
    assert client.delete(given_up, headers=TUS).status_code == 204
    with service.services.database.transaction() as session:
        mine = Upload.id == expired.rpartition("/")[2]
        session.execute(update(Upload).where(mine).values(expires_at=now(session)))
    send(client, receiving, 0, content[:10])

    first = client.get("/v1/uploads?limit=1").json()
    assert [each["name"] for each in first["items"]] == ["number 5"]
    rest = client.get("/v1/uploads", params={"after": first["next"]}).json()
    assert rest == {"items": [client.get(receiving).json()], "next": None}
    assert [(each["state"], each["offset"]) for each in rest["items"]] == [("receiving", 10)]
    assert client.delete(untouched, headers=TUS).status_code == 204
    assert client.get("/v1/uploads").json()["items"] == rest["items"]


# --- cut off anywhere -----------------------------------------------------------------------


def open_patch(
    port: int, key: str, path: str, offset: int, length: int, **more: str
) -> socket.socket:
    """A connection that has sent the head of a PATCH."""
    headers = {
        "Host": "x",
        "Authorization": f"Bearer {key}",
        **BODY,
        "Upload-Offset": str(offset),
        "Content-Length": str(length),
        **more,
    }
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    connection.sendall(f"PATCH {path} HTTP/1.1\r\n{head}\r\n".encode())
    return connection


def abort(connection: socket.socket) -> None:
    """As a host that vanishes: a reset, not an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("seed", range(4))
def test_cut_off_at_random_bytes_it_resumes(service: Service, content: bytes, seed: int) -> None:
    """By resets, by orderly ends, and by connections that stay open and fall silent."""
    chance = random.Random(seed)
    client = service.client
    path = begin(client, len(content))
    offset, silent = 0, ExitStack()
    for _ in range(12):
        connection = open_patch(service.port, service.key, path, offset, len(content) - offset)
        sent = chance.randrange((len(content) - offset) // 2)
        connection.sendall(content[offset : offset + sent])
        how = chance.choice(["reset", "end", "silence"])
        if how == "reset":
            abort(connection)
        elif how == "end":
            connection.close()
        else:
            silent.enter_context(connection)
        reached = offset_of(client, path)
        assert reached >= offset
        offset = reached
    with silent:
        for _ in range(5):
            last = send(client, path, offset, content[offset:])
            if last.status_code != 409:
                break
            # A request that the server had not begun to read when HEAD asked: what it brought
            # counts too, so a client asks once more.
            reached = offset_of(client, path)
            assert reached > offset
            offset = reached
    assert last.status_code == 204, last.text
    assert_became(client, last.headers["location"], content)


def test_what_came_of_a_silent_connection_is_kept(service: Service) -> None:
    """Less than is written at once, so it was still in memory."""
    path = begin(service.client, 100_000)
    with open_patch(service.port, service.key, path, 0, 100_000) as connection:
        connection.sendall(b"x" * 50_000)
        wait_for(lambda: path.rpartition("/")[2] in gathering(service))
        reached = 0
        while reached < 50_000:  # HEAD ends the receiving; go on with what is left
            reached = offset_of(service.client, path)
            if reached < 50_000:
                answer = send(service.client, path, reached, b"x" * (50_000 - reached))
                assert answer.status_code == 204
        assert b"400" in connection.recv(100)  # told, should it still listen
    assert offset_of(service.client, path) == 50_000


def test_a_checked_body_that_is_cut_off_leaves_nothing(service: Service, content: bytes) -> None:
    path = begin(service.client, len(content))
    send(service.client, path, 0, content[:10])
    rest = content[10:]
    with open_patch(service.port, service.key, path, 10, len(rest), **checksum(rest)) as connection:
        connection.sendall(rest[: len(rest) // 2])
    wait_for(lambda: offset_of(service.client, path) == 10)
    assert_became(
        service.client,
        send(service.client, path, 10, rest, **checksum(rest)).headers["location"],
        content,
    )


# --- restarts -------------------------------------------------------------------------------


def test_an_upload_survives_restarts(tmp_path: Path, content: bytes) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir) as service:
        path = begin(service.client, len(content))
        send(service.client, path, 0, content[:1000])
    with serving(data_dir) as service:
        assert offset_of(service.client, path) == 1000
        send(service.client, path, 1000, content[1000:2000])
        file = resumable.gathering_file(data_dir, path.rpartition("/")[2])
    # As a process leaves it that is killed while it receives what has a checksum.
    resumable.unchecked_mark(file).write_text("2000")
    with file.open("ab") as half:
        half.write(b"never held against its checksum")
    with serving(data_dir) as service:
        assert offset_of(service.client, path) == 2000
        done = send(service.client, path, 2000, content[2000:])
        assert_became(service.client, done.headers["location"], content)


def test_a_killed_process_loses_no_byte_that_it_had_written(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", hidden=256, ffn=1024, seed=11)
    content = archive(model)
    data_dir = tmp_path / "data"
    with api_process(data_dir, tmp_path / "log") as (process, client):
        path = begin(client, len(content))
        port = client.base_url.port
        assert port is not None
        key = client.headers["authorization"].removeprefix("Bearer ")
        connection = open_patch(port, key, path, 0, len(content))
        with connection:
            connection.sendall(content[:-1])
            wait_for(lambda: client.get(path).json()["offset"] > 0)
            process.kill()
            process.wait()
    with api_process(data_dir, tmp_path / "log") as (_, client):
        offset = offset_of(client, path)
        assert 0 < offset < len(content)
        done = send(client, path, offset, content[offset:])
        assert done.status_code == 204, done.text
        assert_became(client, done.headers["location"], content)


def test_what_was_complete_is_inspected_after_a_restart(tmp_path: Path, content: bytes) -> None:
    """As if the process had been killed during the inspection: nobody sends anything any more."""
    data_dir = tmp_path / "data"
    with serving(data_dir) as service:
        path = begin(service.client, len(content))
        send(service.client, path, 0, content[:-1])
    with resumable.gathering_file(data_dir, path.rpartition("/")[2]).open("ab") as file:
        file.write(content[-1:])
    with serving(data_dir) as service:
        wait_for(lambda: service.client.get(path).json()["state"] == "finished")
        assert_became(service.client, service.client.get(path).json()["record"], content)
        (entry,) = service.client.get("/v1/audit?limit=1").json()["items"]
        assert (entry["action"], entry["key"]) == (
            "model.uploaded",
            service.client.get("/v1/me").json()["key"],
        )


# --- tuspy ----------------------------------------------------------------------------------


NAMED = {"kind": "model", "filename": "tiny.tar.gz", "filetype": "application/gzip"}


def tus_client(service: Service) -> TusClient:
    return TusClient(
        f"{service.url}/v1/uploads", headers={"Authorization": f"Bearer {service.key}"}
    )


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("chunk", [None, 10_007])
def test_tuspy_uploads(service: Service, content: bytes, chunk: int | None, checked: bool) -> None:
    more = {} if chunk is None else {"chunk_size": chunk}
    uploader = tus_client(service).uploader(
        file_stream=io.BytesIO(content), metadata=NAMED, upload_checksum=checked, **more
    )
    uploader.upload()
    assert uploader.offset == len(content)
    record = uploader.request.response_headers["location"]
    assert_became(service.client, record, content)


def test_tuspy_resumes_elsewhere(service: Service, content: bytes) -> None:
    client = tus_client(service)
    first = client.uploader(file_stream=io.BytesIO(content), chunk_size=5000, metadata=NAMED)
    first.upload_chunk()
    second = client.uploader(file_stream=io.BytesIO(content), chunk_size=5000, url=first.url)
    assert second.offset == 5000
    second.upload()
    record = service.client.get(first.url.removeprefix(service.url)).json()["record"]
    assert_became(service.client, record, content)


def test_tuspy_hears_why(service: Service, content: bytes) -> None:
    client, cut = tus_client(service), io.BytesIO(content[:5000])
    with pytest.raises(TusCommunicationError):
        client.uploader(file_stream=cut, metadata={"kind": "x"}).upload()
    with pytest.raises(TusUploadFailed) as failed:
        client.uploader(file_stream=cut, metadata=NAMED).upload()
    assert b"damaged-archive" in (failed.value.response_content or b"")


# --- pages of other origins -----------------------------------------------------------------


def test_a_portals_page_may_upload(tmp_path: Path) -> None:
    portal = "https://portal.example"
    with serving(tmp_path / "data", cors_origins=(portal,)) as service:
        names = "authorization,content-type,tus-resumable,upload-length,upload-metadata"
        names += ",upload-offset,upload-checksum,x-http-method-override,x-requested-with"
        preflight = httpx.options(
            f"{service.url}/v1/uploads/upl_x",
            headers={
                "Origin": portal,
                "Access-Control-Request-Method": "PATCH",
                "Access-Control-Request-Headers": names,
            },
            trust_env=False,
        )
        assert preflight.status_code == 200
        headers = {"Origin": portal, **TUS, "Upload-Length": "5", "Upload-Metadata": metadata()}
        created = service.client.post("/v1/uploads", headers=headers)
        exposed = {
            name.strip().lower()
            for name in created.headers["access-control-expose-headers"].split(",")
        }
        needed = {"location", "tus-resumable", "tus-version", "tus-extension", "tus-max-size"}
        needed |= {f"upload-{name}" for name in ("offset", "length", "expires", "metadata")}
        assert needed <= exposed


@pytest.fixture(autouse=True)
def nothing_spooled(service: Service) -> Iterator[None]:
    yield
    wait_for(lambda: service.spooled() == [])
