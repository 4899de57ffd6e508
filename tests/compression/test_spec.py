"""The spec accepts what it says and nothing else, and survives JSON and YAML."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compression.spec import MAX_SETTINGS, LatencySpec, Spec, SupernetSpec, parse_width_mult


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("3/4", Fraction(3, 4)),
        (" 2 / 3 ", Fraction(2, 3)),
        ("2/8", Fraction(1, 4)),
        ("0.5", Fraction(1, 2)),
        (".25", Fraction(1, 4)),
        ("1", Fraction(1)),
        ("1.0", Fraction(1)),
        (1, Fraction(1)),
        (1.0, Fraction(1)),
        (0.5, Fraction(1, 2)),
        (0.1, Fraction(1, 10)),
        (0.3, Fraction(3, 10)),
        (1e-7, Fraction(1, 10**7)),
        (Fraction(5, 6), Fraction(5, 6)),
    ],
)
def test_widths_are_exact_fractions(written: Any, meant: Fraction) -> None:
    assert parse_width_mult(written) == meant


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        ".",
        "1.",
        "/",
        "1/",
        "/2",
        "1/0",
        "0/0",
        "0",
        "0.0",
        0,
        0.0,
        -0.5,
        "-1/2",
        "+1/2",
        "3/2",
        "1.01",
        1.01,
        2,
        "1/2/3",
        "1//2",
        "1/2\n3",
        "0x1/2",
        "1e-1",
        "1_0/2_0",
        "50%",
        "½",
        "nan",
        "inf",
        float("nan"),
        float("inf"),
        float("-inf"),
        True,
        False,
        None,
        b"1/2",
        [1, 2],
        {"numerator": 1},
        1 + 0j,
        Decimal("0.5"),
        Fraction(3, 2),
        Fraction(0),
        "__import__('os').getpid()",
        "1/1+0",
        "(1)/(2)",
        "9" * 100_000 + "/1",
        "1/" + "9" * 100_000,
        "0." + "1" * 100_000,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_everything_else_is_no_width(written: Any) -> None:
    with pytest.raises(ValueError, match="width"):
        parse_width_mult(written)


@given(st.text(max_size=30) | st.text("0123456789/. ", max_size=12))
def test_any_text_is_a_width_within_bounds_or_a_value_error(written: str) -> None:
    try:
        width = parse_width_mult(written)
    except ValueError:
        return
    assert 0 < width <= 1


@given(st.fractions(min_value=0, max_value=1, max_denominator=9999).filter(lambda w: w > 0))
def test_a_written_fraction_reads_back(width: Fraction) -> None:
    assert parse_width_mult(str(width)) == width


@pytest.mark.parametrize("width", ["1/0", "eval", None, "3/2", {}])
def test_a_bad_width_is_pointed_at(width: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate({"supernet": {"width_mults": [1, width]}})
    assert caught.value.errors()[0]["loc"] == ("supernet", "width_mults", 1)


def test_widths_keep_their_order_and_each_is_named_once() -> None:
    widths = SupernetSpec.model_validate({"width_mults": ["1/4", 1, 0.5]}).width_mults
    assert widths == (Fraction(1, 4), 1, Fraction(1, 2))
    with pytest.raises(ValidationError, match="once"):
        SupernetSpec.model_validate({"width_mults": ["1/2", 0.5]})


def test_depths_are_told_from_widths_where_they_are_wrong() -> None:
    depths = SupernetSpec.model_validate({"depth_mults": ["2/3", 1, 0.5]}).depth_mults
    assert depths == (Fraction(2, 3), 1, Fraction(1, 2))
    for written, said in (
        (["1/2", 0.5], "each depth may be named once"),
        (["3/2"], "a depth must be greater than 0"),
        (["1/0"], "a depth cannot have the denominator 0"),
        (["deep"], "write a depth as a fraction"),
        ([], "at least 1 item"),
    ):
        with pytest.raises(ValidationError, match=said):
            SupernetSpec.model_validate({"depth_mults": written})


def test_a_job_without_depth_is_the_job_that_it_was_before_there_was_depth() -> None:
    """Its checkpoints know it by this text."""
    for document in ({}, {"supernet": {"depth_mults": ["1"]}}):
        assert Spec.model_validate(document).model_dump_json(exclude_defaults=True) == "{}"
    assert not Spec.model_validate({"supernet": {"depth_mults": ["1"]}}).supernet.has_depth
    assert Spec.model_validate({"supernet": {"depth_mults": ["1/2"]}}).supernet.has_depth


@pytest.mark.parametrize("widths", [[], [Fraction(1, n) for n in range(1, 18)], "1", None])
def test_one_to_sixteen_widths(widths: Any) -> None:
    with pytest.raises(ValidationError):
        SupernetSpec.model_validate({"width_mults": widths})


def test_nothing_need_be_said() -> None:
    spec = Spec.model_validate({})
    assert spec == Spec()
    assert spec.supernet.width_mults == (1, Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
    assert (spec.distillation.lambda_rep, spec.distillation.lambda_logit) == (0.1, 1.0)
    assert spec.importance.split == "train"


@pytest.mark.parametrize("section", [None, *Spec.model_fields])
def test_unknown_fields_are_refused_everywhere(section: str | None) -> None:
    if section in ("device", "seed"):
        document: dict[str, Any] = {section: {"surprise": 1}}
    else:
        document = {"surprise": 1} if section is None else {section: {"surprise": 1}}
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate(document)
    where = [error["loc"] for error in caught.value.errors()]
    assert where == [tuple(part for part in (section, "surprise") if part)] or where == [(section,)]


@pytest.mark.parametrize(
    "document",
    [
        {"distillation": {"lambda_rep": 0, "lambda_logit": 0}},
        {"distillation": {"lambda_rep": -1}},
        {"depth": {"lambda_rep": 0, "lambda_logit": 0}},
        {"supernet": {"per_layer": {"latency_samples": 3}}},
        {"supernet": {"per_layer": {"budget_shares": [1, 1]}}},
        {"supernet": {"per_layer": {"budget_shares": [0]}}},
        {"supernet": {"per_layer": {"budget_shares": [1.5]}}},
        {"supernet": {"per_layer": True}},
        {"distillation": {"epochs": 0}},
        {"distillation": {"epochs": float("inf")}},
        {"distillation": {"learning_rate": float("nan")}},
        {"distillation": {"lambda_rep": float("inf")}},
        {"constraints": {"max_latency_ms": float("inf")}},
        {"task": {"label": "\ud800"}},
        {"task": {"labels": ["0", "1", "\ud800"]}},
        {"refinement": {"subnetworks": ["\ud800"]}},
        {"refinement": {"subnetworks": ["w1_4", "w1_4"]}},
        {"refinement": {"lambda_rep": 0, "lambda_logit": 0}},
        {"teacher": {"when": "sometimes"}},
        {"task": {"kind": "translation"}},
        {"task": {"kind": "regression", "metric": "accuracy"}},
        {"task": {"separator": ""}},
        {"task": {"max_seq_len": 513}},
        {"export": {"formats": []}},
        {"report": {"slices": ["source", "source"]}},
        {"report": {"excerpt_chars": 201}},
        {"export": {"formats": ["safetensors"]}},
        {"export": {"formats": ["onnx", "onnx"]}},
        {"export": {"formats": ["torchscript"]}},
        {"constraints": {"max_latency_ms": 0}},
        {"constraints": {"confidence": 0.8}},
        {"constraints": {"objective": "price"}},
        {"constraints": {"latency_at": {"percentile": 90}}},
        {"latency": {"baselines": ["safetensors"]}},
        {"vocabulary": {"keep": ["##ing"]}},
        {"vocabulary": {"remove_unused": True, "keep": [""]}},
        {"vocabulary": {"remove_unused": True, "keep": ["x" * 1000] * 1001}},
        {"latency": {"batch_sizes": [0]}},
        {"latency": {"seq_lens": [1, 8]}},
        {"latency": {"batch_sizes": list(range(2, 34))}},
        {"constraints": {"max_accuracy_drop": float("nan")}},
        {"seed": -1},
        {"seed": 2**31},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_values_out_of_bounds_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate(document)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Spec().seed = 1  # type: ignore[misc]


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    widths = st.fractions(min_value=Fraction(1, 99), max_value=1, max_denominator=99)
    names = st.none() | st.text(max_size=10)
    formats = st.lists(st.sampled_from(["safetensors", "paddle", "onnx"]), unique=True, max_size=2)
    return Spec.model_validate(
        {
            "task": {
                "text": draw(names),
                "label": draw(names),
                "labels": draw(st.none() | st.lists(st.text(max_size=5), max_size=3)),
                "max_seq_len": draw(st.integers(8, 512)),
            },
            "supernet": {
                "width_mults": draw(st.lists(widths, min_size=1, max_size=16, unique=True)),
                "depth_mults": draw(st.lists(widths, min_size=1, max_size=16, unique=True)),
            },
            "distillation": {"learning_rate": draw(st.floats(1e-8, 0.5))},
            "constraints": {
                "max_accuracy_drop": draw(st.none() | st.floats(-100, 100)),
                "max_size_mb": draw(st.none() | st.floats(1e-3, 1e3)),
            },
            "export": {"formats": sorted({"onnx", *draw(formats)})},
            "seed": draw(st.integers(0, 2**31 - 1)),
        }
    )


@settings(deadline=None)
@given(specs())
def test_a_spec_survives_json_and_yaml(spec: Spec) -> None:
    plain = spec.model_dump(mode="json")
    assert Spec.model_validate(json.loads(json.dumps(plain))) == spec
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    # Not allow_unicode: PyYAML then writes U+0085 in a way that it reads back as a blank.
    assert Spec.model_validate(yaml.safe_load(yaml.safe_dump(plain))) == spec


def test_yaml_as_a_user_writes_it() -> None:
    spec = Spec.model_validate(
        yaml.safe_load(
            """
            supernet: {width_mults: [1, 3/4, 0.5, "1/4"]}
            constraints: {max_accuracy_drop: 1, min_speedup: 2}
            """
        )
    )
    assert spec.supernet.width_mults == Spec().supernet.width_mults
    assert spec.constraints.max_accuracy_drop == 1.0


def test_the_json_schema_describes_widths_for_readers() -> None:
    schema = Spec.model_json_schema()
    items = schema["$defs"]["SupernetSpec"]["properties"]["width_mults"]["items"]
    assert {each["type"] for each in items["anyOf"]} == {"string", "number"}
    assert schema["additionalProperties"] is False


def test_every_combination_is_a_setting_once_and_the_specs_own_comes_first() -> None:
    spec = LatencySpec(batch_size=4, threads=2, batch_sizes=(1, 4), seq_lens=(30, 9))
    assert spec.settings(9) == ((4, 9, 2), (1, 9, 2), (4, 30, 2), (1, 30, 2))
    assert LatencySpec().settings(9) == ((1, 9, 1),)
    many = LatencySpec(batch_sizes=tuple(range(2, MAX_SETTINGS + 1)))
    assert len(many.settings(9)) == MAX_SETTINGS


@pytest.mark.parametrize(
    ("formats", "asked", "baselines"),
    [
        (["paddle"], None, ()),
        (["paddle", "onnx"], None, ("onnx-int8-dynamic",)),
        (["onnx-int8-static"], None, ("onnx-int8-dynamic",)),
        (["onnx"], [], ()),
        (["onnx"], ["paddle"], ("paddle",)),
    ],
)
def test_the_teacher_in_int8_is_a_baseline_unless_told_otherwise(
    formats: list[str], asked: list[str] | None, baselines: tuple[str, ...]
) -> None:
    document = {"export": {"formats": formats}, "latency": {"baselines": asked}}
    assert Spec.model_validate(document).baselines == baselines


def test_a_job_from_before_the_new_fields_keeps_its_identity() -> None:
    old = {"latency": {"rounds": 7}, "constraints": {"max_latency_ms": 8}}
    assert Spec.model_validate(old).model_dump(mode="json", exclude_defaults=True) == {
        "latency": {"rounds": 7}, "constraints": {"max_latency_ms": 8.0},
    }  # fmt: skip
