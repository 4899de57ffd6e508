"""The physical shape of an encoder: what every family's configuration is translated into."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from compression.errors import InvalidModel, InvalidSpec
from compression.spec import Head

MODEL_TYPE = "widthwise-encoder"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EncoderConfig:
    """Shapes of one BERT-family encoder; layers may differ in heads and neurons.

    `heads[i]` and `ffn[i]` are those of layer i; every head has `head_dim` units,
    so a layer's attention is `heads[i] * head_dim` wide, whatever `hidden` is.
    `num_labels` is None where there is no classifier head; `head` says what it classifies:
    "sequence" the pooled first token, "token" every token, without a pooler.
    """

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: tuple[int, ...]
    head_dim: int
    ffn: tuple[int, ...]
    max_positions: int
    type_vocab_size: int
    layer_norm_eps: float
    activation: str
    hidden_dropout: float
    attention_dropout: float
    pad_token_id: int
    num_labels: int | None
    head: Head = "sequence"

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back to an equal config."""
        return {
            "model_type": MODEL_TYPE,
            "widthwise_format": FORMAT_VERSION,
            **dataclasses.asdict(self),
            "heads": list(self.heads),
            "ffn": list(self.ffn),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EncoderConfig:
        """Reads what `to_dict` wrote. InvalidModel names the field that is missing or wrong."""
        if data.get("widthwise_format") != FORMAT_VERSION:
            raise InvalidModel(
                f"config.json has widthwise_format {data.get('widthwise_format')!r}; "
                f"this version reads {FORMAT_VERSION}",
                pointer="config.json",
            )
        values: dict[str, Any] = {}
        for spec in dataclasses.fields(cls):
            if spec.name in data:
                values[spec.name] = data[spec.name]
            elif spec.default is dataclasses.MISSING:
                raise InvalidModel(f"config.json lacks {spec.name!r}", pointer="config.json")
        try:
            values["heads"] = tuple(int(n) for n in values["heads"])
            values["ffn"] = tuple(int(n) for n in values["ffn"])
            config = cls(**values)
        except (TypeError, ValueError) as error:
            raise InvalidModel(f"config.json: {error}", pointer="config.json") from error
        if len(config.heads) != config.layers or len(config.ffn) != config.layers:
            raise InvalidModel(
                f"config.json names {config.layers} layers, but {len(config.heads)} head counts "
                f"and {len(config.ffn)} neuron counts",
                pointer="config.json",
            )
        return config

    def narrowed(self, width: Fraction) -> EncoderConfig:
        """The config of the sub-network that keeps `width` of every layer's heads and neurons."""
        return dataclasses.replace(
            self,
            heads=tuple(_share(n, width, f"heads of layer {i}") for i, n in enumerate(self.heads)),
            ffn=tuple(_share(n, width, f"neurons of layer {i}") for i, n in enumerate(self.ffn)),
        )


def _share(count: int, width: Fraction, what: str) -> int:
    kept = count * width
    if kept.denominator != 1 or kept < 1:
        raise InvalidSpec(
            f"width {width} of the {count} {what} is {float(kept):g}, "
            "not a whole number of at least 1"
        )
    return int(kept)
