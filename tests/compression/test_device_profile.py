"""Profiles of other devices: nothing believed, nothing said beyond them, and who is told what."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compression.device_profile import (
    MAX_BYTES,
    DeviceProfile,
    Predictor,
    in_words,
    make_predictor,
    read_profile,
)
from compression.errors import InvalidSpec
from compression.plan import Plan, make_plan, model_info
from compression.prediction import OutsideProfile
from compression.spec import ConstraintSpec, LatencySetting, Spec
from compression.tables import Table, profile
from compression.teachers import Checkpoint
from tests.builders import device_profile
from tests.encoders import tiny_config

TEACHER = tiny_config(
    hidden=32, head_dim=8, heads=(4, 4), ffn=(64, 64), num_labels=2, max_positions=128
)
DEFAULT = LatencySetting(1, 10, 1)


def predictor(constraints: dict[str, Any] | None = None, **changes: Any) -> Predictor:
    asked = ConstraintSpec.model_validate({"latency_on": "prf_1", **(constraints or {})})
    return make_predictor(
        DeviceProfile.model_validate(device_profile(**changes)), asked, TEACHER, DEFAULT
    )


def refused(pointer: str, constraints: dict[str, Any] | None = None, **changes: Any) -> str:
    with pytest.raises(InvalidSpec) as caught:
        predictor(constraints, **changes)
    assert caught.value.pointer == pointer
    return caught.value.message


def test_latency_is_predicted_by_layers_with_its_device_and_its_error() -> None:
    found = predictor().latency([4, 4], [64, 64])
    assert found.p50_ms == pytest.approx(1 + 2 * (4 + 6.4))  # ten tokens
    assert found.speedup == pytest.approx(1.0)
    half = predictor().latency([2, 2], [32, 32])
    assert half.speedup == pytest.approx((1 + 2 * 10.4) / (1 + 2 * 5.2))
    assert predictor().latency([2], [32]).p50_ms == pytest.approx(1 + 5.2)  # fewer layers
    assert predictor().latency([1, 4], [16, 64]).p50_ms == pytest.approx(1 + 5 + 8)
    assert (half.batch_size, half.seq_len, half.threads) == (1, 10, 1)
    assert half.on.profile == "prf_1" and half.on.device.cpu == "Test Board rev 3"
    error = half.on.errors["onnx"]
    assert (error.networks, error.served) == (2, 0)
    assert (error.lowest, error.highest, error.mean_absolute) == pytest.approx((-0.02, 0.05, 0.035))
    assert in_words(half.on) == (
        "predicted for Test Board rev 3 (4 cores, ONNX Runtime 1.32.0), where predictions were "
        "-2 to +5 % off on 2 whole networks"
    )
    with pytest.raises(OutsideProfile):
        predictor().latency([5, 4], [64, 64])


def test_latency_at_may_be_any_setting_within_the_profile() -> None:
    asked = {"latency_at": {"batch_size": 2, "seq_len": 20, "threads": 4}}
    found = predictor(asked, batch_size=(1, 4), threads=(1, 4)).latency([4, 4], [64, 64])
    assert found.p50_ms == pytest.approx(1 + 2 * 10.4 * 2 * 2 / 4)


def test_int8_has_blocks_and_an_error_of_its_own() -> None:
    both = predictor(formats=("onnx", "onnx-int8-dynamic"))
    found = both.latency([4, 4], [64, 64], "onnx-int8-dynamic")
    assert found.p50_ms == pytest.approx(1 + 2 * 10.4 / 4)
    assert found.speedup == pytest.approx((1 + 2 * 10.4) / (1 + 2 * 10.4 / 4))  # against fp32
    assert set(found.on.errors) == {"onnx", "onnx-int8-dynamic"}
    assert in_words(found.on).endswith(
        "-2 to +5 % off on 2 whole networks and -2 to +5 % off on 2 whole networks in int8"
    )
    with pytest.raises(ValidationError, match="no tables of onnx"):
        DeviceProfile.model_validate(device_profile(formats=("onnx-int8-dynamic",)))


def test_a_head_for_tokens_is_another_cost() -> None:
    of_tokens = make_predictor(
        DeviceProfile.model_validate(device_profile()),
        ConstraintSpec(latency_on="x"),
        tiny_config(hidden=32, head_dim=8, heads=(4, 4), ffn=(64, 64), head="token"),
        DEFAULT,
    )
    own = predictor().latency([4, 4], [64, 64]).p50_ms
    assert of_tokens.latency([4, 4], [64, 64]).p50_ms == pytest.approx(own + 0.5)


@pytest.mark.parametrize(
    ("pointer", "constraints", "changes", "message"),
    [
        ("/constraints/latency_on", {}, {"hidden": 64}, "profile the device with --hidden 32"),
        ("/constraints/latency_on", {}, {"head_dim": 4}, "with --head-dim 8"),
        ("/constraints/latency_on", {}, {"layers": 1}, "up to 1 layers, and this one has 2"),
        ("/constraints/latency_on", {}, {"heads": (1, 3)}, "heads 4 lies outside the profile"),
        ("/constraints/latency_on", {}, {"ffn": (16, 60)}, "neurons 64 lies outside"),
        ("/constraints/latency_at/seq_len", {}, {"seq_len": (16, 64)}, "tokens 10 lies outside"),
        (
            "/constraints/latency_at/batch_size",
            {"latency_at": {"batch_size": 8}},
            {"batch_size": (1, 4)},
            "batch size 8 lies outside the profile, which has from 1 to 4; name another",
        ),
        ("/constraints/latency_at/threads", {"latency_at": {"threads": 2}}, {}, "1 and no other"),
        (
            "/constraints/latency_at/seq_len",
            {"latency_at": {"seq_len": 129}},
            {"seq_len": (4, 512)},
            "129 tokens are more than the model's 128 positions",
        ),
        ("/constraints/latency_at/percentile", {"latency_at": {"percentile": 95}}, {}, "medians"),
        ("/constraints/confidence", {"confidence": 0.95, "min_speedup": 2}, {}, "no interval"),
        ("/constraints/confidence", {"confidence": 0.95, "max_latency_ms": 2}, {}, "no interval"),
    ],
)
def test_what_a_profile_cannot_answer_is_refused_where_it_was_asked(
    pointer: str, constraints: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    assert message in refused(pointer, constraints, **changes)


def test_a_confidence_of_the_accuracy_alone_is_no_matter_of_the_device() -> None:
    assert predictor({"confidence": 0.95, "max_accuracy_drop": 1})


# --- the file -------------------------------------------------------------------------------


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        at: Any = document
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return edit


def two_settings(document: dict[str, Any]) -> None:
    """The second table is of another batch size and of another length."""
    document["tables"][1]["batch_size"] = 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("widthwise_profile", value=2), "version 3 is needed: measure the device again"),
        (put("widthwise_profile", value="3"), "Input should be 3"),
        (put("more", value=1), "Extra inputs"),
        (put("tables", value=[]), "at least 1 item"),
        (put("tables", 0, "call", value=0), "greater than or equal to 0.000001"),
        (put("tables", 0, "attention", value={}), "at least 1 item"),
        (put("tables", 0, "attention", value={"0": 1.0}), "greater than or equal to 1"),
        (put("tables", 0, "attention", value={"x": 1.0}), "valid integer"),
        (put("tables", 0, "attention", "1", value=float("nan")), "finite number"),
        (put("tables", 0, "attention", "1", value=-1), "greater than or equal to 0"),
        (put("tables", 0, "attention", value={"1": 1.0}), "not all of the same heads"),
        (put("tables", 1, "seq_len", value=4), "not one for every combination"),
        (put("tables", 1, "format", value="onnx-int8-dynamic"), "not of the same formats"),
        (put("networks", 1, "format", value="onnx-int8-dynamic"), "not of the same formats"),
        (put("tables", 0, "format", value="paddle"), "'onnx' or 'onnx-int8-dynamic'"),
        (two_settings, "not one for every combination"),
        (put("tables", 0, "seq_len", value=10**9), "less than or equal to 512"),
        (put("networks", value=[]), "at least 1 item"),
        (put("networks", 0, "measured_ms", value=0), "greater than or equal to 0.000001"),
        (put("networks", 0, "heads", value=[4]), "not of as many layers"),
        (put("networks", 0, "heads", value=[5, 5]), "heads 5 lies outside the profile"),
        (put("networks", 0, "seq_len", value=128), "tokens 128 lies outside the profile"),
        (put("networks", 0, "heads", value=[1] * 65), "at most 64 items"),
        (put("device", "cpu", value="a\nb"), "printable characters"),
        (put("device", "cpu", value="x" * 5000), "at most 4096 printable"),
        (put("shape", "activation", value="swish"), "'gelu', 'gelu_new' or 'relu'"),
        (put("layers", value=1000), "less than or equal to 64"),
    ],
)
def test_a_profile_that_does_not_hold_together_is_refused(
    edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = device_profile()
    assert DeviceProfile.model_validate(copy.deepcopy(document))
    edit(document)
    with pytest.raises(ValidationError, match=message):
        DeviceProfile.model_validate(document)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    document = device_profile()
    first.write_text(json.dumps(document))
    second.write_text(json.dumps(dict(reversed(document.items())), indent=4))
    assert read_profile(first).sha256 == read_profile(second).sha256
    document["tables"][0]["call"] = 1.5
    second.write_text(json.dumps(document))
    assert read_profile(first).sha256 != read_profile(second).sha256
    again = DeviceProfile.model_validate(read_profile(first).model_dump(mode="json"))
    assert again == read_profile(first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "p.json is no device profile: Invalid JSON"),
        (b"[" * 100_000, "p.json is no device profile: Invalid JSON"),
        (b"{}", "p.json is no device profile: widthwise_profile: Field required"),
        (b" " * (MAX_BYTES + 1), "p.json has more than 1048576 bytes"),
        (b"\xff\xfe", "p.json is no device profile"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(InvalidSpec, match=message) as caught:
        read_profile(tmp_path / "p.json")
    assert caught.value.pointer == "/constraints/latency_on"


def test_a_key_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({**device_profile(), "\x1b[2J\n": 1}))
    with pytest.raises(InvalidSpec) as caught:
        read_profile(tmp_path / "p.json")
    assert caught.value.message == (
        "p.json is no device profile: \\x1b[2J\\n: Extra inputs are not permitted"
    )


# --- the dry run ----------------------------------------------------------------------------


def planned(spec: dict[str, Any], characters: int = 30, **changes: Any) -> Plan:
    rows = [{"text": f"{i:0{characters}}", "label": str(i % 2)} for i in range(120)]
    table = Table(("text", "label"), rows, list(range(2, 122)), "train.csv")
    asked = {"constraints": {"latency_on": "prf_1"}, **spec}
    return make_plan(
        Spec.model_validate(asked),
        model_info(Checkpoint(TEACHER, {}, None, "huggingface", ())),
        profile({"train": table, "dev": table}),
        DeviceProfile.model_validate(device_profile(**changes)),
    )


def test_a_plan_says_that_latency_will_be_predicted() -> None:
    assert any("not measured but predicted for Test Board" in each for each in planned({}).warnings)
    unsaid = planned({"constraints": {}})
    assert not any("predicted for" in warning for warning in unsaid.warnings)


@pytest.mark.parametrize(
    ("spec", "changes", "pointer", "message"),
    [
        ({}, {"heads": (2, 4)}, "/constraints/latency_on", "w1_4 cannot be predicted: heads 1"),
        ({}, {"ffn": (32, 64)}, "/constraints/latency_on", "w1_4 cannot be predicted: neurons 16"),
        ({}, {"hidden": 16}, "/constraints/latency_on", "hidden 16"),
        (
            {"latency": {"seq_len": 32}},
            {"seq_len": (4, 16)},
            "/constraints/latency_at/seq_len",
            "tokens 32 lies outside",
        ),
        ({"latency": {"threads": 2}}, {}, "/constraints/latency_at/threads", "threads 2"),
        ({"export": {"formats": ["paddle"]}}, {}, "/export/formats", "for files in onnx: name one"),
    ],
)
def test_a_plan_refuses_what_cannot_be_predicted(
    spec: dict[str, Any], changes: dict[str, Any], pointer: str, message: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        planned(spec, **changes)
    assert caught.value.pointer == pointer
    assert message in caught.value.message


def test_a_length_that_only_dev_will_tell_is_a_warning() -> None:
    short = {"seq_len": (2, 5)}
    told = [each for each in planned({}, **short).warnings if "estimated as 10" in each]
    assert len(told) == 1 and "name a length in latency_at" in told[0]
    named = planned({"constraints": {"latency_on": "prf_1", "latency_at": {"seq_len": 4}}}, **short)
    assert not any("estimated" in warning for warning in named.warnings)
