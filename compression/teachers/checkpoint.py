"""Model folders in and out: a config and weights of any known layout, as numpy arrays.

Only safetensors are read here. Pickles run code when they are loaded; the
inspection sandbox of the service turns them into safetensors at upload.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from compression.errors import InvalidModel
from compression.teachers.config import MODEL_TYPE, EncoderConfig
from compression.teachers.family import Family, Layout
from compression.teachers.fields import MAX_LABELS, Fields, check_bounds, read_json_object
from compression.teachers.parameters import parameter_shapes
from compression.teachers.registry import FAMILIES
from compression.teachers.weights import SafetensorsFile

Tensors = dict[str, npt.NDArray[np.float32]]

CONFIG_FILES = ("config.json", "model_config.json")
WEIGHTS_FILE = "model.safetensors"
PICKLE_FILES = ("pytorch_model.bin", "model_state.pdparams")

_PLACEHOLDER_LABEL = re.compile(r"LABEL_\d+")
_PROBLEM_TYPES = {
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
# Classes whose classifier reads every token, and what transformers calls one of them.
_TOKEN_HEADS = {
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}
_ANSWER_HEAD = "qa_outputs."
# Parameters of heads that no task here has: extraction (UIE), tags (UTC), choices.
_OTHER_TASKS = ("linear_start.", "linear_end.", "linear_q.", "linear_k.", "sequence_summary.")


@dataclass(frozen=True)
class ModelConfig:
    """A model folder's configuration before its weights are looked at.

    `encoder.num_labels` and `labels` are what the config states; whether there is a
    classifier at all, only the weights say. `family` is None for our own layout.
    """

    file: str
    raw: Mapping[str, Any]
    family: Family | None
    encoder: EncoderConfig
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class Checkpoint:
    """An encoder's weights under our names (float32, linear weights [in, out]).

    `config.num_labels` is None, and classifier.* absent, where there is no head;
    pooler.* may be absent then too. `ignored` names known parameters left out.
    """

    config: EncoderConfig
    tensors: Tensors
    labels: tuple[str, ...] | None
    layout: str
    ignored: tuple[str, ...]
    head_task: str | None = None  # the kind of task that the head is said to be for


def read_config(model_dir: Path) -> ModelConfig:
    """The folder's config.json, or PaddleNLP's model_config.json. InvalidModel if unfit."""
    path, raw = _raw_config(model_dir)
    return _parse_config(path.name, raw, type_vocab_size=None)


def read_checkpoint(model_dir: Path) -> Checkpoint:
    """Config and model.safetensors of a Hugging Face, PaddleNLP or Widthwise folder.

    Every parameter is accounted for: InvalidModel names those that are missing,
    unexpected, mis-shaped (with both shapes), not floats or not finite.
    """
    return _read(model_dir, keep=True)


def check_checkpoint(model_dir: Path) -> Checkpoint:
    """All that `read_checkpoint` checks, without its memory: the answer's `tensors` is empty."""
    return _read(model_dir, keep=False)


def write_checkpoint(
    out_dir: Path,
    config: EncoderConfig,
    tensors: Mapping[str, npt.NDArray[Any]],
    labels: Sequence[str] | None,
) -> list[Path]:
    """Writes config.json and model.safetensors in our own layout, for `read_checkpoint`.

    Each file appears whole or not at all, the config last. ValueError where the
    tensors are not those of the config: that is a bug of the caller's.
    """
    expected = parameter_shapes(config)
    found = {name: tuple(array.shape) for name, array in tensors.items()}
    if found != expected:
        names = expected.keys() | found
        wrong = sorted(name for name in names if expected.get(name) != found.get(name))
        raise ValueError(f"these tensors do not fit the config: {', '.join(wrong[:5])}")
    if labels is not None and len(labels) != config.num_labels:
        raise ValueError(f"{len(labels)} labels for a classifier of {config.num_labels}")
    out_dir.mkdir(parents=True, exist_ok=True)
    weights, settings = out_dir / WEIGHTS_FILE, out_dir / CONFIG_FILES[0]
    # safetensors writes the memory as it lies: a transposed view would be written wrongly.
    arrays = {name: np.ascontiguousarray(tensors[name], dtype=np.float32) for name in expected}
    with _replacing(weights) as temporary:
        save_file(arrays, temporary, metadata={"format": MODEL_TYPE})
    with _replacing(settings) as temporary:
        data = {**config.to_dict(), "labels": None if labels is None else list(labels)}
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return [settings, weights]


