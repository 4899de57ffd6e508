"""Bytes that models and datasets share, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading

import pytest

from jobs import blobs
from jobs.blobs import Wanted
from jobs.db import Database
from jobs.errors import StoreRefused
from jobs.records import DEFAULT_PROJECT, Blob

A, B = 64 * "a", 64 * "b"


def want(database: Database, *sha256: str, project_id: str = DEFAULT_PROJECT) -> list[Wanted]:
    with database.transaction() as session:
        return blobs.want(session, project_id, [(each, 10) for each in sha256])


def use(database: Database, owner_id: str, wanted: list[Wanted]) -> dict[str, str]:
    with database.transaction() as session:
        return blobs.use(session, DEFAULT_PROJECT, owner_id, wanted)


def give_up(database: Database, owner_id: str, *keys: str) -> None:
    files = [{"key": key, "sha256": A, "size_bytes": 10} for key in keys]
    with database.transaction() as session:
        blobs.hold_project(session, DEFAULT_PROJECT)
        blobs.give_up(session, DEFAULT_PROJECT, owner_id, files)


def collect(database: Database, *, grace_seconds: float = 0) -> list[str]:
    """As the reconciler; the keys whose objects are deleted."""
    with database.reading() as session:
        unused = blobs.unused(session, grace_seconds=grace_seconds)
    keys = []
    for blob in unused:
        with database.transaction() as session:
            if not blobs.doom(session, blob, grace_seconds=grace_seconds):
                continue
        keys.append(blob.key)
        with database.transaction() as session:
            blobs.forget(session, blob.id)
    return keys


def test_what_is_there_is_not_stored_again(database: Database) -> None:
    first = want(database, A, B, A)
    assert [each.is_stored for each in first] == [False, False, False]
    assert first[0] == first[2]  # twice in one upload
    keys = use(database, "mdl_1", first)
    second = want(database, A)
    assert (second[0].is_stored, second[0].key) == (True, keys[A])
    assert use(database, "mdl_2", second) == {A: keys[A]}


def test_uploads_of_the_same_bytes_at_once_end_with_one_object(database: Database) -> None:
    first, second = want(database, A), want(database, A)
    assert first[0].key != second[0].key
    keys = use(database, "mdl_1", first)
    assert use(database, "mdl_2", second) == keys
    assert collect(database) == [second[0].key]


def test_what_anybody_uses_stays(database: Database) -> None:
    keys = use(database, "mdl_1", want(database, A))
    use(database, "mdl_2", want(database, A))
    give_up(database, "mdl_1", keys[A])
    assert collect(database) == []
    give_up(database, "mdl_2", keys[A])
    assert collect(database, grace_seconds=60) == []
    assert collect(database) == [keys[A]]
    assert want(database, A)[0].key != keys[A]  # its object may be going this moment


def test_what_is_wanted_again_in_time_stays(database: Database) -> None:
    keys = use(database, "mdl_1", want(database, A))
    give_up(database, "mdl_1", keys[A])
    use(database, "mdl_2", want(database, A))
    assert collect(database) == []


def test_an_upload_that_comes_to_nothing_is_forgotten(database: Database) -> None:
    keys = use(database, "mdl_1", want(database, A))
    wanted = want(database, A, B)
    with database.transaction() as session:
        assert blobs.unwant(session, wanted) == [wanted[1].key]  # A is another's, and stays
    assert want(database, A)[0].key == keys[A]
    # One whose record was made although its commit was reported as failed keeps its objects.
    use(database, "mdl_2", (made := want(database, B)))
    with database.transaction() as session:
        assert blobs.unwant(session, made) == []


def test_what_went_meanwhile_is_told(database: Database) -> None:
    wanted = want(database, A)
    assert collect(database) == [wanted[0].key]
    with pytest.raises(StoreRefused):
        use(database, "mdl_1", wanted)


def test_using_and_dooming_exclude_each_other(database: Database) -> None:
    """Many times at once: either the blob is used and stays, or it went and the user is told."""
    used = []
    for number in range(10):
        wanted = want(database, f"{number:064x}")
        start = threading.Barrier(2)

        def user(wanted: list[Wanted] = wanted, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                used.extend(use(database, "mdl_1", wanted).values())
            except StoreRefused:
                return

        thread = threading.Thread(target=user)
        thread.start()
        start.wait()
        gone = collect(database)
        thread.join()
        assert not set(gone) & set(used)
    with database.reading() as session:
        assert {blob.key for blob in session.query(Blob)} == set(used)


def test_files_of_before_there_were_blobs_go_too(database: Database) -> None:
    give_up(database, "mdl_old", "models/mdl_old/model.safetensors")
    assert collect(database) == ["models/mdl_old/model.safetensors"]
