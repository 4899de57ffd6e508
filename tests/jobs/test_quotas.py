"""Quotas, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jobs import access, quotas, resumable, set_quotas, store
from jobs.artifacts import ObjectStore
from jobs.db import Database
from jobs.errors import QuotaExceeded
from jobs.quotas import Quotas, Usage
from jobs.records import DEFAULT_PROJECT, Project
from jobs.settings import get_settings
from jobs.states import JobState
from jobs.store import Claim
from tests.seeds import seed_job


def limit(database: Database, **changes: int | None) -> None:
    with database.transaction() as session:
        quotas.set_quotas(session.get_one(Project, DEFAULT_PROJECT), changes)


def used(database: Database, project_id: str = DEFAULT_PROJECT) -> Usage:
    with database.reading() as session:
        return quotas.usage(session, project_id)


def claim(database: Database, job_id: str) -> Claim | None:
    with database.transaction() as session:
        return store.claim_job(session, job_id, worker="w", lease_seconds=600, max_runs=3)


def retry(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        store.retry_job(session, job_id, project_id=DEFAULT_PROJECT)


def add_upload(database: Database, size_bytes: int) -> str:
    with database.transaction() as session:
        return resumable.add_upload(
            session,
            project_id=DEFAULT_PROJECT,
            key_id=None,
            kind="model",
            filename="m.zip",
            name=None,
            metadata_sent="",
            size_bytes=size_bytes,
            lasts_seconds=60,
        ).id


def test_use_is_counted_by_project(database: Database) -> None:
    assert used(database) == Usage(bytes=0, uploads=0, running_jobs=0, queued_jobs=0)
    with database.transaction() as session:
        other = access.add_project(session, name="other").id
    seed_job(database, project_id=other)
    job_id = seed_job(database)
    upload_id = add_upload(database, 500)
    assert used(database) == Usage(bytes=500, uploads=3, running_jobs=0, queued_jobs=1)
    held = claim(database, job_id)
    assert held is not None
    with database.transaction() as session:
        store.add_artifact(
            session, held, path="w1/a", key="jobs/x/1/w1/a", size_bytes=70, sha256=64 * "a",
            media_type="text/plain",
        )  # fmt: skip
        resumable.finish(session, upload_id, record_id="mdl_x")
    assert used(database) == Usage(bytes=70, uploads=2, running_jobs=1, queued_jobs=0)
    assert used(database, other) == Usage(bytes=0, uploads=2, running_jobs=0, queued_jobs=1)


def test_an_upload_above_a_quota_is_told_which(database: Database) -> None:
    add_upload(database, 600)
    limit(database, bytes=1000, uploads=2)
    with database.reading() as session:
        quotas.check_upload(session, DEFAULT_PROJECT, more_bytes=400, more_uploads=1)
        with pytest.raises(QuotaExceeded, match="1000 bytes in models") as error:
            quotas.check_upload(session, DEFAULT_PROJECT, more_bytes=401)
        assert (error.value.quota, error.value.limit, error.value.used) == ("bytes", 1000, 1001)
        with pytest.raises(QuotaExceeded, match="2 models, datasets"):
            quotas.check_upload(session, DEFAULT_PROJECT, more_uploads=2)
    limit(database, bytes=None, uploads=None)
    with database.reading() as session:
        quotas.check_upload(session, DEFAULT_PROJECT, more_bytes=10**12, more_uploads=10**6)


def test_no_more_jobs_are_queued_than_may_be(database: Database) -> None:
    first = seed_job(database)
    limit(database, queued_jobs=1)
    with pytest.raises(QuotaExceeded, match="1 queued jobs"):
        seed_job(database)
    held = claim(database, first)
    assert held is not None
    seed_job(database)  # there is room again
    with database.transaction() as session:
        store.request_cancel(session, first, project_id=DEFAULT_PROJECT)
        store.finish_job(session, held, JobState.CANCELLED)
    with pytest.raises(QuotaExceeded, match="1 queued jobs"):
        retry(database, first)
    limit(database, queued_jobs=None, bytes=100)
    add_upload(database, 100)
    for again in (lambda: seed_job(database), lambda: retry(database, first)):
        with pytest.raises(QuotaExceeded, match="100 bytes"):
            again()
    limit(database, bytes=None)
    retry(database, first)


def test_a_project_at_its_quota_waits_and_others_do_not(database: Database) -> None:
    mine = [seed_job(database) for _ in range(3)]
    with database.transaction() as session:
        other = access.add_project(session, name="other").id
    others = seed_job(database, project_id=other)
    limit(database, running_jobs=1)
    held = claim(database, mine[0])
    assert held is not None
    assert claim(database, mine[1]) is None
    with database.reading() as session:
        assert [job.id for job in store.queued_jobs(session)] == [others]
    assert claim(database, others) is not None
    with database.transaction() as session:
        store.finish_job(session, held, JobState.FAILED, error={})
    assert claim(database, mine[1]) is not None
    assert claim(database, mine[2]) is None
    limit(database, running_jobs=None)
    assert claim(database, mine[2]) is not None


def test_claims_at_once_do_not_exceed_the_quota(database: Database) -> None:
    jobs = [seed_job(database) for _ in range(6)]
    limit(database, running_jobs=2)
    start, claims = threading.Barrier(6), []

    def race(job_id: str) -> None:
        start.wait()
        claims.append(claim(database, job_id))

    racers = [threading.Thread(target=race, args=(job_id,)) for job_id in jobs]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len([each for each in claims if each is not None]) == 2


def test_quotas_by_hand(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    objects: ObjectStore,
) -> None:
    monkeypatch.setenv("WIDTHWISE_DATABASE_URL", database_url)
    monkeypatch.setenv("WIDTHWISE_DATA_DIR", str(tmp_path))
    get_settings.cache_clear()
    try:
        told = ["prj_default", "--bytes", "50GB", "--running-jobs", "2", "--uploads", "10"]
        assert set_quotas.main(told) == 0
        assert "bytes 0 of 50000000000  uploads 0 of 10" in capsys.readouterr().out
        assert set_quotas.main(["prj_default", "--uploads", "none"]) == 0
        assert "uploads 0 of any number  running_jobs 0 of 2" in capsys.readouterr().out
        assert set_quotas.main(["prj_absent", "--uploads", "1"]) == 1
        assert "no project 'prj_absent'" in capsys.readouterr().err
        for wrong in (["--bytes", "1"], ["prj_default", "--bytes", "much"],
                      ["prj_default", "--uploads", "9g"]):  # fmt: skip
            with pytest.raises(SystemExit):
                set_quotas.main(wrong)
    finally:
        get_settings.cache_clear()
    database = Database(database_url)
    with database.reading() as session:
        project = session.get_one(Project, DEFAULT_PROJECT)
        assert Quotas.of(project) == Quotas(bytes=50 * 10**9, running_jobs=2)
        (last, *_) = access.list_actions(session, project_id=DEFAULT_PROJECT)
        assert (last.action, last.key_id) == ("quotas.changed", None)
    database.close()
