"""Uploads as streams: what is refused leaves nothing behind, and nobody waits for anybody."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.errors import ApiError
from api.spool import Spool
from api.uploads import safe_name
from jobs import store
from jobs.records import DEFAULT_PROJECT
from jobs.roles import Role
from tests.api.conftest import Service, archive, assert_problem, serving, wait_for
from tests.builders import tiny_bert, tiny_dataset

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 2 * 2**20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """As the shared one, with a small limit."""
    with serving(tmp_path_factory.mktemp("api") / "data", max_upload_bytes=MAX_BYTES) as running:
        yield running


@pytest.fixture
def model_archive(tmp_path: Path) -> bytes:
    return archive(tiny_bert(tmp_path / "model"))


@pytest.fixture
def nothing_kept(service: Service) -> Iterator[None]:
    """The test leaves no record, no object and no spooled file behind."""
    before = service.kept()
    yield
    wait_for(lambda: service.spooled() == before["spool"])
    assert service.kept() == before


def test_a_raw_body_is_hashed_stored_and_cleaned_up_after(
    service: Service, model_archive: bytes
) -> None:
    before = set(service.kept()["objects"])
    answer = service.client.post("/v1/models?filename=tiny.tar.gz", content=model_archive)
    assert answer.status_code == 201
    body = answer.json()
    assert body["name"] == "tiny"
    assert body["sha256"] == hashlib.sha256(model_archive).hexdigest()
    assert body["size_bytes"] == len(model_archive)
    assert answer.headers["location"] == f"/v1/models/{body['id']}"
    added = set(service.kept()["objects"]) - before
    with service.services.database.reading() as session:
        model = store.get_model(session, body["id"], project_id=DEFAULT_PROJECT)
    assert {file["key"] for file in model.files} == added
    assert "model.safetensors" in {file["name"] for file in model.files}
    assert service.spooled() == []


def test_the_same_bytes_are_stored_once_a_project(service: Service, tmp_path: Path) -> None:
    content = archive(tiny_bert(tmp_path / "model", seed=7))
    first = service.client.post("/v1/models?filename=tiny.tar.gz", content=content)
    once = service.kept()["objects"]
    second = service.client.post("/v1/models?filename=again.tar.gz", content=content)
    assert first.json()["id"] != second.json()["id"]
    assert service.kept()["objects"] == once
    other = service.as_key(service.new_key(Role.ADMIN, project_id=service.new_project()).secret)
    assert other.post("/v1/models?filename=tiny.tar.gz", content=content).status_code == 201
    assert len(service.kept()["objects"]) > len(once)  # what others have is nobody's business


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", None])
def test_any_way_to_send_a_raw_body_will_do(
    service: Service, model_archive: bytes, content_type: str | None
) -> None:
    """curl --data-binary says form-urlencoded; curl -T says nothing and sends PUT."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    method = "PUT" if content_type is None else "POST"
    answer = service.client.request(
        method, "/v1/models?filename=tiny.tar.gz", content=model_archive, headers=headers
    )
    assert answer.status_code == 201, answer.text


def test_the_name_may_come_in_content_disposition(service: Service, model_archive: bytes) -> None:
    answer = service.client.post(
        "/v1/models",
        content=model_archive,
        headers={"Content-Disposition": 'attachment; filename="mine.tar.gz"'},
    )
    assert answer.json()["files"][0]["name"] == "mine.tar.gz"


