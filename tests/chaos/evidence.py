"""What a run leaves behind: rows of the database and files of the store, as they are.

Read by SQL and from the folder itself, not through the code that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from tests.chaos.plan import Kind

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Injected:
    """A fault that took place. `started` and `ended` are seconds since 1970, by the clock of this
    machine, which is also the database's; `worker` is the process id of the one that was hit."""

    kind: Kind
    started: float
    ended: float
    worker: int | None = None


@dataclass(frozen=True)
class Answer:
    """What the API said that was not what the user hoped for."""

    asked: float
    at: float
    status: int
    request: str


@dataclass(frozen=True)
class Death:
    """A process that ended though nobody told it to."""

    at: float
    process: str
    status: int
    last_words: str


@dataclass(frozen=True)
class Event:
    number: int
    fence: int
    kind: str
    data: Mapping[str, Any]
    at: float


@dataclass(frozen=True)
class Run:
    fence: int
    worker: str
    state: str
    started: float
    ended: float | None


@dataclass(frozen=True)
class File:
    """An object that a record names: `owner` is the record's id, `fence` that of an artifact's run,
    `path` what users call an artifact."""

    owner: str
    key: str
    size_bytes: int
    sha256: str
    fence: int | None = None
    path: str | None = None


@dataclass(frozen=True)
class Job:
    """`alike`: of jobs that have the same model, dataset and spec."""

    id: str
    state: str
    fence: int
    last_event: int
    alike: str
    report: Mapping[str, Any] | None
    events: Sequence[Event]
    runs: Sequence[Run]
    artifacts: Sequence[File]


@dataclass(frozen=True)
class Stored:
    """A file below the store's folder. `bundle`: of a bundle, what its manifest says of its files
    and what they are, (path, digest) each; None where that cannot be read."""

    size_bytes: int
    sha256: str
    manifest: frozenset[tuple[str, str]] | None = None
    content: frozenset[tuple[str, str]] | None = None


@dataclass(frozen=True)
class Evidence:
    """`asked`: ids of the jobs that the user was told of. `inputs`: files of models and datasets;
    `checkpoints`: those that jobs still name; `pending`: keys of blobs that no upload uses yet.
    `left`: files of runs in progress on the workers' own disks."""

    asked: Sequence[str]
    jobs: Sequence[Job]
    inputs: Sequence[File]
    checkpoints: Sequence[File]
    pending: Sequence[str]
    stored: Mapping[str, Stored]
    injected: Sequence[Injected] = ()
    answers: Sequence[Answer] = ()
    deaths: Sequence[Death] = ()
    left: Sequence[str] = ()


def read_evidence(address: str, store: Path, **told: Any) -> Evidence:
    """`address`: of the database, as psycopg takes it. `told`: the fields that neither holds."""
    with psycopg.connect(address, row_factory=dict_row) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

        def rows(query: str) -> list[dict[str, Any]]:
            return connection.execute(query.encode()).fetchall()

        def by_job(query: str) -> defaultdict[str, list[dict[str, Any]]]:
            found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
            for row in rows(query):
                found[row["job_id"]].append(row)
            return found

        jobs = rows("SELECT * FROM jobs ORDER BY created_at, id")
        events = by_job("SELECT * FROM events ORDER BY job_id, number")
        runs = by_job("SELECT * FROM runs ORDER BY job_id, fence")
        artifacts = by_job("SELECT * FROM artifacts WHERE deleted_at IS NULL ORDER BY job_id, key")
        owners = rows(
            "SELECT id, files FROM models WHERE deleted_at IS NULL"
            " UNION ALL SELECT id, files FROM datasets WHERE deleted_at IS NULL"
        )
        blobs = rows("SELECT key FROM blobs")
    inputs = [_file(owner["id"], each) for owner in owners for each in owner["files"]]
    used = {each.key for each in inputs}
    return Evidence(
        jobs=[
            Job(
                id=job["id"],
                state=job["state"],
                fence=job["fence"],
                last_event=job["last_event"],
                alike=json.dumps([job["model_id"], job["dataset_id"], job["spec"]], sort_keys=True),
                report=job["report"],
                events=[
                    Event(each["number"], each["fence"], each["kind"], each["data"], _at(each))
                    for each in events[job["id"]]
                ],
                runs=[
                    Run(
                        each["fence"],
                        each["worker"],
                        each["state"],
                        each["started_at"].timestamp(),
                        _seconds(each["ended_at"]),
                    )
                    for each in runs[job["id"]]
                ],
                artifacts=[
                    _file(each["id"], each, fence=each["fence"], path=each["path"])
                    for each in artifacts[job["id"]]
                ],
            )
            for job in jobs
        ],
        inputs=inputs,
        checkpoints=[_file(job["id"], each) for job in jobs for each in job["checkpoints"] or ()],
        pending=[each["key"] for each in blobs if each["key"] not in used],
        stored=read_store(store),
        **told,
    )


def read_store(folder: Path) -> dict[str, Stored]:
    """Every file below the folder, also those that the store itself would not list."""
    found = {}
    # A reconciler may delete files and folders meanwhile: `walk` passes over those that are gone.
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with suppress(FileNotFoundError):
                found[path.relative_to(folder).as_posix()] = _stored(path)
    return found


def _stored(path: Path) -> Stored:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size_bytes = path.stat().st_size
    if not path.name.endswith(".tar.gz"):
        return Stored(size_bytes, sha256)
    try:
        manifest, content = _read_bundle(path)
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError, TypeError):
        return Stored(size_bytes, sha256)
    return Stored(size_bytes, sha256, manifest, content)


def _read_bundle(path: Path) -> tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str]]]:
    """What its manifest says, and what is in it beside the manifest."""
    files = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                files[member.name.partition("/")[2]] = content.read()
    told = json.loads(files.pop(MANIFEST))["files"]
    return (
        frozenset((each["path"], each["sha256"]) for each in told),
        frozenset((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()),
    )


def _file(owner: str, named: Mapping[str, Any], **more: Any) -> File:
    return File(owner, named["key"], named["size_bytes"], named["sha256"], **more)


def _at(row: Mapping[str, Any]) -> float:
    at: datetime = row["created_at"]
    return at.timestamp()


def _seconds(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()
