"""Which jobs the engine paddleslim takes: by arithmetic alone, without paddle."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest

from compression.engines import check_paddleslim, rounds_exactly
from compression.errors import InvalidSpec
from compression.spec import Spec
from compression.teachers.config import EncoderConfig


def config(**changes: Any) -> EncoderConfig:
    values: dict[str, Any] = {
        "family": "bert",
        "vocab_size": 50,
        "hidden": 24,
        "layers": 2,
        "heads": (12, 12),
        "head_dim": 2,
        "ffn": (48, 48),
        "max_positions": 32,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "activation": "gelu",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
        "num_labels": 3,
    }
    return EncoderConfig(**{**values, **changes})


def spec(*widths: str) -> Spec:
    return Spec.model_validate(
        {"engine": "paddleslim", "supernet": {"width_mults": widths or ("1", "1/2")}}
    )


def test_a_plain_bert_is_taken() -> None:
    check_paddleslim(spec("1", "5/6", "3/4", "2/3", "1/2", "1/3", "1/4"), config())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "roberta"}, "knows the family bert, not roberta"),
        ({"activation": "gelu_new"}, "not gelu_new"),
        ({"heads": (12, 6)}, "layers are all of one size"),
        ({"ffn": (48, 24)}, "layers are all of one size"),
        ({"heads": (6, 6)}, "6 heads of 2 units"),
    ],
)
def test_other_models_are_refused_with_a_pointer(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec, match=re.escape(said)) as refused:
        check_paddleslim(spec(), config(**changes))
    assert refused.value.pointer == "/engine"


def test_a_width_that_decimals_miss_is_refused_where_it_stands() -> None:
    # 14 * 0.6428571428571429 is 9, but 9 / 0.6428571428571429 is a little less than 14.
    model = config(hidden=896, heads=(14, 14), head_dim=64, ffn=(56, 56))
    with pytest.raises(InvalidSpec, match="rounds the width 9/14") as refused:
        check_paddleslim(spec("1", "9/14"), model)
    assert refused.value.pointer == "/supernet/width_mults/1"


def test_depth_is_refused_where_it_stands() -> None:
    document = {"engine": "paddleslim", "supernet": {"depth_mults": ["1", "1/2"]}}
    with pytest.raises(InvalidSpec, match="full depth alone, not 1/2 of the layers") as refused:
        check_paddleslim(Spec.model_validate(document), config())
    assert refused.value.pointer == "/supernet/depth_mults/1"


def test_a_width_for_each_layer_is_refused() -> None:
    document = {"engine": "paddleslim", "supernet": {"per_layer": {}}}
    with pytest.raises(InvalidSpec, match="widths that differ between layers") as refused:
        check_paddleslim(Spec.model_validate(document), config())
    assert refused.value.pointer == "/supernet/per_layer"


def test_every_half_third_and_quarter_of_usual_sizes_is_exact() -> None:
    for heads, head_dim, ffn in ((12, 64, 3072), (12, 32, 1536), (16, 64, 4096)):
        for width in (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)):
            assert rounds_exactly(width, heads=heads, head_dim=head_dim, ffn=ffn)
