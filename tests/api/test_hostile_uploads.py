"""What bad input gets over REST: a clear problem, at upload, and nothing stored."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import Service, archive
from tests.builders import tiny_bert

Parts = list[tuple[str, tuple[str, bytes]]]


def form(folder: Path, **changes: bytes | None) -> Parts:
    """The single files of a model folder; `config_json=...` changes one, None leaves it out."""
    changed = {name.replace("_json", ".json"): content for name, content in changes.items()}
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files |= {name: content for name, content in changed.items() if content is not None}
    return [
        ("file", (name, content))
        for name, content in files.items()
        if changed.get(name, b"") is not None
    ]


def one(name: str, content: bytes) -> Parts:
    return [("file", (name, content))]


def zip_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(name, content)
    return buffer.getvalue()


def tar_with(member: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(member)
    return buffer.getvalue()


def link(target: str) -> bytes:
    member = tarfile.TarInfo("model/config.json")
    member.type, member.linkname = tarfile.SYMTYPE, target
    return tar_with(member)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def lying_header(folder: Path) -> bytes:
    """A safetensors file whose header promises more bytes than there are."""
    content = weights(folder)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["classifier.weight"]["data_offsets"] = [0, 2**40]
    told = json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + content[8 + length :]


def wider_config(folder: Path) -> bytes:
    config = json.loads((folder / "config.json").read_text())
    return json.dumps(config | {"intermediate_size": 128}).encode()


MODELS: dict[str, Callable[[Path], Parts]] = {
    "a zip that leaves its folder": lambda _: one("m.zip", zip_of("../../evil.json", b"{}")),
    "a zip with an absolute path": lambda _: one("m.zip", zip_of("/tmp/evil.json", b"{}")),
    "a thousandfold zip": lambda _: one("m.zip", zip_of("config.json", bytes(50_000_000))),
    "a tar with a link": lambda _: one("m.tar.gz", link("/etc/passwd")),
    "a tar that is none": lambda _: one("m.tar.gz", b"not an archive"),
    "an archive cut short": lambda folder: one("m.tar.gz", archive(folder)[:-1000]),
    "no weights": lambda folder: form(folder)[:1],
    "a header that lies": lambda folder: [
        *[part for part in form(folder) if part[1][0] != "model.safetensors"],
        ("file", ("model.safetensors", lying_header(folder))),
    ],
    "weights that do not fit": lambda folder: form(folder, config_json=wider_config(folder)),
    "a config that is no JSON": lambda folder: form(folder, config_json=b"{"),
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
def test_a_bad_model_is_refused_and_nothing_is_kept(
    service: Service, tmp_path: Path, what: str
) -> None:
    before = service.kept()
    parts = MODELS[what](tiny_bert(tmp_path / "model"))
    answer = service.client.post("/v1/models", files=parts)
    assert_refused(answer)
    assert service.kept() == before


def test_a_hostile_pickle_is_refused_and_has_run_nothing(service: Service, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {ran}",)

    folder = tiny_bert(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model_state.pdparams").write_bytes(pickle.dumps({"weight": Payload()}))
    before = service.kept()
    assert_refused(service.client.post("/v1/models", files=form(folder)))
    assert service.kept() == before
    assert not ran.exists()


DATASETS: dict[str, tuple[Parts, list[int]]] = {
    "no train": (one("dev.csv", b"text,label\na,0\nb,1\n"), []),
    "no labels": (one("train.csv", b"text\none thing\nanother\nand more\n"), []),
    "one class": (one("train.csv", b"text,label\na,1\nb,1\nc,1\n"), []),
    "an empty split": (
        [*one("train.csv", b"text,label\na,0\nb,1\nc,1\n"), *one("dev.csv", b"text,label\n")],
        [],
    ),
    "a broken row": (one("train.csv", b"text,label\na,0\nb,1,x\nc,1\n"), [3]),
    "Latin-1": (one("train.csv", "text,label\na,0\ncaf\u00e9,1\nc,1\n".encode("latin-1")), [3]),
    "broken JSON": (one("train.jsonl", b'{"text": "a", "label": 0}\n{"text": \n'), [2]),
    "a header that repeats": (one("train.csv", b"text,text\na,0\nb,1\n"), []),
    "no table": (one("picture.png", b"\x89PNG"), []),
}


@pytest.mark.parametrize("what", DATASETS)
def test_a_bad_dataset_is_refused_and_nothing_is_kept(service: Service, what: str) -> None:
    before = service.kept()
    parts, lines = DATASETS[what]
    answer = service.client.post("/v1/datasets", files=parts)
    problem = assert_refused(answer)
    assert set(lines) <= {row["line"] for row in problem.get("rows", [])}
    assert service.kept() == before


def test_other_requests_go_on_while_uploads_are_inspected(service: Service, tmp_path: Path) -> None:
    content = archive(tiny_bert(tmp_path / "model"))
    done: list[int] = []

    def upload() -> None:
        headers = {"Authorization": f"Bearer {service.key}"}
        with httpx.Client(headers=headers, timeout=60, trust_env=False) as client:
            answer = client.post(f"{service.url}/v1/models?filename=m.tar.gz", content=content)
        done.append(answer.status_code)

    threads = [threading.Thread(target=upload) for _ in range(6)]
    for thread in threads:
        thread.start()
    answered_meanwhile = 0
    while not done:
        assert service.client.get("/v1/jobs").status_code == 200
        answered_meanwhile += not done
    for thread in threads:
        thread.join(60)
    assert done == [201] * 6
    assert answered_meanwhile > 0


def assert_refused(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"].startswith("urn:widthwise:problem:")
    assert problem["type"] != "urn:widthwise:problem:inspection-failed"  # it says what is wrong
    assert problem["detail"]
    assert "/spool/" not in answer.text
    return dict(problem)