def legal_widths(config: EncoderConfig) -> tuple[Fraction, ...]:
    """All widths that leave whole heads and neurons in every layer, the widest first."""
    heads = math.gcd(*config.heads)
    widths = {Fraction(kept, heads) for kept in range(1, heads + 1)}
    return tuple(
        sorted(
            (w for w in widths if all((n * w).denominator == 1 for n in config.ffn)), reverse=True
        )
    )


class _replacing:
    """A temporary path beside `path` that takes its place when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.temporary.chmod(0o644)  # mkstemp's 600 would follow the file into every bundle
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Source:
    """Where one of our parameters comes from; `shape` is ours, after any transposition."""

    name: str
    shape: tuple[int, ...]
    transposed: bool


def _read(model_dir: Path, *, keep: bool) -> Checkpoint:
    path, raw = _raw_config(model_dir)
    config = _parse_config(path.name, raw, type_vocab_size=None)
    file = SafetensorsFile(_weights_path(model_dir))
    if config.family is None:
        layout_name, sources, ignored = _own_sources(file)
    else:
        layout, sources, ignored = _foreign_sources(file, config.family)
        layout_name = layout.name
        types = sources.get("embeddings.token_type.weight")
        if raw.get("type_vocab_size") is None and types is not None and len(types.shape) == 2:
            config = _parse_config(path.name, raw, type_vocab_size=types.shape[0])
        fixed = dataclasses.replace(config.encoder, **layout.fixed)
        config = dataclasses.replace(config, encoder=fixed)
    encoder = _with_head(config, sources)
    if encoder.head == "token":  # some toolkits keep a pooler that such a head never reads
        unread = sources.keys() & {"pooler.weight", "pooler.bias"}
        ignored = tuple(sorted({*ignored, *(sources.pop(name).name for name in unread)}))
    _account(encoder, sources)
    tensors = {}
    for name in parameter_shapes(encoder):
        if name in sources:  # the pooler of a headless model may be absent
            source = sources[name]
            array = file.read(source.name)
            if keep:
                tensors[name] = np.ascontiguousarray(array.T if source.transposed else array)
    return Checkpoint(
        config=encoder,
        tensors=tensors,
        labels=config.labels if encoder.num_labels is not None else None,
        layout=layout_name,
        ignored=ignored,
        head_task=_head_task(config, encoder, sources),
    )


def _raw_config(model_dir: Path) -> tuple[Path, dict[str, Any]]:
    for name in CONFIG_FILES:
        path = model_dir / name
        if path.is_file():
            raw = read_json_object(path)
            return path, _flattened(raw, file=name) if "init_class" in raw else raw
    raise InvalidModel("the model folder has no config.json", pointer="config.json")


def _flattened(raw: dict[str, Any], *, file: str) -> dict[str, Any]:
    """PaddleNLP's older config: the encoder's arguments lie within the head's, as "init_args"."""
    merged: dict[str, Any] = {}
    level: Any = raw
    for _ in range(4):
        if not isinstance(level, dict):
            raise InvalidModel(f"{file}: init_args does not hold objects", pointer=file)
        merged = {**level, **merged}
        arguments = level.get("init_args")
        if not arguments:
            break
        level = arguments[0] if isinstance(arguments, list) else arguments
    merged["architectures"] = [raw["init_class"]]
    merged.pop("init_args", None)
    return merged


def _parse_config(file: str, raw: Mapping[str, Any], *, type_vocab_size: int | None) -> ModelConfig:
    if raw.get("model_type") == MODEL_TYPE:
        encoder = EncoderConfig.from_dict(raw)
        check_bounds(encoder, file=file)
        return ModelConfig(file, raw, None, encoder, _own_labels(encoder, raw, file=file))
    family = _family(raw, file=file)
    encoder = family.parse(raw, file, type_vocab_size)
    stated, labels = _stated_labels(raw, file=file)
    return ModelConfig(file, raw, family, dataclasses.replace(encoder, num_labels=stated), labels)


