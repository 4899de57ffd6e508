"""Deletion and retention, on SQLite and PostgreSQL: what is needed stays."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from jobs import access, blobs, deletion, quotas, store, webhooks
from jobs.access import Actor
from jobs.artifacts import ObjectStore
from jobs.db import Database, now
from jobs.errors import Conflict, Gone, NotFound, StaleRun
from jobs.records import DEFAULT_PROJECT, Artifact, Dataset, DeletedJob, Event, Job, Model, Run
from jobs.settings import Settings, get_settings
from jobs.states import DeliveryState, JobState
from tests.seeds import seed_job, stored_file
from worker.reconciler import reconcile

ACTOR = Actor(DEFAULT_PROJECT)


def job_of(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return session.get_one(Job, job_id)


def run(database: Database, objects: ObjectStore, job_id: str) -> str:
    """The job succeeds with one artifact; its id."""
    with database.transaction() as session:
        claim = store.claim_job(session, job_id, worker="w", lease_seconds=600, max_runs=3)
    assert claim is not None
    file = stored_file(objects, f"jobs/{job_id}/1/w1/a", job_id.encode())
    del file["name"]
    with database.transaction() as session:
        artifact = store.add_artifact(session, claim, path="w1/a", media_type="x/y", **file)
        store.finish_job(session, claim, JobState.SUCCEEDED, report={})
    return artifact.id


def delete_model(database: Database, model_id: str, actor: Actor = ACTOR) -> None:
    with database.transaction() as session:
        deletion.delete_model(session, actor, model_id)


def retry(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        store.retry_job(session, job_id, project_id=DEFAULT_PROJECT)


def age(database: Database, *, days: float) -> None:
    """Everything that is there was so long ago."""
    with database.transaction() as session:
        at = now(session) - timedelta(days=days)
        for record in (Model, Dataset, Job, Artifact):
            session.execute(update(record).values(created_at=at))
        session.execute(update(Job).where(Job.finished_at.is_not(None)).values(finished_at=at))


def collect(database: Database, objects: ObjectStore, tmp_path: Path, **settings: float) -> None:
    chosen = Settings(data_dir=tmp_path / "d", orphan_grace_seconds=0, **settings)  # type: ignore[arg-type]
    reconcile(chosen, database, objects, nudge=lambda job_id: None)


def test_what_a_job_needs_is_not_deleted(
    database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    job = job_of(database, seed_job(database, objects))
    for _ in ("queued", "running"):
        with pytest.raises(Conflict, match=job.id) as refused:
            delete_model(database, job.model_id)
        assert refused.value.code == "in-use"
        if job_of(database, job.id).state == JobState.QUEUED:
            with database.transaction() as session:
                claim = store.claim_job(session, job.id, worker="w", lease_seconds=600, max_runs=3)
    assert claim is not None
    assert objects.exists(claim.model_files[0]["key"])
    with database.transaction() as session:
        store.finish_job(session, claim, JobState.FAILED, error={})
    delete_model(database, job.model_id)
    with database.transaction() as session:
        with pytest.raises(Gone, match="was deleted on"):
            store.get_model(session, job.model_id, project_id=DEFAULT_PROJECT)
        with pytest.raises(NotFound):
            store.create_job(
                session, project_id=DEFAULT_PROJECT, name="j", model_id=job.model_id,
                dataset_id=job.dataset_id, spec={},
            )  # fmt: skip
        assert store.list_models(session, project_id=DEFAULT_PROJECT) == []
        assert len(store.list_datasets(session, project_id=DEFAULT_PROJECT)) == 1
    with pytest.raises(Gone):
        delete_model(database, job.model_id)
    with pytest.raises(Conflict, match="cannot run again") as refused:
        retry(database, job.id)
    assert refused.value.code == "input-deleted"
    assert job_of(database, job.id).state == JobState.FAILED
    collect(database, objects, tmp_path)
    assert not objects.exists(claim.model_files[0]["key"])
    assert objects.exists(claim.dataset_files[0]["key"])


def test_a_profile_goes_once_no_job_needs_it(database: Database) -> None:
    spec = {"constraints": {"latency_on": "later"}}
    job_id = seed_job(database, spec=spec, profile={"tables": []})
    with database.transaction() as session:
        job = session.get_one(Job, job_id)
        profile_id = str(job.profile_id)
        job.spec = {"constraints": {"latency_on": profile_id}}
        other = Actor(access.add_project(session, name="other").id)

    def delete(actor: Actor = ACTOR) -> None:
        with database.transaction() as session:
            deletion.delete_profile(session, actor, profile_id)

    with pytest.raises(NotFound):
        delete(other)
    for _ in range(2):  # while it is queued, and while it runs
        with pytest.raises(Conflict, match=job_id) as refused:
            delete()
        assert refused.value.code == "in-use"
        with database.transaction() as session:
            claim = store.claim_job(session, job_id, worker="w", lease_seconds=600, max_runs=3)
        if claim is not None:
            running = claim
    assert running.profile == {"tables": []}
    with database.transaction() as session:
        store.finish_job(session, running, JobState.FAILED, error={})
    delete()
    with pytest.raises(NotFound):
        delete()
    with database.reading() as session:
        assert store.list_profiles(session, project_id=DEFAULT_PROJECT) == []
        (entry,) = access.list_actions(session, project_id=DEFAULT_PROJECT)
        assert (entry.action, entry.target) == ("profile.deleted", profile_id)
    with pytest.raises(Conflict, match=profile_id) as refused:
        retry(database, job_id)
    assert refused.value.code == "input-deleted"
    assert job_of(database, job_id).state == JobState.FAILED


@pytest.mark.parametrize("how", ["created", "retried"])
def test_a_job_that_is_being_queued_wins_or_loses_against_the_deletion_of_its_profile(
    database: Database, how: str
) -> None:
    for _ in range(10):
        job = job_of(database, seed_job(database, profile={"tables": []}))
        profile_id = str(job.profile_id)
        spec = {"constraints": {"latency_on": profile_id}}
        with database.transaction() as session:
            session.get_one(Job, job.id).spec = spec
            store.request_cancel(session, job.id, project_id=DEFAULT_PROJECT)
        start = threading.Barrier(2)

        def queue(
            job: Job = job,
            spec: dict[str, dict[str, str]] = spec,
            start: threading.Barrier = start,
        ) -> None:
            start.wait()
            try:
                if how == "retried":
                    retry(database, job.id)
                    return
                with database.transaction() as session:
                    store.create_job(
                        session, project_id=DEFAULT_PROJECT, name="j", model_id=job.model_id,
                        dataset_id=job.dataset_id, spec=spec,
                        profile_id=spec["constraints"]["latency_on"],
                    )  # fmt: skip
            except (NotFound, Conflict):
                return

        thread = threading.Thread(target=queue)
        thread.start()
        start.wait()
        try:
            with database.transaction() as session:
                deletion.delete_profile(session, ACTOR, profile_id)
            deleted = True
        except Conflict:
            deleted = False
        thread.join()
        with database.reading() as session:
            queued = session.query(Job).filter_by(model_id=job.model_id, state="queued").all()
            assert len(queued) == (0 if deleted else 1)
            assert {each.profile_id for each in queued} <= {profile_id}


def test_a_profile_that_goes_while_it_is_read_is_read_whole(database: Database) -> None:
    profile_id = str(job_of(database, seed_job(database, profile={"tables": []})).profile_id)
    with database.transaction() as session:
        session.execute(update(Job).values(state=JobState.CANCELLED))
    deleted: list[str] = []

    def delete_meanwhile(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "FROM profiles" in statement and not deleted:
            deleted.append(statement)
            with database.transaction() as session:
                deletion.delete_profile(session, ACTOR, profile_id)

    event.listen(database.engine, "after_cursor_execute", delete_meanwhile)
    with database.reading() as session:
        found = store.get_profile(session, profile_id, project_id=DEFAULT_PROJECT)
    assert deleted
    assert found.content == {"tables": []}
    with pytest.raises(NotFound), database.reading() as session:
        store.get_profile(session, profile_id, project_id=DEFAULT_PROJECT)


def delete_job(database: Database, job_id: str, actor: Actor = ACTOR) -> None:
    with database.transaction() as session:
        deletion.delete_job(session, actor, job_id)


def test_a_job_goes_with_all_that_is_its_own(
    database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    job = job_of(database, seed_job(database, objects))
    with pytest.raises(Conflict, match="is queued: cancel it first") as refused:
        delete_job(database, job.id)
    assert refused.value.code == "job-not-finished"
    with database.transaction() as session:
        other = Actor(access.add_project(session, name="other").id)
        same = store.create_job(
            session, project_id=DEFAULT_PROJECT, name="j", model_id=job.model_id,
            dataset_id=job.dataset_id, spec={},
        )  # fmt: skip
    artifact_id, same_artifact = run(database, objects, job.id), run(database, objects, same.id)
    with database.transaction() as session:
        # As of a run before, which came to nothing and was not swept yet.
        stored_file(objects, f"jobs/{job.id}/0/w1/orphan", b"orphan")
        beside = stored_file(objects, f"jobs/{job.id}x/1/w1/a", b"another job's")["key"]
        file = stored_file(objects, f"jobs/{job.id}/1/checkpoints/c", b"checkpoint")
        session.get_one(Job, job.id).checkpoints = [
            {**file, "stage": "distil", "step": 1, "stored_at": now(session).isoformat()}
        ]
        before = quotas.usage(session, DEFAULT_PROJECT).bytes
        size = store.get_artifact(session, artifact_id, project_id=DEFAULT_PROJECT).size_bytes
    with pytest.raises(NotFound):
        delete_job(database, job.id, other)
    delete_job(database, job.id)
    with pytest.raises(NotFound):
        delete_job(database, job.id)
    with pytest.raises(NotFound):
        retry(database, job.id)
    with database.reading() as session:
        assert quotas.usage(session, DEFAULT_PROJECT).bytes == before - size > 0
        for look in (store.get_job, store.get_report, store.list_events, store.list_artifacts):
            with pytest.raises(NotFound):
                look(session, job.id, project_id=DEFAULT_PROJECT)
        with pytest.raises(NotFound):
            store.get_artifact(session, artifact_id, project_id=DEFAULT_PROJECT)
        listed = store.list_jobs(session, project_id=DEFAULT_PROJECT)
        assert [each.id for each in listed] == [same.id]
        for record in (Artifact, Event, Run):
            assert session.query(record).filter_by(job_id=job.id).all() == []
        entry = access.list_actions(session, project_id=DEFAULT_PROJECT)[0]
        assert (entry.action, entry.target) == ("job.deleted", job.id)

    # A download under way has as long as that of an artifact that was deleted.
    reconcile(Settings(data_dir=tmp_path / "d"), database, objects, nudge=lambda job_id: None)
    assert len(objects.keys(f"jobs/{job.id}/")) == 3
    collect(database, objects, tmp_path)
    assert objects.keys(f"jobs/{job.id}/") == []
    assert objects.exists(beside)
    with database.reading() as session:
        assert session.query(DeletedJob).all() == []
        kept = store.get_artifact(session, same_artifact, project_id=DEFAULT_PROJECT)
        model = store.get_model(session, job.model_id, project_id=DEFAULT_PROJECT)
        dataset = store.get_dataset(session, job.dataset_id, project_id=DEFAULT_PROJECT)
        assert store.get_report(session, same.id, project_id=DEFAULT_PROJECT) == {}
    for key in (kept.key, *(file["key"] for file in (*model.files, *dataset.files))):
        assert objects.exists(key)


def test_what_is_still_on_its_way_for_a_deleted_job_does_nothing(
    database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    job_id = seed_job(database, objects)
    with database.transaction() as session:
        stale = store.claim_job(session, job_id, worker="w", lease_seconds=0.001, max_runs=3)
    assert stale is not None
    time.sleep(0.02)
    with database.transaction() as session:  # its worker went silent
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
    delete_job(database, job_id)
    with database.transaction() as session:
        assert store.claim_job(session, job_id, worker="w", lease_seconds=9, max_runs=3) is None
        assert store.settle_expired(session, job_id, max_runs=3) is None
        store.route_job(session, job_id)
        store.mark_swept(session, stale.run_id)
        store.forget_checkpoints(session, job_id, ["k"])
        assert store.checkpoint_keys(session, job_id) == []
    for write in (
        lambda s: store.append_events(s, stale, [("progress", {})]),
        lambda s: store.renew_lease(s, stale, lease_seconds=9),
        lambda s: store.finish_job(s, stale, JobState.FAILED, error={}),
    ):
        with pytest.raises(StaleRun), database.transaction() as session:
            write(session)
    collect(database, objects, tmp_path)
    # It was on its way to the store meanwhile, and then noticed.
    stored_file(objects, f"jobs/{job_id}/1/w1/a", b"late")
    with database.transaction() as session:
        store.sweep_again(session, stale)
    collect(database, objects, tmp_path)
    assert objects.keys(f"jobs/{job_id}/") == []


def test_a_job_that_is_swept_while_a_run_of_it_wakes_is_swept_again(database: Database) -> None:
    job_id = seed_job(database)
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
    delete_job(database, job_id)
    with database.reading() as session:
        (swept,) = store.unswept_deleted_jobs(session, grace_seconds=0)

    def forget() -> None:
        with database.transaction() as session:
            store.forget_deleted_job(session, swept)

    sweeper = threading.Thread(target=forget)
    time.sleep(0.01)  # SQLite's clock tells milliseconds

    def forget_meanwhile(*_: Any) -> None:
        if sweeper.ident is None:
            sweeper.start()
            sweeper.join(0.2)  # it waits for this transaction, or is too quick for it

    with database.transaction() as session:
        event.listen(session, "before_flush", forget_meanwhile)
        store.sweep_deleted_job(session, job_id, project_id=DEFAULT_PROJECT)
    sweeper.join()
    with database.reading() as session:
        (found,) = store.unswept_deleted_jobs(session, grace_seconds=0)
    assert found.deleted_at > swept.deleted_at


def test_what_a_webhook_was_to_be_told_of_a_deleted_job_ends(database: Database) -> None:
    job_id = seed_job(database)
    with database.transaction() as session:
        webhook_id = webhooks.add_webhook(
            session, project_id=DEFAULT_PROJECT, url="https://203.0.114.7/",
            events=webhooks.JOB_ENDS, secret="whsec_c2VjcmV0",
        ).id  # fmt: skip
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
    delete_job(database, job_id)
    for _ in range(2):
        with database.transaction() as session:
            assert webhooks.claim_delivery(session) is None
            (sent,) = webhooks.list_deliveries(session, webhook_id, project_id=DEFAULT_PROJECT)
            assert (sent.state, sent.job_id) == (DeliveryState.FAILED, job_id)
        with database.transaction() as session:
            webhooks.redeliver(session, webhook_id, sent.id, project_id=DEFAULT_PROJECT)


def test_a_job_is_retried_or_deleted_and_never_both(database: Database) -> None:
    for _ in range(10):
        job_id = seed_job(database)
        with database.transaction() as session:
            store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
        start = threading.Barrier(2)

        def again(job_id: str = job_id, start: threading.Barrier = start) -> None:
            start.wait()
            with suppress(NotFound):
                retry(database, job_id)

        thread = threading.Thread(target=again)
        thread.start()
        start.wait()
        try:
            delete_job(database, job_id)
            deleted = True
        except Conflict:
            deleted = False
        thread.join()
        with database.reading() as session:
            left = session.query(Job).filter_by(id=job_id).all()
        assert [job.state for job in left] == ([] if deleted else [JobState.QUEUED])


def test_another_projects_is_not_there(database: Database, objects: ObjectStore) -> None:
    job = job_of(database, seed_job(database, objects))
    with database.transaction() as session:
        other = Actor(access.add_project(session, name="other").id)
    with pytest.raises(NotFound):
        delete_model(database, job.model_id, other)


def test_shared_bytes_go_with_their_last_owner(
    database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    with database.transaction() as session:
        wanted = blobs.want(session, DEFAULT_PROJECT, [(64 * "a", 5)])
    file = stored_file(objects, wanted[0].key, b"bytes")
    for id in ("mdl_1", "mdl_2"):
        with database.transaction() as session:
            blobs.use(session, DEFAULT_PROJECT, id, wanted)
            store.add_model(session, id=id, project_id=DEFAULT_PROJECT, name="m", size_bytes=5,
                            uploads=[], files=[file], info={})  # fmt: skip
    delete_model(database, "mdl_1")
    collect(database, objects, tmp_path)
    assert objects.exists(wanted[0].key)
    delete_model(database, "mdl_2")
    collect(database, objects, tmp_path)
    assert not objects.exists(wanted[0].key)


def test_an_artifact_goes_and_its_job_stays(
    database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    job_id = seed_job(database, objects)
    artifact_id = run(database, objects, job_id)
    with database.transaction() as session:
        deletion.delete_artifact(session, ACTOR, artifact_id)
    with database.reading() as session:
        with pytest.raises(Gone):
            store.get_artifact(session, artifact_id, project_id=DEFAULT_PROJECT)
        assert store.list_artifacts(session, job_id, project_id=DEFAULT_PROJECT) == []
        assert store.get_report(session, job_id, project_id=DEFAULT_PROJECT) == {}
    collect(database, objects, tmp_path)
    assert objects.keys(f"jobs/{job_id}/") == []


def test_retention_ends_for_what_is_old_and_idle(
    database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    ended, waiting = seed_job(database, objects), seed_job(database, objects)
    artifact_id = run(database, objects, ended)
    age(database, days=10)
    young = seed_job(database, objects)
    young_artifact = run(database, objects, young)
    with database.reading() as session:
        listed = deletion.past_retention(session, days=9)
        assert deletion.past_retention(session, days=11) == []
        assert deletion.past_retention(session, days=9, project_id="prj_other") == []
    old = job_of(database, ended)
    assert {each.id for each in listed} == {artifact_id, old.model_id, old.dataset_id}
    assert {each.kind for each in listed} == {"artifact", "model", "dataset"}
    assert all(each.size_bytes > 0 for each in listed)

    collect(database, objects, tmp_path)  # no period is set
    assert objects.keys(f"jobs/{ended}/") != []
    collect(database, objects, tmp_path, retention_days=9)
    assert objects.keys(f"jobs/{ended}/") == []
    assert objects.keys(f"models/{old.model_id}/") == []
    for job_id in (waiting, young):
        job = job_of(database, job_id)
        assert objects.keys(f"models/{job.model_id}/") != []
        assert objects.keys(f"datasets/{job.dataset_id}/") != []
    with database.reading() as session:
        store.get_artifact(session, young_artifact, project_id=DEFAULT_PROJECT)
        entries = access.list_actions(session, project_id=DEFAULT_PROJECT)
    assert {entry.action for entry in entries} == {
        "artifact.deleted", "model.deleted", "dataset.deleted",
    }  # fmt: skip


def test_retention_by_hand_lists_before_it_deletes(
    database: Database,
    database_url: str,
    objects: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact_id = run(database, objects, seed_job(database, objects))
    age(database, days=10)
    monkeypatch.setenv("WIDTHWISE_DATABASE_URL", database_url)
    get_settings.cache_clear()
    try:
        with pytest.raises(SystemExit):
            deletion.main([])  # no period is set
        for arguments, word in (([], "would be deleted"), (["--delete"], "deleted")):
            assert deletion.main(["--days", "9", *arguments]) == 0
            told = capsys.readouterr()
            assert f"3 {word}, " in told.err
            assert artifact_id in told.out
        assert deletion.main(["--days", "9"]) == 0
        assert "0 would be deleted" in capsys.readouterr().err
        assert deletion.main(["--days", "9", "--project", "prj_absent"]) == 1
    finally:
        get_settings.cache_clear()


@pytest.mark.parametrize("how", ["created", "retried"])
def test_a_job_that_is_being_queued_wins_or_loses_against_a_deletion(
    database: Database, how: str
) -> None:
    """Many times at once: never a queued job with a deleted model."""
    for _ in range(10):
        job = job_of(database, seed_job(database))
        with database.transaction() as session:
            store.request_cancel(session, job.id, project_id=DEFAULT_PROJECT)
        start = threading.Barrier(2)

        def queue(job: Job = job, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                if how == "retried":
                    retry(database, job.id)
                    return
                with database.transaction() as session:
                    store.create_job(
                        session, project_id=DEFAULT_PROJECT, name="j", model_id=job.model_id,
                        dataset_id=job.dataset_id, spec={},
                    )  # fmt: skip
            except (NotFound, Conflict):
                return

        thread = threading.Thread(target=queue)
        thread.start()
        start.wait()
        try:
            delete_model(database, job.model_id)
            deleted = True
        except Conflict:
            deleted = False
        thread.join()
        with database.reading() as session:
            queued = session.query(Job).filter_by(model_id=job.model_id, state="queued").count()
        assert queued == (0 if deleted else 1)
