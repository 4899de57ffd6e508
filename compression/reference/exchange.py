"""What goes into the reference process: one JSON and one safetensors file, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from compression.batches import Encoded
from compression.importance import Importance
from compression.spec import Spec
from compression.teachers import EncoderConfig

SETTINGS = "request.json"
ARRAYS = "request.safetensors"
SCORES = "importance.safetensors"
SUPERNET = "supernet.safetensors"


@dataclass(frozen=True)
class Orders:
    """Each layer's unit numbers, most important first."""

    heads: Sequence[np.ndarray]
    neurons: Sequence[np.ndarray]


@dataclass(frozen=True)
class Request:
    """A fine-tuned model by our names, the rows to see, and the orders to put units into, if any.

    Labels serve importance alone, so the rows of a distillation may have none.
    """

    spec: Spec
    config: EncoderConfig
    weights: dict[str, np.ndarray]
    rows: Encoded
    orders: Orders | None = None


def write_request(folder: Path, request: Request) -> None:
    settings = {"spec": request.spec.model_dump(mode="json"), "config": request.config.to_dict()}
    rows = request.rows
    arrays = {
        "rows.lengths": np.array([len(ids) for ids in rows.input_ids], np.int64),
        "rows.input_ids": np.concatenate([np.asarray(ids, np.int64) for ids in rows.input_ids]),
        "rows.token_type_ids": np.concatenate(
            [np.asarray(types, np.int64) for types in rows.token_type_ids]
        ),
        **{f"weights.{name}": np.ascontiguousarray(v) for name, v in request.weights.items()},
    }
    if rows.labels is not None:
        arrays["rows.labels"] = np.asarray(rows.labels, np.int64)
    if request.orders is not None:
        arrays["orders.heads"] = np.stack(request.orders.heads)
        arrays["orders.neurons"] = np.stack(request.orders.neurons)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings))
    save_file(arrays, folder / ARRAYS)


def read_request(folder: Path) -> Request:
    settings = json.loads((folder / SETTINGS).read_text())
    arrays = load_file(folder / ARRAYS)
    ends = np.cumsum(arrays["rows.lengths"])[:-1]

    def ragged(name: str) -> list[list[int]]:
        return [part.tolist() for part in np.split(arrays[name], ends)]

    return Request(
        spec=Spec.model_validate(settings["spec"]),
        config=EncoderConfig.from_dict(settings["config"]),
        weights={
            name.removeprefix("weights."): value
            for name, value in arrays.items()
            if name.startswith("weights.")
        },
        rows=Encoded(
            ragged("rows.input_ids"), ragged("rows.token_type_ids"), arrays.get("rows.labels")
        ),
        orders=Orders(arrays["orders.heads"], arrays["orders.neurons"])
        if "orders.heads" in arrays
        else None,
    )


def write_scores(folder: Path, scores: Importance) -> None:
    """Layers are of one size in this recipe: [layers, heads] and [layers, neurons]."""
    save_file(
        {"heads": np.stack(scores.heads), "neurons": np.stack(scores.neurons)}, folder / SCORES
    )


def read_scores(folder: Path) -> Importance:
    scores = load_file(folder / SCORES)
    return Importance(tuple(scores["heads"]), tuple(scores["neurons"]))
