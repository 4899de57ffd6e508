"""Disks that are full, and really so: a small tmpfs in a mount namespace of the API's own."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from jobs.records import Blob
from tests.api.conftest import api_process, archive, assert_problem, serving
from tests.builders import tiny_bert

SMALL, LARGE = 32, 256  # hidden sizes: of a model that finds room, and of one that does not
ROOM = 1 << 20


@contextmanager
def serving_with_little_room(
    tmp_path: Path, folder: str
) -> Iterator[tuple[httpx.Client, Callable[[], list[str]]]]:
    """The API as a process for which this folder of its data has 1 MiB (where mounting takes
    root, it becomes that in a user namespace): a client, and what lists the files in the folder."""
    small = tmp_path / "data" / folder
    small.mkdir(parents=True)
    namespaces = ["unshare", "--mount"] + ([] if os.getuid() == 0 else ["--map-root-user"])
    mount = f'mount -t tmpfs -o size={ROOM} tmpfs "$0" && exec "$@"'
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
    described = ",".join(
        f"{key} {base64.b64encode(value.encode()).decode()}"
        for key, value in {"kind": "model", "filename": "m.tar.gz"}.items()
    )
    tus = {"Tus-Resumable": "1.0.0", "Upload-Metadata": described}
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
