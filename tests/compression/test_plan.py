"""A plan holds spec, model and dataset against each other, and deals out the rows it promised."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import cost
from compression.errors import InvalidDataset, InvalidSpec
from compression.plan import (
    Examples,
    ModelInfo,
    Plan,
    deadlines,
    make_plan,
    model_info,
    resolve_rows,
)
from compression.spec import Spec
from compression.supernet import subnetwork_name
from compression.tables import Table, profile
from compression.teachers import Checkpoint, EncoderConfig

CONFIG = EncoderConfig(
    family="bert",
    vocab_size=50,
    hidden=32,
    layers=2,
    heads=(4, 4),
    head_dim=8,
    ffn=(64, 64),
    max_positions=128,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    activation="gelu",
    hidden_dropout=0.1,
    attention_dropout=0.1,
    pad_token_id=0,
    num_labels=2,
)


def model(
    num_labels: int | None = 2, labels: tuple[str, ...] | None = None, **changes: Any
) -> ModelInfo:
    config = dataclasses.replace(CONFIG, num_labels=num_labels, **changes)
    return model_info(Checkpoint(config, {}, labels, "huggingface", ()))


def table(labels: Sequence[str | None], texts: Sequence[str] | None = None, **more: Any) -> Table:
    """Rows on lines 2, 3, ... with columns text and label, and those in `more` beside them."""
    columns = {"text": texts or [f"text {i}" for i in range(len(labels))], "label": labels, **more}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Table(tuple(columns), rows, list(range(2, len(rows) + 2)), "")


def named(**splits: Table) -> dict[str, Table]:
    return {s: dataclasses.replace(each, file=f"{s}.csv") for s, each in splits.items()}


def plan_of(
    spec: dict[str, Any] | None = None, info: ModelInfo | None = None, **splits: Table
) -> Plan:
    return make_plan(Spec.model_validate(spec or {}), info or model(), profile(named(**splits)))


TRAIN = table(["0", "1"] * 20)
DEV = table(["0", "1"] * 60)


def refused_spec(
    pointer: str, spec: dict[str, Any] | None = None, info: ModelInfo | None = None, **splits: Table
) -> str:
    with pytest.raises(InvalidSpec) as caught:
        plan_of(spec, info, **(splits or {"train": TRAIN, "dev": DEV}))
    assert caught.value.pointer == pointer
    return caught.value.message


def refused_rows(spec: dict[str, Any] | None = None, **splits: Table) -> InvalidDataset:
    with pytest.raises(InvalidDataset) as caught:
        plan_of(spec, **splits)
    return caught.value


# --- the model ------------------------------------------------------------------------------


def test_model_info_survives_json() -> None:
    info = model(labels=("no", "yes"))
    assert ModelInfo.model_validate_json(info.model_dump_json()) == info
    assert info.legal_widths == (1, Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
    assert EncoderConfig.from_dict(info.encoder).num_labels == 2
    assert info.parameters == cost.parameters(CONFIG)


def test_columns_to_group_by_stand_in_every_split_that_is_compared() -> None:
    spec = {"report": {"slices": ["text", "source"]}}
    dev = table(["0", "1"] * 60, source=["web"] * 120)
    assert plan_of(spec, train=TRAIN, dev=dev)  # train is not compared
    without = refused_spec("/report/slices/1", spec, train=TRAIN, dev=DEV)
    assert without == (
        "dev.csv has no column 'source' to group rows by; its columns are text, label"
    )
    assert "test.csv has no" in refused_spec(
        "/report/slices/1", spec, train=TRAIN, dev=dev, test=DEV
    )
    assert "train.csv has no" in refused_spec("/report/slices/1", spec, train=TRAIN)  # dev's rows
    lists = table(["0", "1"] * 60, source=[("web", "mail")] * 120)
    assert "holds lists" in refused_spec("/report/slices/1", spec, train=TRAIN, dev=lists)


# --- sub-networks ---------------------------------------------------------------------------


def test_a_plan_survives_json_and_lists_the_subnetworks() -> None:
    plan = plan_of(train=TRAIN, dev=DEV)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert [each.name for each in plan.subnetworks] == ["w1", "w3_4", "w1_2", "w1_4"]
    assert [each.heads for each in plan.subnetworks] == [(4, 4), (3, 3), (2, 2), (1, 1)]
    assert [each.ffn for each in plan.subnetworks] == [(64, 64), (48, 48), (32, 32), (16, 16)]
    full, *narrower = plan.subnetworks
    assert full.parameters == cost.parameters(CONFIG)
    assert full.flops == cost.flops(CONFIG, plan.seq_len)
    sizes = [each.predicted_bytes["onnx"] for each in plan.subnetworks]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 4 * full.parameters
    assert all(full.flops > each.flops and full.parameters > each.parameters for each in narrower)


def test_only_the_formats_asked_for_are_predicted() -> None:
    plan = plan_of({"export": {"formats": ["onnx"]}}, train=TRAIN, dev=DEV)
    assert set(plan.subnetworks[0].predicted_bytes) == {"onnx"}


def test_a_head_still_to_be_trained_is_counted() -> None:
    plan = plan_of(info=model(None), train=TRAIN, dev=DEV)
    assert plan.fine_tune
    assert plan.subnetworks[0].parameters == cost.parameters(CONFIG)


@pytest.mark.parametrize(("widths", "index"), [(["1", "2/3"], 1), (["1/8"], 0), ([0.3, 1], 0)])
def test_a_width_without_whole_heads_is_refused(widths: list[Any], index: int) -> None:
    message = refused_spec(f"/supernet/width_mults/{index}", {"supernet": {"width_mults": widths}})
    assert "1, 3/4, 1/2, 1/4" in message


def test_every_width_is_planned_at_every_depth() -> None:
    info = model(layers=6, heads=(4,) * 6, ffn=(64,) * 6)
    spec = {"supernet": {"width_mults": ["1/2", 1], "depth_mults": ["1/2", 1, "2/3"]}}
    plan = plan_of(spec, info, train=TRAIN, dev=DEV)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert [each.name for each in plan.subnetworks] == [
        "w1", "w1-d2_3", "w1-d1_2", "w1_2", "w1_2-d2_3", "w1_2-d1_2"
    ]  # fmt: skip
    full, _, half_depth, *_, smallest = plan.subnetworks
    assert (half_depth.layers, half_depth.heads) == ((0, 2, 4), (4, 4, 4))
    assert (smallest.layers, smallest.ffn) == ((0, 2, 4), (32, 32, 32))
    shallow = dataclasses.replace(CONFIG, layers=3, heads=(4,) * 3, ffn=(64,) * 3)
    assert half_depth.parameters == cost.parameters(shallow)
    assert half_depth.flops == cost.flops(shallow, plan.seq_len)
    assert half_depth.predicted_bytes["onnx"] < full.predicted_bytes["onnx"]


@pytest.mark.parametrize(("depths", "index"), [(["1", "3/4"], 1), (["1/12"], 0), ([0.7, 1], 0)])
def test_a_depth_without_whole_layers_is_refused(depths: list[Any], index: int) -> None:
    info = model(layers=6, heads=(4,) * 6, ffn=(64,) * 6)
    message = refused_spec(
        f"/supernet/depth_mults/{index}", {"supernet": {"depth_mults": depths}}, info
    )
    assert "of the 6 layers is" in message
    assert message.endswith("this model can have the depths 1, 5/6, 2/3, 1/2, 1/3, 1/6")


def test_a_width_for_each_layer_needs_a_budget_two_widths_and_rows() -> None:
    searched = {"supernet": {"per_layer": {}}}
    assert "set constraints.max_latency_ms" in refused_spec("/supernet/per_layer", searched)
    budget = {**searched, "constraints": {"max_size_mb": 1}}
    few = refused_spec("/supernet/per_layer", budget, train=table(["0", "1"] * 19), dev=DEV)
    assert few.startswith("a fifth of the 38 rows of train are too few")
    one = {**budget, "supernet": {"per_layer": {}, "width_mults": ["1/2"]}}
    assert "at least two width_mults" in refused_spec("/supernet/per_layer", one)
    timed = {"constraints": {"max_latency_ms": 1}}
    few = refused_spec(
        "/supernet/per_layer/latency_samples",
        {**timed, "supernet": {"per_layer": {"latency_samples": 5}}},
        train=TRAIN,
        dev=DEV,
    )
    assert few.startswith("three quarters of the 5 measured sub-networks are too few")


def test_what_a_search_adds_to_the_time() -> None:
    size, time = {"constraints": {"max_size_mb": 1}}, {"constraints": {"max_latency_ms": 1}}

    def seconds(stage: str, changes: dict[str, Any] = size, **per_layer: Any) -> float:
        spec = {**size, "supernet": {"per_layer": per_layer}, **changes} if per_layer else changes
        return plan_of(spec, train=TRAIN, dev=DEV).predicted_stage_seconds[stage]

    plain, exported = seconds("finish"), 3 * 3 * 6  # three finalists in three formats
    assert seconds("finish", finalists=3) == pytest.approx(plain + exported, abs=1)
    more = seconds("finish", finalists=3, budget_shares=[1, 0.5])
    assert more == pytest.approx(plain + 2 * exported, abs=1)
    assert seconds("search") == seconds("refine") == 0
    assert 0 < seconds("search", finalists=3) < 6
    timed = seconds("search", time, latency_samples=24)
    assert timed > 24 * 6
    assert seconds("search", time, latency_samples=48) > timed + 24 * 6
    alone = {"refinement": {"subnetworks": ["finalists"], "max_steps": 2}}
    assert seconds("refine", alone, finalists=3) > 0
    assert seconds("refine", alone, finalists=6) == pytest.approx(
        2 * seconds("refine", alone, finalists=3)
    )


def test_a_step_takes_four_networks_where_there_are_widths_for_each_layer() -> None:
    """Largest, smallest and two between, of which one at least has widths of its own."""

    def seconds(stage: str, widths: list[str], **supernet: Any) -> float:
        spec = {
            "constraints": {"max_size_mb": 1},
            "supernet": {"width_mults": widths, **supernet},
            "distillation": {"max_steps": 2},
            "final": {"when": "always", "max_steps": 2},
        }
        return plan_of(spec, train=TRAIN, dev=DEV).predicted_stage_seconds[stage]

    per_layer: dict[str, Any] = {"per_layer": {}}
    two, three = ["1", "1/2"], ["1", "3/4", "1/2"]
    assert seconds("final", two, **per_layer) == pytest.approx(2 * seconds("final", two))
    assert seconds("final", three, **per_layer) == pytest.approx(4 / 3 * seconds("final", three))
    more = seconds("distil", two, **per_layer) - seconds("distil", two)
    assert more == pytest.approx(seconds("final", two))
    deep = {"depth_mults": ["1", "1/2"]}
    assert seconds("depth", two, **per_layer, **deep) > seconds("depth", two, **deep)
    many = ["1", "3/4", "1/2", "1/4"]
    assert seconds("final", many, **per_layer) == pytest.approx(seconds("final", many))


def test_what_a_refinement_adds_to_the_time() -> None:
    def seconds(*names: str, steps: int = 2) -> float:
        spec = {"refinement": {"subnetworks": names, "max_steps": steps}}
        return plan_of(spec, train=TRAIN, dev=DEV).predicted_stage_seconds["refine"]

    assert seconds() == 0
    assert 0 < seconds("w1_4") < seconds("w1_2")
    assert seconds("w1_4", "w1_2") == pytest.approx(seconds("w1_4") + seconds("w1_2"))
    assert seconds("w1_4", steps=4) == pytest.approx(2 * seconds("w1_4"))


@pytest.mark.parametrize(
    ("names", "place", "words"),
    [
        (["w1_2", "w1_3"], 1, "'w1_3' is no sub-network of this job: there are w1, w3_4, w1_2"),
        (["w1_2-d1_2"], 0, "'w1_2-d1_2' is no sub-network of this job"),
        (["finalists"], 0, "the spec asks for none: add supernet.per_layer"),
    ],
)
def test_only_sub_networks_of_the_job_are_refined(names: list[str], place: int, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words) as refused:
        plan_of({"refinement": {"subnetworks": names}}, train=TRAIN, dev=DEV)
    assert refused.value.pointer == f"/refinement/subnetworks/{place}"


def test_what_a_search_will_find_is_refined_by_one_word() -> None:
    searched = {"constraints": {"max_size_mb": 1}, "supernet": {"per_layer": {}}}
    with pytest.raises(InvalidSpec, match="there are w1, w3_4, w1_2, w1_4, and finalists for all"):
        plan_of({**searched, "refinement": {"subnetworks": ["p1"]}}, train=TRAIN, dev=DEV)


def test_finalists_are_judged_and_measured_for_as_long_as_the_named_ones() -> None:
    """Of a network so large that it is no longer the exports that take the time."""
    large = model(hidden=3200, head_dim=800)

    def seconds(stage: str, **changes: Any) -> float:
        spec = {"constraints": {"max_latency_ms": 1}, "export": {"formats": ["onnx"]}} | changes
        plan = plan_of(spec, large, train=TRAIN, dev=DEV)
        return plan.predicted_stage_seconds[stage]

    def searched(widths: list[str], **per_layer: Any) -> dict[str, Any]:
        return {"width_mults": widths, "per_layer": per_layer}

    two = ["1", "1/2"]
    plain = seconds("finish", supernet={"width_mults": two})
    again = seconds("finish", supernet=searched(two, finalists=2)) - plain
    assert again > 2 * 6 + 3  # seconds; a file's export takes 6
    more = seconds("finish", supernet=searched(two, finalists=2, budget_shares=[1, 0.5]))
    assert more == pytest.approx(plain + 2 * again)
    # Files are timed as the constraints ask, and all the named ones are scored.
    few = {
        "latency": {"rounds": 20, "batch_sizes": [8]},
        "supernet": searched(two, latency_samples=4, population=4),
    }
    once = seconds("search", **few)
    eight = few | {"constraints": {"max_latency_ms": 1, "latency_at": {"batch_size": 8}}}
    assert seconds("search", **eight) > once + 10
    sizes = {"constraints": {"max_size_mb": 1e6}}
    widths = [f"{number}/4" for number in (1, 2, 3)] + ["1"]
    deep = {"width_mults": widths, "depth_mults": ["1", "1/2"]}
    first = {"population": 4, "generations": 0}
    assert seconds("search", supernet=deep | {"per_layer": first}, **sizes) == pytest.approx(
        seconds("search", supernet=deep | {"per_layer": first | {"population": 8}}, **sizes)
    )


def test_a_width_must_suit_every_layer() -> None:
    info = model(heads=(4, 2))
    message = refused_spec(
        "/supernet/width_mults/1", {"supernet": {"width_mults": [1, "1/4"]}}, info
    )
    assert "layer 1" in message
    refused_spec(
        "/supernet/width_mults/0", {"supernet": {"width_mults": ["3/4"]}}, model(ffn=(64, 62))
    )


def test_the_engine_paddleslim_is_held_against_the_model() -> None:
    spec = {"engine": "paddleslim", "supernet": {"width_mults": ["1", "1/2"]}}
    assert (
        plan_of(spec, train=TRAIN, dev=DEV).subnetworks
        == plan_of({**spec, "engine": "widthwise"}, train=TRAIN, dev=DEV).subnetworks
    )
    info = model(activation="gelu_new")
    assert "gelu_new" in refused_spec("/engine", spec, info, train=TRAIN, dev=DEV)
    assert plan_of(info=info, train=TRAIN, dev=DEV).subnetworks


def test_names_of_subnetworks_are_safe_as_folders() -> None:
    assert subnetwork_name(Fraction(11, 12)) == "w11_12"
    assert subnetwork_name(Fraction(1)) == "w1"


def test_lengths_are_held_against_the_positions() -> None:
    info = model(max_positions=64)
    refused_spec("/task/max_seq_len", {}, info)
    refused_spec(
        "/latency/seq_len", {"task": {"max_seq_len": 64}, "latency": {"seq_len": 65}}, info
    )
    refused_spec(
        "/latency/seq_lens/1",
        {"task": {"max_seq_len": 64}, "latency": {"seq_lens": [64, 65]}},
        info,
    )
    assert plan_of({"task": {"max_seq_len": 64}}, info, train=TRAIN, dev=DEV).seq_len <= 64


def test_a_constraint_on_a_latency_that_is_not_measured_is_refused() -> None:
    for name, listed in (
        ("batch_size", "batch_sizes"),
        ("seq_len", "seq_lens"),
        ("threads", "thread_counts"),
    ):
        constraints = {"max_latency_ms": 9, "latency_at": {name: 16}}
        refused_spec(f"/constraints/latency_at/{name}", {"constraints": constraints}, model())
        spec = {"constraints": constraints, "latency": {listed: [16]}}
        assert plan_of(spec, model(), train=TRAIN, dev=DEV).subnetworks


def test_more_work_is_predicted_to_take_longer() -> None:
    large = model(hidden=3200, head_dim=800)  # a shape: no weights are made

    def seconds(**spec: Any) -> float:
        return plan_of(spec, large, train=TRAIN, dev=DEV).predicted_seconds

    usual = seconds()
    assert seconds(distillation={"epochs": 100}) > usual
    assert seconds(distillation={"epochs": 100, "max_steps": 1}) < usual
    assert seconds(supernet={"width_mults": [1]}) < usual
    assert seconds(teacher={"when": "always", "epochs": 100}) > usual
    assert seconds(supernet={"depth_mults": [1, "1/2"]}) > usual


def test_a_step_of_the_depth_stage_costs_no_more_for_more_combinations() -> None:
    large = model(hidden=3200, head_dim=800, layers=12, heads=(4,) * 12, ffn=(64,) * 12)

    def depth(*depths: str) -> float:
        spec = {"supernet": {"depth_mults": ["1", *depths, "1/12"]}}
        plan = plan_of(spec, large, train=TRAIN, dev=DEV)
        return plan.predicted_stage_seconds["depth"]

    assert plan_of({}, large, train=TRAIN, dev=DEV).predicted_stage_seconds["depth"] == 0
    assert depth("1/2") > 0
    assert depth("5/6", "2/3", "1/3", "1/6") == pytest.approx(depth("1/2"), rel=0.2)


def test_int8_is_predicted_to_need_its_own_answers_and_the_teacher_in_fp32_alone() -> None:
    large = model(hidden=3200, head_dim=800)

    def finish(formats: list[str], **latency: Any) -> float:
        spec = {"export": {"formats": formats}, "latency": {"seq_len": 8, **latency}}
        plan = plan_of(spec, large, train=TRAIN, dev=DEV)
        return plan.predicted_stage_seconds["finish"]

    plain, both = finish(["onnx"]), finish(["onnx", "onnx-int8-static"])
    assert both > plain + 4 * 2 * 6  # of each width a file and its answers to dev
    # The teacher in fp32 is what speed-ups are against, whether or not it is asked for.
    asked = finish(["onnx-int8-static"], baselines=["onnx"])
    assert asked == finish(["onnx-int8-static"], baselines=[])
    in_int8 = finish(["onnx-int8-static"], baselines=["onnx-int8-static"])
    assert in_int8 > asked + 2 * 6  # a file and its answers to dev
    # Unless told otherwise, what one would do instead of compressing is measured beside it.
    assert finish(["onnx-int8-static"]) == in_int8
    assert finish(["paddle"]) == finish(["paddle"], baselines=[])


def test_tokens_are_removed_of_wordpiece_alone_and_sizes_are_told_as_an_upper_bound() -> None:
    asked = {"vocabulary": {"remove_unused": True}, "constraints": {"max_size_mb": 1e-3}}
    bpe = model().model_copy(update={"tokenizer": "BPE"})
    message = refused_spec("/vocabulary/remove_unused", asked, bpe)
    assert message.startswith("the model's tokenizer is BPE")
    for kind in ("WordPiece", None):  # not known of models from before: the job will say it
        info = model().model_copy(update={"tokenizer": kind})
        warnings = plan_of(asked, info, train=TRAIN, dev=DEV).warnings
        assert any("predicted with the whole vocabulary" in warning for warning in warnings)
        assert not any("max_size_mb" in warning for warning in warnings)


def test_a_time_budget_is_shared_out_by_what_is_predicted() -> None:
    large = model(None, hidden=3200, head_dim=800)
    assert deadlines(Spec(), plan_of({}, large, train=TRAIN, dev=DEV)) == {
        "teacher": None,
        "distil": None,
        "depth": None,
        "final": None,
        "refine": None,
    }
    spec = {"max_minutes": 2}
    plan = plan_of(spec, large, train=TRAIN, dev=DEV)
    parts = plan.predicted_stage_seconds
    assert plan.predicted_seconds == pytest.approx(20 + sum(parts.values()), rel=0.05)
    assert parts["finish"] > 15 * 6  # exports
    until = deadlines(Spec.model_validate(spec), plan)
    assert until["distil"] == pytest.approx(120 - parts["finish"])
    assert until["teacher"] is not None and until["distil"] is not None
    assert until["teacher"] / until["distil"] == pytest.approx(
        parts["teacher"] / (parts["teacher"] + parts["importance"] + parts["distil"])
    )
    assert until["final"] == until["depth"] == until["distil"]
    deep = {"max_minutes": 20, "supernet": {"depth_mults": [1, "1/2"]}}
    deeper = deadlines(Spec.model_validate(deep), plan_of(deep, large, train=TRAIN, dev=DEV))
    assert deeper["distil"] is not None and deeper["depth"] is not None
    assert deeper["distil"] < deeper["depth"] == deeper["final"]
    tuned = {**spec, "final": {"when": "always"}}
    later = deadlines(Spec.model_validate(tuned), plan_of(tuned, large, train=TRAIN, dev=DEV))
    assert later["final"] == until["final"]
    assert later["distil"] is not None and later["distil"] < until["distil"]
    searched = {
        "max_minutes": 10,
        "constraints": {"max_latency_ms": 1},
        "supernet": {"per_layer": {"latency_samples": 12}},
        "refinement": {"subnetworks": ["finalists"], "max_steps": 2},
    }
    plan_with_refinement = plan_of(searched, large, train=TRAIN, dev=DEV)
    parts = plan_with_refinement.predicted_stage_seconds
    last = deadlines(Spec.model_validate(searched), plan_with_refinement)
    assert last["refine"] == pytest.approx(600 - parts["finish"])
    assert last["final"] is not None and last["refine"] is not None
    assert last["refine"] - last["final"] > parts["search"] > 12 * 6
    # What a search does not take is no gift beyond the budget.
    tight = searched | {"max_minutes": (parts["finish"] + parts["search"] / 2) / 60}
    plan_of_little = plan_of(tight, large, train=TRAIN, dev=DEV)
    last = deadlines(Spec.model_validate(tight), plan_of_little)
    assert last["final"] == 0 and last["refine"] == pytest.approx(parts["search"] / 2)
    (warning,) = (each for each in plan_of_little.warnings if "max_minutes" in each)
    assert f"{(parts['finish'] + parts['search']) / 60:.2g} are set aside" in warning
    # A model that keeps its head is not fine-tuned, and a budget can be too small for anything.
    kept = plan_of({}, model(hidden=3200, head_dim=800), train=TRAIN, dev=DEV)
    assert kept.predicted_stage_seconds["teacher"] == 0
    assert set(deadlines(Spec(max_minutes=0.1), plan).values()) == {0}
    (warning,) = (each for each in plan.warnings if "max_minutes" in each)
    assert "training will stop early" in warning
    long = plan_of({"max_minutes": 1000}, large, train=TRAIN, dev=DEV)
    assert not any("max_minutes" in each for each in long.warnings)


# --- columns --------------------------------------------------------------------------------


def test_the_specs_columns_win_over_the_guess() -> None:
    other = [f"other {i}" for i in range(40)]
    train = table(["0", "1"] * 20, note=other, kind=["a", "b", "c", "d"] * 10)
    plan = plan_of({"task": {"text": "note", "label": "kind"}}, model(None), train=train)
    assert (plan.text, plan.text_pair, plan.label) == ("note", None, "kind")
    assert plan.labels == ("a", "b", "c", "d")
    plan = plan_of({"task": {"text_pair": "note"}}, train=train)
    assert (plan.text, plan.text_pair, plan.label) == ("text", "note", "label")


def test_naming_the_text_says_that_there_is_no_pair() -> None:
    texts = [f"x {i}" for i in range(40)]
    train = table(["0", "1"] * 20, sentence1=texts, sentence2=texts)
    assert plan_of(train=train).text_pair == "sentence2"
    assert plan_of({"task": {"text": "sentence1"}}, train=train).text_pair is None


@pytest.mark.parametrize(
    ("task", "pointer", "says"),
    [
        ({"text": "nope"}, "/task/text", "'nope'"),
        ({"text_pair": "nope"}, "/task/text_pair", "text, label"),
        ({"label": "nope"}, "/task/label", "text, label"),
        ({"text": "label", "label": "label"}, "/task/label", "text and as label"),
        ({"text": "text", "text_pair": "text"}, "/task/text_pair", "both sentences"),
        ({"label": "text", "text": "label"}, "/task/label", "40 distinct values in 40 rows"),
    ],
)
def test_columns_that_cannot_be_meant(task: dict[str, str], pointer: str, says: str) -> None:
    assert says in refused_spec(pointer, {"task": task})


def test_a_column_must_stand_in_every_split_that_needs_it() -> None:
    pair = table(["0", "1"] * 20, text_pair=["x"] * 40)
    message = refused_spec("/task/text_pair", {}, None, train=pair, dev=DEV)
    assert "dev.csv has no column 'text_pair'" in message
    texts = Table(("words",), [{"words": "a"}], [2])
    assert "unlabelled.csv" in refused_spec("/task/text", {}, None, train=TRAIN, unlabelled=texts)


def test_a_label_that_cannot_be_guessed_is_asked_for() -> None:
    train = Table(
        ("text", "genre", "source"),
        [{"text": f"t{i}", "genre": str(i % 2), "source": str(i % 3)} for i in range(12)],
        list(range(2, 14)),
    )
    assert "genre, source" in refused_spec("/task/label", {}, None, train=train)
    assert plan_of({"task": {"label": "genre"}}, train=train).labels == ("0", "1")


def test_a_pair_needs_no_token_types() -> None:
    train = table(["0", "1"] * 20, text_pair=["x"] * 40)
    for types in (0, 1, 2):  # DistilBERT's, RoBERTa's and BERT's
        assert plan_of(info=model(type_vocab_size=types), train=train).text_pair == "text_pair"


def test_positions_below_the_offset_hold_no_tokens() -> None:
    info = model(max_positions=66, position_offset=2)
    assert info.max_positions == 64
    plan_of({"task": {"max_seq_len": 64}}, info, train=TRAIN)
    message = refused_spec("/task/max_seq_len", {"task": {"max_seq_len": 65}}, info, train=TRAIN)
    assert "the model's 64 positions" in message


# --- labels ---------------------------------------------------------------------------------


def test_empty_labels_are_named_by_line() -> None:
    error = refused_rows(train=table(["0", "1", "", "0", None, "1"]), dev=table(["0", " "]))
    assert [(row.file, row.line) for row in error.rows] == [
        ("train.csv", 4),
        ("train.csv", 6),
        ("dev.csv", 3),
    ]
    assert error.pointer == "train.csv"


def test_labels_that_train_does_not_have_are_named_by_line() -> None:
    error = refused_rows(train=TRAIN, dev=DEV, test=table(["0", "-1", "-1", "2"]))
    lines = [(row.file, row.line) for row in error.rows]
    assert lines == [("test.csv", 3), ("test.csv", 4), ("test.csv", 5)]
    assert error.message.endswith("(3 rows in all)")
    assert "'-1' is not in train" in error.message


def test_a_named_label_column_with_one_class_is_refused() -> None:
    train = table(["0", "1"] * 20, constant=["x"] * 40)
    assert "one class" in refused_rows({"task": {"label": "constant"}}, train=train).message


@pytest.mark.parametrize(
    ("found", "names", "expected", "called"),
    [
        (["1", "0"], None, ("0", "1"), ("0", "1")),
        (["pos", "neg"], ("neg", "pos"), ("neg", "pos"), ("neg", "pos")),
        # Not in alphabetical order: the model's order counts.
        (["a", "b"], ("b", "a"), ("b", "a"), ("b", "a")),
        # Numbers count as positions, unless they are the names themselves.
        (["1", "0"], ("neg", "pos"), ("0", "1"), ("neg", "pos")),
        (["1", "0"], ("1", "0"), ("1", "0"), ("1", "0")),
        (["1.0", "0.0"], None, ("0.0", "1.0"), ("0.0", "1.0")),
    ],
)
def test_labels_are_mapped_to_the_head(
    found: list[str],
    names: tuple[str, ...] | None,
    expected: tuple[str, ...],
    called: tuple[str, ...],
) -> None:
    plan = plan_of(info=model(2, names), train=table(found * 20))
    assert plan.labels == expected
    assert plan.label_names == called
    assert not plan.fine_tune


def test_a_head_may_have_outputs_that_the_dataset_lacks() -> None:
    plan = plan_of(info=model(3), train=table(["2", "0"] * 20))
    assert plan.labels == ("0", "1", "2")
    assert any("no row of train has the label 1" in warning for warning in plan.warnings)
    names = ("no", "maybe", "yes")
    assert plan_of(info=model(3, names), train=table(["no", "yes"] * 20)).labels == names


@pytest.mark.parametrize(
    ("found", "info", "says"),
    [
        (["good", "bad"], model(2), "which output means which label"),
        (["good", "bad"], model(2, ("POSITIVE", "NEGATIVE")), "POSITIVE, NEGATIVE"),
        (["1", "2"], model(2), "which output means which label"),
        (["1", "1.0"], model(2), "which output means which label"),
        (["0", "1", "2"], model(2), "3 labels (0, 1, 2) and the model 2 outputs"),
    ],
)
def test_labels_that_cannot_be_mapped_are_asked_for(
    found: list[str], info: ModelInfo, says: str
) -> None:
    assert says in refused_spec("/task/labels", {}, info, train=table(found * 20))


def test_the_specs_order_of_labels_counts() -> None:
    spec = {"task": {"labels": ["good", "bad"]}}
    splits = {"train": table(["bad", "good"] * 20), "dev": table(["bad", "good"])}
    plan = plan_of(spec, model(2, ("POSITIVE", "NEGATIVE")), **splits)
    assert plan.labels == ("good", "bad")
    assert plan.label_names == ("POSITIVE", "NEGATIVE")
    rows = resolve_rows(Spec.model_validate(spec), plan, named(**splits), 0)
    assert rows["dev"].labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "info", "says"),
    [
        (["0", "0"], model(2), "twice"),
        (["0", "2"], model(2), "not listed: 1"),
        (["0", "1", "2"], model(2), "3 labels are listed, and the model has 2 outputs"),
    ],
)
def test_a_wrong_order_of_labels_is_refused(labels: list[str], info: ModelInfo, says: str) -> None:
    assert says in refused_spec("/task/labels", {"task": {"labels": labels}}, info)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["01", "1", "0"], ("0", "01", "1")),
    ],
)
def test_a_new_head_has_the_labels_in_order(found: list[str], expected: tuple[str, ...]) -> None:
    plan = plan_of(info=model(None), train=table(found * 20))
    assert plan.labels == plan.label_names == expected


def test_when_to_fine_tune() -> None:
    names = ("neg", "pos")
    splits = {"train": table(["x", "y"] * 20), "dev": table(["x", "y"])}
    always = plan_of({"teacher": {"when": "always"}}, model(3, ("a", "b", "c")), **splits)
    assert always.fine_tune
    assert always.labels == always.label_names == ("x", "y")
    refused_spec("/teacher/when", {"teacher": {"when": "never"}}, model(None))
    listed = {"labels": ["x", "y", "z"]}
    said = refused_spec("/task/labels", {"task": listed}, model(None), **splits)
    assert "no row of train has the label z" in said
    assert "one output for regression" in refused_spec("/task/kind", {}, model(1))
    never = plan_of({"teacher": {"when": "never"}}, model(2, names), train=TRAIN, dev=DEV)
    assert not never.fine_tune


# --- several labels, and scores -------------------------------------------------------------

MARKS = table(["a;b", "b", "", "c ;a", "b"] * 8)
SEVERAL = {"task": {"kind": "multi_label", "separator": ";"}}


def test_labels_of_a_row_are_split_or_listed_and_become_marks() -> None:
    plan = plan_of(SEVERAL, model(None), train=MARKS)
    assert (plan.labels, plan.label_names) == (("a", "b", "c"), ("a", "b", "c"))
    assert plan.rows == {"train": 36, "dev": 4}
    listed = table([("a", "b"), ("b",), (), ("c", "a"), ("b", "b")] * 8)
    assert plan_of(SEVERAL, model(None), train=listed).labels == plan.labels
    for train in (MARKS, listed):
        spec, splits = Spec.model_validate(SEVERAL), {"train": train, "dev": train}
        given = plan_of(SEVERAL, model(None), **splits)
        rows = resolve_rows(spec, given, named(**splits), 0)["dev"]
        assert rows.labels is not None
        assert rows.labels.dtype == "float32"
        expected = [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]]
        assert rows.labels[:5].tolist() == expected


def test_a_model_with_a_head_gives_several_labels_their_order() -> None:
    plan = plan_of(SEVERAL, model(3, ("c", "b", "a")), train=MARKS, dev=MARKS)
    assert (plan.labels, plan.fine_tune) == (("c", "b", "a"), False)


def test_what_is_wrong_with_several_labels_is_named() -> None:
    error = refused_rows(SEVERAL, train=MARKS, dev=table(["a", "x;b", "b;x"]))
    assert [(row.file, row.line) for row in error.rows] == [("dev.csv", 3), ("dev.csv", 4)]
    assert "'x' is not in train (2 rows in all)" in error.message
    assert "needs two" in refused_rows(SEVERAL, train=table(["a", ""] * 20)).message
    unlike = table([f"{i};{i + 1}" for i in range(40)], other=["0", "1"] * 20)
    asked = {"task": {**SEVERAL["task"], "label": "label"}}
    assert "write lists" in refused_spec("/task/label", asked, model(None), train=unlike)
    plan = plan_of(SEVERAL, model(None), train=MARKS)
    with pytest.raises(InvalidDataset, match=r"null.*2 rows in all") as caught:
        broken = named(train=table(["a", None, "b", None]))
        resolve_rows(Spec.model_validate(SEVERAL), plan, broken, 0)
    assert [row.line for row in caught.value.rows] == [3, 5]


def test_lists_are_labels_of_a_multi_label_task_alone() -> None:
    train = table([("a", "b"), ("b",)] * 20)
    named_label = {"task": {"label": "label"}}
    assert "multi_label" in refused_spec("/task/label", named_label, model(None), train=train)
    words = table(["0", "1"] * 9, tokens=[("a", "b")] * 18)
    named_text = {"task": {"text": "tokens"}}
    assert "holds lists" in refused_spec("/task/text", named_text, None, train=words)


SCORES = {"task": {"kind": "regression"}}
SCORED = table([f"{i / 4}" for i in range(40)])


def test_scores_become_numbers_and_need_one_output() -> None:
    plan = plan_of(SCORES, model(None), train=SCORED)
    assert (plan.labels, plan.label_names) == ((), ("label",))
    assert plan.rows == {"train": 36, "dev": 4}
    one = dataclasses.replace(CONFIG, num_labels=1)
    assert plan.subnetworks[0].parameters == cost.parameters(one)
    splits = {"train": SCORED, "dev": SCORED}
    plan = plan_of(SCORES, model(None), **splits)
    rows = resolve_rows(Spec.model_validate(SCORES), plan, named(**splits), 0)
    assert rows["dev"].labels is not None
    assert rows["dev"].labels.dtype == "float32"
    assert rows["dev"].labels[:3].tolist() == [0, 0.25, 0.5]
    assert not plan_of(SCORES, model(1), train=SCORED).fine_tune
    assert plan_of(SCORES, model(1, ("grade",)), train=SCORED).label_names == ("grade",)
    assert "2 outputs" in refused_spec("/task/kind", SCORES, model(2), train=SCORED)


def test_what_is_wrong_with_scores_is_named() -> None:
    error = refused_rows(SCORES, train=SCORED, dev=table(["1", "good", "nan", "2"]))
    assert [row.line for row in error.rows] == [3, 4]
    assert "is not a number (2 rows in all)" in error.message
    many = refused_rows(SCORES, train=SCORED, dev=table(["1"] * 5 + [None] * 30))
    assert ("is empty (30 rows in all)" in many.message, len(many.rows)) == (True, 10)
    same = table(["1", "2"] * 10, grade=["1.5"] * 20)
    named_label = {"task": {"kind": "regression", "label": "grade"}}
    assert "one value only" in refused_rows(named_label, train=same).message
    listed = {"task": {"kind": "regression", "labels": ["1"]}}
    refused_spec("/task/labels", listed, model(None), train=SCORED)


def test_a_head_for_another_task_is_refused_unless_it_is_replaced() -> None:
    info = model(3).model_copy(update={"head_task": "multi_label"})
    train = table(["0", "1", "2"] * 20)
    said = refused_spec("/task/kind", {}, info, train=train)
    assert "3 outputs for multi_label" in said
    assert plan_of({"teacher": {"when": "always"}}, info, train=train).fine_tune
    plan = plan_of({"task": {"kind": "multi_label", "label": "label"}}, info, train=train)
    assert plan.labels == ("0", "1", "2")


# --- warnings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"constraints": {"max_size_mb": 0.001}}, "max_size_mb"),
        ({"importance": {"split": "dev"}}, "flatters"),
        ({"device": "gpu"}, "two CPU cores"),
        ({"device": "gpu"}, "measured on the worker's CPU"),
    ],
)
def test_what_a_user_should_know(spec: dict[str, Any], says: str) -> None:
    assert not any(says in warning for warning in plan_of(train=TRAIN, dev=DEV).warnings)
    assert any(says in warning for warning in plan_of(spec, train=TRAIN, dev=DEV).warnings)


@pytest.mark.parametrize(
    ("percentile", "rounds", "confidence", "needed"),
    [(50, 50, None, None), (95, 50, None, 59), (95, 59, None, None), (99, 300, 0.99, 459)],
)
def test_a_percentile_of_few_calls_is_warned_of(
    percentile: int, rounds: int, confidence: float | None, needed: int | None
) -> None:
    asked = {
        "latency": {"rounds": rounds},
        "constraints": {
            "max_latency_ms": 5,
            "latency_at": {"percentile": percentile},
            "confidence": confidence,
        },
    }
    warnings = plan_of(asked, train=TRAIN, dev=DEV).warnings
    said = [each for each in warnings if "timed calls" in each]
    assert [f"latency.rounds {needed} " in each for each in said] == [True] * (needed is not None)


def test_unlabelled_rows_are_counted_and_those_that_judge_are_named() -> None:
    texts = Table(("text",), [{"text": "x"}, {"text": "text 7"}], [1, 2])
    plan = plan_of(train=TRAIN, dev=DEV, unlabelled=texts)
    assert plan.rows == {"train": 40, "dev": 120, "unlabelled": 2}
    assert any("1 of 120 rows of dev stand in unlabelled too" in each for each in plan.warnings)


def test_a_small_dev_is_warned_of() -> None:
    assert any("10.0 points" in w for w in plan_of(train=TRAIN, dev=table(["0"] * 10)).warnings)
    assert not any("points" in w for w in plan_of(train=TRAIN, dev=DEV).warnings)


# --- rows -----------------------------------------------------------------------------------


def rows_of(
    seed: int = 0, spec: dict[str, Any] | None = None, **splits: Table
) -> dict[str, Examples]:
    plan = plan_of(spec, model(None), **splits)
    return resolve_rows(Spec.model_validate(spec or {}), plan, named(**splits), seed)


def test_rows_keep_texts_labels_and_lines() -> None:
    train = table(
        ["b", "a", "b", "a"], ["one", "two", "three", "four"], text_pair=["p", None, "q", "r"]
    )
    rows = rows_of(train=train, dev=table(["a"], ["five"], text_pair=["s"]))
    assert rows["train"].texts == ["one", "two", "three", "four"]
    assert rows["train"].pairs == ["p", "", "q", "r"]
    assert rows["train"].labels.tolist() == [1, 0, 1, 0]
    assert rows["train"].labels.dtype == "int64"
    assert rows["train"].lines == [2, 3, 4, 5]
    assert len(rows["dev"]) == 1


def test_unlabelled_rows_have_no_label() -> None:
    texts = Table(("text",), [{"text": "x"}, {"text": None}], [1, 2])
    rows = rows_of(train=TRAIN, unlabelled=texts)
    assert rows["unlabelled"].labels is None
    assert rows["unlabelled"].texts == ["x", ""]
    assert list(rows) == ["train", "dev", "unlabelled"]


def test_a_given_dev_is_left_alone() -> None:
    plan = plan_of(train=TRAIN, dev=DEV)
    assert not plan.dev_from_train
    assert plan.rows == {"train": 40, "dev": 120}
    assert len(rows_of(train=TRAIN, dev=DEV)["train"]) == 40


def test_a_dev_from_train_depends_on_the_seed_alone() -> None:
    first, again, other = (rows_of(seed, train=DEV)["dev"].lines for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_dev_from_train_is_a_tenth_of_each_label() -> None:
    train = table(["a"] * 200 + ["b"] * 100 + ["c"] * 10 + ["d"])
    plan = plan_of(info=model(None), train=train)
    assert plan.dev_from_train
    assert plan.rows == {"train": 280, "dev": 31}
    dev = rows_of(train=train)["dev"]
    assert Counter(dev.labels.tolist()) == {0: 20, 1: 10, 2: 1}
    assert any("31 rows of train become dev" in warning for warning in plan.warnings)


def test_rows_with_a_label_the_plan_lacks_are_refused() -> None:
    plan = plan_of(train=TRAIN)
    with pytest.raises(InvalidDataset) as caught:
        resolve_rows(Spec(), plan, named(train=table(["0", "9", None])), 0)
    assert [(row.file, row.line) for row in caught.value.rows] == [
        ("train.csv", 3),
        ("train.csv", 4),
    ]


def test_a_train_of_one_text_gives_no_dev() -> None:
    train = table(["0", "1"] * 10, ["same"] * 20)
    with pytest.raises(InvalidDataset, match="too few texts"):
        rows_of(train=train)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from(["x", "y", "z"])),
        min_size=5,
        max_size=120,
    ),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_dev_from_train_loses_no_row_and_parts_no_equal_texts(
    drawn: list[tuple[str, str]], seed: int, distinct: bool
) -> None:
    texts = [f"{text}{i}" if distinct else text for i, (text, _) in enumerate(drawn)]
    labels = [label for _, label in drawn]
    train = table([*labels, "x", "y", "x"], [*texts, "one more", "and one", "and two"])
    plan = plan_of(info=model(None), train=train)
    try:
        rows = resolve_rows(Spec(), plan, named(train=train), seed)
    except InvalidDataset:
        assert not distinct  # equal texts may be too many to move any
        return
    train_rows, dev = rows["train"], rows["dev"]
    assert sorted(train_rows.lines + dev.lines) == train.lines
    assert not set(train_rows.texts) & set(dev.texts)
    # Every label can still be learnt, and dev is a tenth or, with equal texts, less.
    assert set(train_rows.labels.tolist()) == set(range(len(plan.labels)))
    assert 1 <= len(dev) <= plan.rows["dev"]
    if distinct:
        assert len(dev) == plan.rows["dev"]
        assert len(train_rows) == plan.rows["train"]
