"""`python -m jobs.keys`, as an operator types it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import access
from jobs.access import hash_key
from jobs.db import Database, now
from jobs.keys import main
from jobs.records import DEFAULT_PROJECT, ApiKey
from jobs.roles import Role
from jobs.settings import get_settings


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """That of the command line, which has not been made yet."""
    monkeypatch.setenv("WIDTHWISE_DATA_DIR", str(tmp_path / "data"))
    get_settings.cache_clear()
    database = Database(get_settings().database_url)
    yield database
    database.close()
    get_settings.cache_clear()


def find(database: Database, key: str) -> ApiKey | None:
    with database.reading() as session:
        return access.find_api_key(session, hash_key(key), at=now(session))


def actions(database: Database, project_id: str = DEFAULT_PROJECT) -> list[tuple[str, str]]:
    with database.reading() as session:
        found = access.list_actions(session, project_id=project_id)
    assert all(entry.key_id is None for entry in found)
    return sorted((entry.action, entry.target) for entry in found)


def test_the_first_key_is_made_shown_once_and_revoked(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["add", "first"]) == 0
    shown = capsys.readouterr()
    key = shown.out.removesuffix("\n")
    record = find(database, key)
    assert record is not None
    assert (record.role, record.expires_at) == (Role.ADMIN, None)
    assert record.id in shown.err
    assert key not in shown.err

    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert record.id in listed
    assert key not in listed
    for _ in range(2):
        assert main(["revoke", record.id]) == 0
        assert "revoked 20" in capsys.readouterr().out
    assert find(database, key) is None
    assert actions(database) == [("key.created", record.id), ("key.revoked", record.id)]


def test_a_project_gets_keys_of_its_own_with_a_role_and_an_end(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["add-project", "Search"]) == 0
    project = capsys.readouterr().out.strip()
    assert re.fullmatch(r"prj_[\w-]{22}", project)
    assert main(["projects"]) == 0
    assert f"{project}  Search\n" in capsys.readouterr().out
    command = ["add", "CI", "--project", project, "--role", "submitter", "--days", "90"]
    assert main(command) == 0
    record = find(database, capsys.readouterr().out.strip())
    assert record is not None
    assert (record.project_id, record.role) == (project, Role.SUBMITTER)
    assert record.expires_at is not None
    assert abs((record.expires_at - record.created_at).total_seconds() - 90 * 86_400) < 60
    assert actions(database) == []
    assert actions(database, project) == [
        ("key.created", record.id),
        ("project.created", project),
    ]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["add", "x", "--project", "prj_absent"], "There is no project 'prj_absent'."),
        (["list", "--project", "prj_absent"], "There is no project 'prj_absent'."),
        (["revoke", "key_absent"], "There is no API key 'key_absent'."),
    ],
)
def test_what_is_not_there_is_told(
    database: Database, capsys: pytest.CaptureFixture[str], command: list[str], told: str
) -> None:
    assert main(command) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err


@pytest.mark.parametrize(
    "command",
    [[], ["add"], ["add", " "], ["add", "a\nb"], ["add", "x", "--role", "owner"],
     ["add", "x", "--days", "0"], ["add", "x", "--days", "99999999"]],
)  # fmt: skip
def test_a_malformed_command_makes_nothing(database: Database, command: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
