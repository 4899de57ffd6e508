"""The manifest of a bundle: what it is, what made it, and each file's digest. Paddle-free.

`manifest.schema.json` beside this file is its JSON Schema, and travels in every bundle. A test
holds it equal to the model below; `python -m compression schema > compression/manifest.schema.json`
writes it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from compression.report import (
    ComparisonOnTest,
    FileReport,
    FormatReport,
    Intervals,
    VocabularyReport,
)
from compression.spec import Format, Frozen
from compression.vocabulary import MAP_FILE

VERSION = 2
MANIFEST = "manifest.json"
SIGNATURE = "signature.json"
SCHEMA = Path(__file__).with_name("manifest.schema.json")
SHA256 = r"^[0-9a-f]{64}$"


class Tensor(Frozen):
    """An input or the output. Names in `shape` are open axes."""

    name: str
    dtype: Literal["int64", "float32"]
    shape: tuple[str | int, ...]


class ManifestTask(Frozen):
    """What predict.py must know. Labels are in the order of the outputs."""

    kind: str
    text: str = Field(description="The dataset's column of the (first) text.")
    text_pair: str | None
    labels: tuple[str, ...]
    max_seq_len: int
    pad_token_id: int
    overlap: int | None = Field(
        None, description="Tokens that windows of a context share; of question answering alone."
    )
    max_answer_length: int | None = Field(None, description="Tokens; of question answering alone.")


class ManifestFormat(FormatReport):
    """One published format, as the job's report has it."""

    run_with: Mapping[str, Any] = Field({}, description="The runtime and its options.")


class Figures(Frozen):
    """The main metric on both splits; null where it was not measured."""

    dev: float | None
    test: float | None


class AllMetrics(Frozen):
    """Every metric of the task by name."""

    teacher: Mapping[str, float]
    subnetwork: Mapping[str, float]


class ManifestMetrics(Frozen):
    metric: str = Field(description="The main metric, which the accuracy drop is measured in.")
    teacher: Figures
    subnetwork: Figures
    all_on_dev: AllMetrics
    accuracy_drop_points: float
    accuracy_drop_intervals: Intervals = Field(
        (), description="Of these points, over dev's rows; none in bundles that predate them."
    )
    on_test: ComparisonOnTest | None = Field(
        None,
        description="The chosen sub-network's drop on test with its intervals; null of all others.",
    )
    parameters: int
    teacher_parameters: int
    flops: int


class ManifestSubnetwork(Frozen):
    """Heads and FFN neurons of each layer; `layers` are the supernet's that it keeps, from 0."""

    width_mult: str | None = Field(description="null where layers have widths of their own.")
    depth_mult: str = "1"
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...]
    ffn: tuple[int, ...]


class Provenance(Frozen):
    """SHA-256 of what a job was made from; `model` and `dataset` by each file's path."""

    model: Mapping[str, str] = Field(description="Files of the uploaded model.")
    dataset: Mapping[str, str] = Field(description="Files of the uploaded dataset.")
    code: str = Field(
        "", description="Of the sources of the `compression` package that made it, all together."
    )


class ManifestProvenance(Provenance):
    rows: Mapping[str, int] = Field(description="Of each split.")
    notes: tuple[str, ...] = Field(description="What the job remarked about the dataset.")
    seed: int
    environment: Mapping[str, str] = Field(
        description="The device, the threads and the versions of the libraries."
    )
    device_fingerprint: str = Field(
        pattern=SHA256,
        description="SHA-256 of `environment`: equal where two bundles were measured on the same "
        "kind of machine with the same libraries.",
    )


class Manifest(Frozen):
    """manifest.json of a Widthwise bundle."""

    widthwise_bundle: Literal[2] = Field(description="Version of this layout.")
    name: str = Field(description="Of the sub-network, and of the bundle's folder.")
    task: ManifestTask
    inputs: tuple[Tensor, ...]
    output: Tensor
    formats: Mapping[str, ManifestFormat]
    selected_format: Format | None = Field(
        None,
        description="The one that the job chose, which predict.py runs unless told otherwise; null "
        "where it chose another sub-network or none.",
    )
    metrics: ManifestMetrics
    subnetwork: ManifestSubnetwork
    vocabulary: VocabularyReport | None = Field(
        None,
        description="What was removed of the teacher's; null where it is the same. The tokenizer's "
        f"{MAP_FILE} has the teacher's number of each token in `kept`.",
    )
    provenance: ManifestProvenance
    spec: Mapping[str, Any] = Field(description="The job's specification, with every default.")
    files: tuple[FileReport, ...] = Field(
        description=f"Every file of the bundle but this one and {SIGNATURE}."
    )


def to_bytes(document: Frozen) -> bytes:
    """The document as JSON. Keys are sorted: equal documents give equal bytes."""
    return _json(document.model_dump(mode="json"))


def schema_bytes() -> bytes:
    """The manifest's JSON Schema (draft 2020-12), as SCHEMA holds it."""
    schema = Manifest.model_json_schema(mode="serialization")
    return _json({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def fingerprint(facts: Mapping[str, str]) -> str:
    """SHA-256 of names with values, in whatever order they come."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def code_digest(package: Path = Path(__file__).parent) -> str:
    """SHA-256 over the paths and contents of all Python sources below `package`."""
    sources = {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in package.rglob("*.py")
    }
    return fingerprint(sources)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