def test_a_form_holds_the_single_files_of_a_folder(service: Service, tmp_path: Path) -> None:
    files = sorted(tiny_bert(tmp_path / "model").iterdir())
    parts = [("file", (path.name, path.read_bytes())) for path in files]
    answer = service.client.post("/v1/models?name=single%20files", files=parts)
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert body["name"] == "single files"
    assert body["sha256"] is None
    assert {file["name"]: file["sha256"] for file in body["files"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    assert service.client.get(f"/v1/models/{body['id']}").json() == body


def test_a_form_is_read_the_same_in_pieces_of_any_size(service: Service, tmp_path: Path) -> None:
    """Boundaries that fall between two pieces are still boundaries."""
    train = tiny_dataset(tmp_path / "dataset") / "train.tsv"
    content = train.read_bytes()
    form = (
        b'--edge\r\nContent-Disposition: form-data; name="file"; filename="train.tsv"\r\n\r\n'
        + content
        + b"\r\n--edge--\r\n"
    )
    digests = set()
    for size in (1, 2, 7, 4096):
        pieces = (form[i : i + size] for i in range(0, len(form), size))
        answer = service.client.post(
            "/v1/datasets",
            content=pieces,
            headers={"Content-Type": "multipart/form-data; boundary=edge"},
        )
        assert answer.status_code == 201, answer.text
        digests.add(answer.json()["sha256"])
    assert digests == {hashlib.sha256(content).hexdigest()}


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("path", "content", "code"),
    [
        ("/v1/models", b"x", "missing-filename"),
        ("/v1/models?filename=", b"x", "invalid-filename"),
        ("/v1/models?filename=..", b"x", "invalid-filename"),
        ("/v1/models?filename=../../etc/passwd", b"x", "invalid-filename"),
        ("/v1/models?filename=/etc/passwd", b"x", "invalid-filename"),
        ("/v1/models?filename=a%5Cb.zip", b"x", "invalid-filename"),
        ("/v1/models?filename=a%00.zip", b"x", "invalid-filename"),
        ("/v1/models?filename=a%0Ab.zip", b"x", "invalid-filename"),
        ("/v1/models?filename=a%E2%80%AEb.zip", b"x", "invalid-filename"),  # right-to-left
        ("/v1/models?filename=" + 201 * "a", b"x", "invalid-filename"),
        ("/v1/models?filename=m.tar.gz", b"", "invalid-upload"),
    ],
)
def test_a_hostile_name_or_an_empty_body_is_refused(
    service: Service, path: str, content: bytes, code: str
) -> None:
    assert_problem(service.client.post(path, content=content), 400, code)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([("file", ("../config.json", b"{}"))], "invalid-filename"),
        ([("file", ("a/../../config.json", b"{}"))], "invalid-filename"),
        ([("file", ("config.json", b"{}")), ("file", ("config.json", b"{}"))], "invalid-upload"),
        ([("file", ("config.json", b"{}")), ("file", ("CONFIG.json", b"{}"))], "invalid-upload"),
        ([("model", ("config.json", b"{}"))], "invalid-upload"),
        ([("file", ("config.json", b""))], "invalid-upload"),
        ([("file", (f"{i}.json", b"{}")) for i in range(65)], "invalid-upload"),
    ],
)
def test_a_hostile_form_is_refused(
    service: Service, parts: list[tuple[str, tuple[str, bytes]]], code: str
) -> None:
    assert_problem(service.client.post("/v1/models", files=parts), 400, code)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("multipart/form-data", b"x", 400, "invalid-upload"),
        ("multipart/form-data; boundary=" + 300 * "b", b"x", 400, "invalid-upload"),
        ("multipart/form-data; boundary=b", b"no boundary here", 400, "invalid-upload"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400, "invalid-upload"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\ndata\r\n--b--\r\n", 400, "invalid-upload"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\ndata',
            400,
            "upload-incomplete",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ndata\r\n--b--\r\n',
            400,
            "missing-filename",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="\xff.zip"'
            b"\r\n\r\ndata\r\n--b--\r\n",
            400,
            "invalid-filename",
        ),
        (
            "multipart/form-data; boundary=b",
            b"--b\r\nX: " + 10_000 * b"x" + b"\r\n\r\ndata\r\n--b--\r\n",
            400,
            "invalid-upload",
        ),
        ("multipart/mixed; boundary=b", b"--b--\r\n", 415, "unsupported-media-type"),
    ],
)
def test_a_malformed_form_is_refused(
    service: Service, content_type: str, body: bytes, status: int, code: str
) -> None:
    answer = service.client.post("/v1/models", content=body, headers={"Content-Type": content_type})
    assert_problem(answer, status, code)


@pytest.mark.usefixtures("nothing_kept")
def test_an_encoded_body_is_refused(service: Service) -> None:
    answer = service.client.post(
        "/v1/models?filename=m.zip", content=b"x", headers={"Content-Encoding": "gzip"}
    )
    assert_problem(answer, 415, "unsupported-encoding")


@pytest.mark.usefixtures("nothing_kept")
def test_a_body_above_the_limit_is_refused_before_it_is_sent(service: Service) -> None:
    with raw_upload(service, length=MAX_BYTES + 1) as connection:
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert b"100 Continue" not in answer


@pytest.mark.usefixtures("nothing_kept")
def test_a_body_of_unknown_length_is_cut_off_at_the_limit(service: Service) -> None:
    taken = 0

    def body() -> Iterator[bytes]:
        nonlocal taken
        while True:  # would never end by itself
            taken += 2**16
            yield b"x" * 2**16

    answer = service.client.post("/v1/models?filename=m.tar.gz", content=body())
    problem = assert_problem(answer, 413, "upload-too-large")
    assert problem["max_bytes"] == MAX_BYTES
    assert MAX_BYTES < taken < 64 * 2**20


