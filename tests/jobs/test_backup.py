"""The backup of one machine, by the commands of docs/operations.md."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

from jobs import access, store
from jobs.artifacts import ObjectStore, open_store, run_prefix
from jobs.db import Database, now
from jobs.records import DEFAULT_PROJECT
from jobs.roles import Role
from jobs.settings import Settings
from jobs.states import JobState
from tests.documents import ROOT, commands_below
from tests.seeds import seed_job, stored_file

KEY = access.new_key()


def test_a_backup_of_a_running_service_is_one_with_all_its_records_and_objects(
    tmp_path: Path, migrated_sqlite: Path
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(migrated_sqlite, tmp_path / "data/widthwise.db")
    (tmp_path / "data/api_key").write_text(KEY)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    settings = Settings(data_dir=tmp_path / "data")
    database, objects = Database(settings.database_url), open_store(settings.store_url)
    finished, waiting = _fill(database, objects)

    # Somebody writes all the while, and has an open transaction when the backup begins.
    stop, written = threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            with database.transaction() as session:
                access.add_project(session, name="written meanwhile")
                written.set()
                stop.wait(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert written.wait(30)
        _run(commands_below("docs/operations.md", "Backup of one machine"), tmp_path)
    finally:
        stop.set()
        writer.join()
    database.close()

    shutil.rmtree(tmp_path / "data")
    _run(commands_below("docs/operations.md", "Restore of one machine"), tmp_path)
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    database, objects = Database(settings.database_url), open_store(settings.store_url)
    with database.reading() as session:
        key = (settings.data_dir / "api_key").read_text()
        assert access.find_api_key(session, access.hash_key(key), at=now(session)) is not None
        (artifact,) = store.list_artifacts(session, finished, project_id=DEFAULT_PROJECT)
    objects.get_to_file(artifact.key, tmp_path / "download", sha256=artifact.sha256)
    assert (tmp_path / "download").read_bytes() == b"compressed"
    with database.transaction() as session:
        claim = store.claim_job(session, waiting, worker="w", lease_seconds=60, max_runs=3)
    assert claim is not None
    for file in (*claim.model_files, *claim.dataset_files):
        objects.get_to_file(file["key"], tmp_path / file["name"], sha256=file["sha256"])
    database.close()


def _fill(database: Database, objects: ObjectStore) -> tuple[str, str]:
    """A key, a job that succeeded with an artifact, and one that waits; the jobs' ids."""
    finished, waiting = seed_job(database, objects), seed_job(database, objects)
    with database.transaction() as session:
        access.add_api_key(
            session, project_id=DEFAULT_PROJECT, name="first", hash=access.hash_key(KEY),
            role=Role.ADMIN,
        )  # fmt: skip
        claim = store.claim_job(session, finished, worker="w", lease_seconds=60, max_runs=3)
        assert claim is not None
    file = stored_file(objects, run_prefix(finished, claim.fence) + "w1_2/file", b"compressed")
    with database.transaction() as session:
        store.add_artifact(
            session, claim, path="w1_2/file", key=file["key"], size_bytes=file["size_bytes"],
            sha256=file["sha256"], media_type="application/octet-stream",
        )  # fmt: skip
        store.finish_job(session, claim, JobState.SUCCEEDED, report={})
    return finished, waiting


def _run(commands: list[str], folder: Path) -> None:
    for block in commands:
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=folder, check=True)
