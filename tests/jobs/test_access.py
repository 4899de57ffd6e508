"""Projects, keys and the audit log, on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobs import access
from jobs.access import Actor, hash_key, new_key
from jobs.db import Database, now
from jobs.errors import NotFound
from jobs.paging import cursor_of
from jobs.records import DEFAULT_PROJECT, ApiKey
from jobs.roles import Role


def add(
    database: Database, *, project_id: str = DEFAULT_PROJECT, seconds: float | None = None
) -> ApiKey:
    with database.transaction() as session:
        expires_at = None if seconds is None else now(session) + timedelta(seconds=seconds)
        return access.add_api_key(
            session,
            project_id=project_id,
            name="k",
            hash=hash_key(new_key()),
            role=Role.SUBMITTER,
            expires_at=expires_at,
        )


def is_let_in(database: Database, key: ApiKey) -> bool:
    with database.reading() as session:
        found = access.find_api_key(session, key.hash, at=now(session))
        holds = access.key_holds(session, key.id)
    assert holds == (found is not None)
    return holds


def test_roles_stand_in_one_line() -> None:
    for role, others in (
        (Role.VIEWER, {Role.VIEWER}),
        (Role.SUBMITTER, {Role.VIEWER, Role.SUBMITTER}),
        (Role.ADMIN, set(Role)),
    ):
        assert {other for other in Role if role.includes(other)} == others


def test_a_revoked_or_expired_key_is_not_found(database: Database) -> None:
    with database.reading() as session:
        assert not access.has_api_keys(session)
    kept, revoked = add(database), add(database)
    lasting, expired = add(database, seconds=3600), add(database, seconds=-1)
    with database.transaction() as session:
        assert access.has_api_keys(session)
        access.revoke_api_key(session, revoked.id, project_id=DEFAULT_PROJECT)
        assert access.find_api_key(session, "b" * 64, at=now(session)) is None
    assert [is_let_in(database, key) for key in (kept, lasting, revoked, expired)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_revoking_again_changes_nothing(database: Database) -> None:
    key = add(database)
    with database.transaction() as session:
        first, changed = access.revoke_api_key(session, key.id, project_id=DEFAULT_PROJECT)
        assert changed
    with database.transaction() as session:
        second, changed = access.revoke_api_key(session, key.id, project_id=DEFAULT_PROJECT)
        assert not changed
    assert first.revoked_at == second.revoked_at is not None


def test_another_projects_records_are_not_found(database: Database) -> None:
    with database.transaction() as session:
        other = access.add_project(session, name="other").id
    key = add(database, project_id=other)
    with database.transaction() as session:
        entry = access.record_action(session, Actor(other), "key.created", key.id)
    with database.transaction() as session:
        for call in (
            lambda: access.get_api_key(session, key.id, project_id=DEFAULT_PROJECT),
            lambda: access.revoke_api_key(session, key.id, project_id=DEFAULT_PROJECT),
            lambda: access.list_api_keys(session, project_id=DEFAULT_PROJECT, after=key.id),
            lambda: access.list_actions(session, project_id=DEFAULT_PROJECT, after=entry.id),
        ):
            with pytest.raises(NotFound):
                call()
        assert access.list_api_keys(session, project_id=DEFAULT_PROJECT) == []
        assert access.list_actions(session, project_id=DEFAULT_PROJECT) == []
        assert [k.id for k in access.list_api_keys(session, project_id=other)] == [key.id]
    assert is_let_in(database, key)


def test_a_use_is_written_once_a_minute(database: Database) -> None:
    key = add(database)
    assert access.use_is_unrecorded(key, at=key.created_at)
    with database.transaction() as session:
        access.record_use(session, key.id)
    with database.reading() as session:
        used = access.get_api_key(session, key.id, project_id=DEFAULT_PROJECT)
    assert used.last_used_at is not None
    assert key.created_at <= used.last_used_at
    assert not access.use_is_unrecorded(used, at=used.last_used_at + timedelta(seconds=59))
    assert access.use_is_unrecorded(used, at=used.last_used_at + timedelta(seconds=60))


def test_an_entry_of_the_audit_log_goes_with_what_it_tells(database: Database) -> None:
    with pytest.raises(RuntimeError), database.transaction() as session:
        access.record_action(session, Actor(DEFAULT_PROJECT), "job.created", "job_x")
        raise RuntimeError
    with database.reading() as session:
        assert access.list_actions(session, project_id=DEFAULT_PROJECT) == []


def test_the_audit_log_is_read_by_page_key_and_target_and_holds_no_keys(
    database: Database,
) -> None:
    key, secret = add(database), new_key()
    with database.transaction() as session:
        for number in range(5):
            actor = Actor(DEFAULT_PROJECT, key.id if number % 2 else None, f"r{number}", "::1")
            access.record_action(session, actor, "job.created", f"job_{number}", name=[secret])
    with database.reading() as session:
        every = access.list_actions(session, project_id=DEFAULT_PROJECT)
        paged, after = [], None
        while page := access.list_actions(
            session, project_id=DEFAULT_PROJECT, after=after, limit=2
        ):
            paged += page
            after = page[-1].id
        by_key = access.list_actions(session, project_id=DEFAULT_PROJECT, key_id=key.id)
        by_target = access.list_actions(session, project_id=DEFAULT_PROJECT, target="job_3")
    assert sorted(entry.request_id or "" for entry in every) == ["r0", "r1", "r2", "r3", "r4"]
    assert [entry.id for entry in paged] == [entry.id for entry in every]
    assert {entry.target for entry in by_key} == {"job_1", "job_3"}
    assert [entry.request_id for entry in by_target] == ["r3"]
    assert every[0].details == {"name": ["wwk_***"]}


def test_projects_are_paged(database: Database) -> None:
    with database.transaction() as session:
        made = {access.add_project(session, name=f"p{number}").id for number in range(3)}
    with database.reading() as session:
        first = access.list_projects(session, limit=2)
        rest = access.list_projects(session, after=first[-1].id)
        assert access.list_projects(session, after=cursor_of(first[-1])) == rest
        with pytest.raises(NotFound):
            access.list_projects(session, after="prj_absent")
    assert len(first) == 2
    assert {project.id for project in (*first, *rest)} == made | {DEFAULT_PROJECT}