def _classes(raw: Mapping[str, Any]) -> list[str]:
    classes = raw.get("architectures")
    return [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []


def _family(raw: Mapping[str, Any], *, file: str) -> Family:
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type is None:
        for family in FAMILIES.values():
            if any(name.startswith(family.class_prefixes) for name in _classes(raw)):
                return family
    said = f"has the model_type {str(model_type)[:40]!r}" if model_type else "names no model_type"
    raise InvalidModel(f"{file} {said}; known: {', '.join(FAMILIES)}", pointer=file)


def _own_labels(
    encoder: EncoderConfig, raw: Mapping[str, Any], *, file: str
) -> tuple[str, ...] | None:
    labels = raw.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InvalidModel(f"{file}: labels is not a list of strings", pointer=file)
    if len(labels) != encoder.num_labels or len(set(labels)) != len(labels):
        raise InvalidModel(
            f"{file} has {len(set(labels))} distinct labels for {encoder.num_labels} outputs",
            pointer=file,
        )
    return tuple(labels)


def _stated_labels(
    raw: Mapping[str, Any], *, file: str
) -> tuple[int | None, tuple[str, ...] | None]:
    """How many labels a config states, and their names where they are more than LABEL_0."""
    fields = Fields(raw, file=file)
    names = raw.get("id2label")
    if names is None:
        for key in ("num_labels", "num_classes"):
            if raw.get(key) is not None:
                return fields.integer(key, low=1, high=MAX_LABELS), None
        return None, None
    if not isinstance(names, Mapping) or not 1 <= len(names) <= MAX_LABELS:
        raise fields.error(f"id2label is not an object of 1 to {MAX_LABELS} labels")
    ordered = [names.get(str(i)) for i in range(len(names))]
    if not all(isinstance(label, (str, int)) for label in ordered):
        raise fields.error(f"id2label does not name the labels 0 to {len(names) - 1}")
    labels = tuple(str(label) for label in ordered)
    placeholders = all(_PLACEHOLDER_LABEL.fullmatch(label) for label in labels)
    if placeholders or len(set(labels)) != len(labels):
        return len(labels), None
    return len(labels), labels


def _weights_path(model_dir: Path) -> Path:
    path = model_dir / WEIGHTS_FILE
    if path.is_file():
        return path
    if (model_dir / f"{WEIGHTS_FILE}.index.json").is_file():
        raise InvalidModel(
            f"the weights are split over several files; save them as one {WEIGHTS_FILE}",
            pointer=WEIGHTS_FILE,
        )
    for name in PICKLE_FILES:
        if (model_dir / name).is_file():
            raise InvalidModel(
                f"{name} is a pickle, which can run any code when it is loaded. It is read only by "
                "the service's inspection at upload; without the service, convert it with "
                "`python -m jobs.inspection model SRC OUT`",
                pointer=name,
            )
    raise InvalidModel(f"the model folder has no {WEIGHTS_FILE}", pointer=WEIGHTS_FILE)


def _own_sources(file: SafetensorsFile) -> tuple[str, dict[str, _Source], tuple[str, ...]]:
    sources = {name: _Source(name, entry.shape, False) for name, entry in file.entries.items()}
    return "widthwise", sources, ()


def _foreign_sources(
    file: SafetensorsFile, family: Family
) -> tuple[Layout, dict[str, _Source], tuple[str, ...]]:
    """Our name for every parameter of the file, by the layout that knows most of them."""
    ignored = tuple(sorted(name for name in file.entries if family.ignored(name)))
    names = {
        name: f"classifier.{name.removeprefix(_ANSWER_HEAD)}"
        if name.startswith(_ANSWER_HEAD)
        else family.normalised(name)
        for name in file.entries
        if name not in set(ignored)
    }

    def known(layout: Layout) -> int:
        return sum(layout.ours(name) is not None for name in names.values())

    layout = max(family.layouts, key=known)
    if known(layout) == 0:
        raise InvalidModel(
            f"{file.path.name} holds no parameter of {family.name} in a known layout "
            f"({', '.join(each.name for each in family.layouts)})"
            + (f"; it holds {_listed(names)}" if names else ""),
            pointer=file.path.name,
        )
    unexpected = [name for name, plain in names.items() if layout.ours(plain) is None]
    other = [name for name in unexpected if name.startswith(_OTHER_TASKS)]
    if other:
        raise InvalidModel(
            f"{file.path.name} holds the head of another task: {_listed(other)}. Classification, "
            "regression, token classification and answer extraction can be compressed: remove "
            "the head's weights to fine-tune a new one",
            pointer=file.path.name,
        )
    if unexpected:
        raise InvalidModel(
            f"unexpected parameters for {family.name} in the {layout.name} layout: "
            f"{_listed(unexpected)}",
            pointer=file.path.name,
        )
    sources: dict[str, _Source] = {}
    for name, plain in names.items():
        ours = layout.ours(plain)
        assert ours is not None  # unexpected names were refused above
        if ours in sources:
            raise InvalidModel(
                f"parameters {sources[ours].name!r} and {name!r} are the same one, stored twice",
                pointer=file.path.name,
            )
        shape = file.entries[name].shape
        transposed = layout.transposed(ours, shape)
        sources[ours] = _Source(name, shape[::-1] if transposed else shape, transposed)
    return layout, sources, ignored


def _with_head(config: ModelConfig, sources: Mapping[str, _Source]) -> EncoderConfig:
    """The encoder's config with the classifier that the weights really have."""
    weight = sources.get("classifier.weight")
    if weight is None and "classifier.bias" not in sources:
        return dataclasses.replace(config.encoder, num_labels=None)
    for name in _classes(config.raw):
        if name.endswith("ForMultipleChoice"):
            raise InvalidModel(
                f"{config.file} says {name[:60]}: multiple choice cannot be compressed as yet. "
                "Remove the head's weights to fine-tune a new one",
                pointer=config.file,
            )
    stated = config.encoder.num_labels
    if stated is None and weight is not None and len(weight.shape) == 2:
        stated = weight.shape[1]
        if not 1 <= stated <= MAX_LABELS:
            raise InvalidModel(
                f"parameter {weight.name!r} has {stated} outputs", pointer=WEIGHTS_FILE
            )
    head = "token" if _token_task(config, sources) else config.encoder.head
    return dataclasses.replace(config.encoder, num_labels=stated, head=head)


def _token_task(config: ModelConfig, sources: Mapping[str, _Source]) -> str | None:
    """What a classifier that reads every token is for, by its name or the class that saved it."""
    weight = sources.get("classifier.weight")
    if weight is not None and weight.name.startswith(_ANSWER_HEAD):
        return "question_answering"
    for end, task in _TOKEN_HEADS.items():
        if any(name.endswith(end) for name in _classes(config.raw)):
            return task
    return None


def _head_task(
    config: ModelConfig, encoder: EncoderConfig, sources: Mapping[str, _Source]
) -> str | None:
    """The task that the head's class, Hugging Face's `problem_type` or a single output tell."""
    if encoder.num_labels is None:
        return None
    if (task := _token_task(config, sources)) is not None:
        return task
    kind = config.raw.get("problem_type")
    if kind is None:
        return "regression" if encoder.num_labels == 1 else None
    task = _PROBLEM_TYPES.get(kind) if isinstance(kind, str) else None
    if task is None or (task == "regression") != (encoder.num_labels == 1):
        raise InvalidModel(
            f"{config.file} has the problem_type {str(kind)[:40]!r}, which does not suit a "
            f"classifier of {encoder.num_labels} outputs; known: {', '.join(_PROBLEM_TYPES)} (one "
            "output for regression, more for the others). Remove the head's weights to fine-tune "
            "a new one",
            pointer=config.file,
        )
    return task


def _account(encoder: EncoderConfig, sources: Mapping[str, _Source]) -> None:
    """Every parameter that the config asks for is there, in its shape, and no other is."""
    expected = parameter_shapes(encoder)
    optional = {"pooler.weight", "pooler.bias"} if encoder.num_labels is None else set()
    if optional & sources.keys():
        optional = set()  # half a pooler is an error
    missing = [name for name in expected if name not in sources and name not in optional]
    if missing:
        raise InvalidModel(f"missing parameters: {_listed(missing)}", pointer=WEIGHTS_FILE)
    unexpected = [source.name for name, source in sources.items() if name not in expected]
    if unexpected:
        raise InvalidModel(f"unexpected parameters: {_listed(unexpected)}", pointer=WEIGHTS_FILE)
    wrong = []
    for name, source in sources.items():
        if source.shape != expected[name]:
            flip = slice(None, None, -1 if source.transposed else 1)
            wrong.append(
                f"{source.name!r} has the shape {list(source.shape[flip])} where the config "
                f"makes it {list(expected[name][flip])}"
            )
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InvalidModel(
            f"mis-shaped parameters: {', '.join(wrong[:3])}{more}", pointer=WEIGHTS_FILE
        )


def _listed(names: Iterable[str], *, most: int = 5) -> str:
    found = [name if len(name) <= 120 else name[:117] + "..." for name in names]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(repr(name) for name in found[:most]) + more
