"""Records to start a test from."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import store
from jobs.artifacts import ObjectStore, dataset_key, model_key
from jobs.db import Database
from jobs.records import DEFAULT_PROJECT, new_id


def stored_file(objects: ObjectStore, key: str, content: bytes) -> dict[str, Any]:
    """Puts an object; its line in the `files` of a model or dataset."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        objects.put_file(key, Path(file.name))
    return {
        "name": key.rpartition("/")[2],
        "key": key,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def seed_job(
    database: Database,
    objects: ObjectStore | None = None,
    *,
    spec: Mapping[str, Any] | None = None,
    project_id: str = DEFAULT_PROJECT,
    model: Path | None = None,
    dataset: Path | None = None,
    profile: Mapping[str, Any] | None = None,
    **details: Any,
) -> str:
    """A queued job with a model and a dataset of its own; with `objects`, their files too: those
    of the folders `model` and `dataset`, or one that holds nothing. `profile`: a device's.
    `details` as of store.create_job."""
    model_id, dataset_id = new_id("model"), new_id("dataset")
    model_files, dataset_files = [], []
    if objects is not None:
        contents = {"config.json": b"{}"} if model is None else _contents(model)
        rows = {"train.jsonl": b"[]"} if dataset is None else _contents(dataset)
        model_files = [
            stored_file(objects, model_key(model_id, name), content)
            for name, content in contents.items()
        ]
        dataset_files = [
            stored_file(objects, dataset_key(dataset_id, name), content)
            for name, content in rows.items()
        ]
    with database.transaction() as session:
        store.add_model(
            session,
            id=model_id,
            project_id=project_id,
            name="model",
            size_bytes=2,
            uploads=[],
            files=model_files,
            info={},
        )
        store.add_dataset(
            session,
            id=dataset_id,
            project_id=project_id,
            name="dataset",
            size_bytes=2,
            uploads=[],
            files=dataset_files,
            profile={},
        )
        stored = profile and store.add_profile(
            session,
            project_id=project_id,
            name="profile",
            sha256="0" * 64,
            summary={},
            content=profile,
        )
        job = store.create_job(
            session,
            project_id=project_id,
            name="job",
            model_id=model_id,
            dataset_id=dataset_id,
            spec=spec or {},
            profile_id=stored.id if stored else None,
            **details,
        )
    return job.id
