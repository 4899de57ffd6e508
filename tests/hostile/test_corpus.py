"""Every hostile file, uploaded through a running API into a real sandbox.

Each is refused with the problem type that it is listed with, within bounds on the child's
processor time and memory, executes nothing and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jobs import store
from jobs.records import DEFAULT_PROJECT
from jobs.sandbox import Usage
from tests.api.conftest import Service, assert_problem
from tests.hostile.archives import ARCHIVES
from tests.hostile.conftest import SECRET, everything
from tests.hostile.corpus import Corpus, Files, Hostile, Place
from tests.hostile.documents import DOCUMENTS
from tests.hostile.pickles import PICKLES
from tests.hostile.tables import TABLES
from tests.hostile.tokenizers import TOKENIZERS
from tests.hostile.weights import WEIGHTS

# What the child of any of them may take, its imports (a second, 100 MB) included.
CPU_SECONDS = 12.0
PEAK_BYTES = 1_200 * 10**6

CORPORA: dict[str, Corpus] = {
    "pickles": PICKLES,
    "archives": ARCHIVES,
    "weights": WEIGHTS,
    "documents": DOCUMENTS,
    "tables": TABLES,
    "tokenizers": TOKENIZERS,
}
CORPUS: dict[str, Hostile] = {
    f"{group}: {name}": hostile
    for group, corpus in CORPORA.items()
    for name, hostile in corpus.items()
}


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(CORPUS) == sum(len(corpus) for corpus in CORPORA.values())
    assert len(CORPUS) >= 80
    assert all(len(corpus) >= 20 for corpus in CORPORA.values())


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_is_refused_runs_nothing_and_leaves_nothing(
    name: str,
    service: Service,
    usages: list[Usage],
    listener: socket.socket,
    temporary: Path,
    tmp_path: Path,
) -> None:
    hostile = CORPUS[name]
    place = Place(tmp_path, tmp_path / "canary", listener.getsockname()[1])
    files = hostile.files(place)
    if hostile.bites is not None:
        _show_that_it_bites(hostile.bites(place), place, listener)
    before, environment = everything(service, temporary), dict(os.environ)
    del usages[:]

    answer = _upload(service, hostile.kind, files)

    assert_problem(answer, 422, hostile.type)
    assert everything(service, temporary) == before
    assert not place.canary.exists()
    assert not _knocked(listener)
    assert dict(os.environ) == environment
    assert SECRET not in answer.text
    assert "/spool/" not in answer.text
    assert len(answer.content) < 100_000
    (usage,) = usages
    assert usage.cpu_seconds < CPU_SECONDS
    assert usage.peak_bytes < PEAK_BYTES


def _upload(service: Service, kind: str, files: Files) -> httpx.Response:
    if len(files) > 1:
        parts = [
            ("file", (name, content if isinstance(content, bytes) else b"".join(content())))
            for name, content in files.items()
        ]
        return service.client.post(f"/v1/{kind}", files=parts)
    ((name, content),) = files.items()
    body = content if isinstance(content, bytes) else content()
    return service.client.post(f"/v1/{kind}", params={"filename": name}, content=body)


def _show_that_it_bites(raw: bytes, place: Place, listener: socket.socket) -> None:
    """The control: loaded without a guard, the pickle does what it is made for."""
    with contextlib.suppress(Exception):  # what it leaves on the stack may be nothing
        pickle.loads(raw)
    assert place.canary.exists()
    assert _knocked(listener)
    place.canary.unlink()


def _knocked(listener: socket.socket) -> bool:
    return bool(list(_accepted(listener)))


def _accepted(listener: socket.socket) -> Iterator[str]:
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, address = listener.accept()
            connection.close()
            yield str(address)


def test_cells_that_a_spreadsheet_would_run_are_kept_as_they_are(
    service: Service, tmp_path: Path
) -> None:
    cells = ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-5"]
    rows = [f"{cell},{number % 2}" for number, cell in enumerate(cells)]
    content = "\n".join(["text,label", *rows, ""]).encode()
    answer = _upload(service, "datasets", {"train.csv": content})
    assert answer.status_code == 201, answer.text
    with service.services.database.reading() as session:
        dataset = store.get_dataset(session, answer.json()["id"], project_id=DEFAULT_PROJECT)
    (file,) = dataset.files
    service.services.store.get_to_file(file["key"], tmp_path / "stored", sha256=file["sha256"])
    stored = [json.loads(line) for line in (tmp_path / "stored").read_text().splitlines()]
    assert [row["text"] for row in stored] == cells


def test_every_type_is_documented() -> None:
    told = (Path(__file__).resolve().parents[2] / "docs/hostile-input.md").read_text()
    assert {hostile.type for hostile in CORPUS.values()} <= set(re.findall(r"`([a-z0-9-]+)`", told))