@pytest.mark.usefixtures("nothing_kept")
def test_an_upload_that_inspection_refuses_leaves_nothing(
    service: Service, model_archive: bytes
) -> None:
    answer = service.client.post(
        "/v1/models?filename=m.tar.gz", content=model_archive[: len(model_archive) // 2]
    )
    problem = assert_problem(answer, 422, "damaged-archive")
    assert problem["pointer"] == "m.tar.gz"


@pytest.mark.usefixtures("nothing_kept")
def test_broken_rows_are_named_by_their_lines(service: Service) -> None:
    content = b"text,label\nfine,1\nbroken,0,extra\nfine,0\nalso broken\n"
    answer = service.client.post("/v1/datasets?filename=train.csv", content=content)
    problem = assert_problem(answer, 422, "invalid-dataset")
    assert [(row["file"], row["line"]) for row in problem["rows"]] == [
        ("train.csv", 3),
        ("train.csv", 5),
    ]


@pytest.mark.usefixtures("nothing_kept")
def test_a_client_that_goes_away_leaves_nothing(service: Service) -> None:
    with raw_upload(service, length=100_000) as connection:
        connection.sendall(b"x" * 50_000)
        wait_for(lambda: service.spooled())
    # nothing_kept waits until the spool is empty again


@pytest.mark.usefixtures("nothing_kept")
def test_without_a_key_not_a_byte_of_the_body_is_read(service: Service) -> None:
    """The answer comes while the client still holds its body back."""
    for key in (None, "wwk_" + 43 * "A"):
        with raw_upload(service, length=1000, key=key) as connection:
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"100 Continue" not in answer


def test_slow_uploads_keep_nobody_waiting(service: Service) -> None:
    """More of them at once than the service has threads."""
    connections = [raw_upload(service, length=1000) for _ in range(60)]
    try:
        for connection in connections:
            connection.sendall(b"x")
        wait_for(lambda: sum(path.endswith("slow.tar.gz") for path in service.spooled()) == 60)
        assert service.client.get("/v1/jobs").status_code == 200
        assert service.client.get("/readyz").status_code == 200
    finally:
        for connection in connections:
            connection.close()
    wait_for(lambda: service.spooled() == [])


def test_a_record_that_cannot_be_written_takes_its_objects_along(
    service: Service, model_archive: bytes
) -> None:
    before = service.kept()
    with service.services.database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE models RENAME TO models_away")
    try:
        answer = service.client.post("/v1/models?filename=m.tar.gz", content=model_archive)
    finally:
        with service.services.database.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE models_away RENAME TO models")
    assert_problem(answer, 500, "internal-error")
    assert service.kept() == before


def test_a_start_removes_what_a_crash_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom api.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]))\n"
        "(spool.folder / 'half.zip').write_bytes(b'half')\n"
        "print(spool.folder, flush=True)\ntime.sleep(600)\n"
    )
    crashed = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "spool")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    living = None
    try:
        assert crashed.stdout is not None
        left = Path(crashed.stdout.readline().strip())
        living = Spool(tmp_path / "spool")
        assert (left / "half.zip").exists()  # its process lives
        crashed.kill()
        crashed.wait()
        late = Spool(tmp_path / "spool")
        late.close()
        assert not left.exists()
        assert living.folder.is_dir()
    finally:
        crashed.kill()
        crashed.wait()
        if crashed.stdout is not None:
            crashed.stdout.close()
        if living is not None:
            living.close()


def test_spooled_files_are_for_the_service_alone(service: Service) -> None:
    with raw_upload(service, length=1000) as connection:
        connection.sendall(b"x")
        wait_for(lambda: any(path.endswith("slow.tar.gz") for path in service.spooled()))
        for folder in (service.services.spool.folder, *service.services.spool.folder.glob("*/")):
            assert os.stat(folder).st_mode & 0o077 == 0
    wait_for(lambda: service.spooled() == [])


@pytest.mark.parametrize("name", ["model.tar.gz", "train.csv", "Modell fürs Café.zip", ".hidden"])
def test_plain_names_are_kept(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "/a", "a\\b", "a\x00", "a\x7f"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ApiError):
        safe_name(name)


def raw_upload(service: Service, *, length: int, key: str | None = "") -> socket.socket:
    """A connection that has sent the head of an upload and nothing of its body."""
    authorization = f"Authorization: Bearer {key or service.key}\r\n" if key is not None else ""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    connection.sendall(
        f"POST /v1/models?filename=slow.tar.gz HTTP/1.1\r\nHost: x\r\n{authorization}"
        f"Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n".encode()
    )
    return connection
