"""API keys: who gets in, and where keys are and are not kept."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from api.auth import ensure_first_key
from jobs.access import hash_key, new_key
from jobs.db import Database
from jobs.migrate import upgrade
from jobs.records import ApiKey
from jobs.roles import Role
from tests.api.conftest import Service, assert_problem, wait_for


def bare_get(service: Service, path: str, authorization: str | None = None) -> httpx.Response:
    headers = {} if authorization is None else {"Authorization": authorization}
    return httpx.get(service.url + path, headers=headers, trust_env=False)


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/jobs", "/v1/models", "/v1/artifacts/art_x/content", "/v1/no/such/path", "/v1/"],
)
def test_nothing_below_v1_answers_without_a_key(service: Service, path: str) -> None:
    answer = bare_get(service, path)
    assert_problem(answer, 401, "missing-api-key")
    assert answer.headers["www-authenticate"] == 'Bearer realm="widthwise"'


def test_a_key_that_is_not_known_is_refused(service: Service) -> None:
    for authorization in (
        f"Bearer {new_key()}",
        f"Bearer {service.key}x",
        f"Bearer {service.key[:-1]}",
        "Bearer wwk_",
        f"Basic {service.key}",
        service.key,
        f"Bearer {hash_key(service.key)}",
        "Bearer " + 10_000 * "a",
    ):
        answer = bare_get(service, "/v1/jobs", authorization)
        assert_problem(answer, 401, "invalid-api-key")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_the_scheme_is_case_insensitive(service: Service) -> None:
    assert bare_get(service, "/v1/jobs", f"bearer {service.key}").status_code == 200


def test_paths_outside_v1_are_open(service: Service) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert bare_get(service, path).status_code == 200


def test_a_use_is_written_down_once_the_answer_is_out(service: Service) -> None:
    key = service.new_key(Role.VIEWER)
    assert service.as_key(key.secret).get("/v1/jobs").status_code == 200

    def last_used() -> str | None:
        answer = service.client.get(f"/v1/keys/{key.id}")
        return answer.json()["last_used_at"]  # type: ignore[no-any-return]

    wait_for(last_used)
    first = last_used()
    assert service.as_key(key.secret).get("/v1/jobs").status_code == 200
    assert last_used() == first  # within the same minute


def test_a_use_that_cannot_be_written_down_keeps_nobody_out(service: Service) -> None:
    key = service.new_key(Role.VIEWER)
    refuse = (
        "CREATE TRIGGER no_use BEFORE UPDATE OF last_used_at ON api_keys"
        " BEGIN SELECT RAISE(ABORT, 'not now'); END"
    )
    with service.services.database.engine.begin() as connection:
        connection.exec_driver_sql(refuse)
    try:
        for _ in range(2):
            assert service.as_key(key.secret).get("/v1/jobs").status_code == 200
    finally:
        with service.services.database.engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER no_use")


def test_the_first_key_is_private_and_the_database_knows_its_hash_alone(
    service: Service,
) -> None:
    path = service.settings.data_dir / "api_key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.glob(".api_key*")) == []
    database_files = service.settings.data_dir.glob("widthwise.db*")
    assert not any(service.key.encode() in file.read_bytes() for file in database_files)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'widthwise.db'}")
    upgrade(database)
    return database


def keys_of(database: Database) -> list[str]:
    with database.reading() as session:
        return [key.hash for key in session.query(ApiKey)]


def test_many_starts_at_once_agree_on_one_key(database: Database, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(ensure_first_key, database, tmp_path) for _ in range(8)]:
            result.result()
    assert keys_of(database) == [hash_key((tmp_path / "api_key").read_text().strip())]
    database.close()


def test_a_start_that_died_between_file_and_record_is_mended(
    database: Database, tmp_path: Path
) -> None:
    key = new_key()
    (tmp_path / "api_key").write_text(key + "\n")
    (tmp_path / "api_key").chmod(0o600)
    ensure_first_key(database, tmp_path)
    assert keys_of(database) == [hash_key(key)]
    database.close()


def test_a_key_that_others_could_have_read_or_planted_is_not_taken(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "api_key"
    path.write_text(new_key())
    path.chmod(0o644)
    with pytest.raises(PermissionError):
        ensure_first_key(database, tmp_path)
    path.unlink()
    (tmp_path / "elsewhere").write_text(new_key())
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        ensure_first_key(database, tmp_path)
    assert keys_of(database) == []
    database.close()


def test_a_second_start_makes_no_second_key(database: Database, tmp_path: Path) -> None:
    ensure_first_key(database, tmp_path)
    (tmp_path / "api_key").unlink()  # its owner has put it into a safe place
    ensure_first_key(database, tmp_path)
    assert not (tmp_path / "api_key").exists()
    assert len(keys_of(database)) == 1
    database.close()


def test_keys_are_random_and_hashed_whole() -> None:
    assert new_key() != new_key()
    assert len(new_key()) == 47
    assert hash_key("wwk_a") != hash_key("wwk_b")
