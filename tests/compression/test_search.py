"""Widths for each layer in a job: trained along, timed, searched for, judged, handed out."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression import pipeline, search
from compression.batches import make_batch
from compression.checkpoint import Checkpoints, host_facts
from compression.encoder import build_encoder, numpy_weights
from compression.evolution import Scored
from compression.latency_model import LatencyModel
from compression.plan import UNFITTED_SHARE
from compression.report import (
    CompressionReport,
    Finalist,
    FormatReport,
    LatencyModelReport,
    LatencyReport,
    Progress,
    SearchReport,
    SubnetworkReport,
)
from compression.search_space import SearchSpace
from compression.spec import LatencySetting, Spec
from compression.supernet import Subnetwork, extract_weights, subnetwork_of
from compression.teachers import read_checkpoint
from tests.builders import WORDS, tiny_bert, tiny_dataset
from tests.encoders import clear, gradients, random_rows, tiny_config, tiny_encoder

WIDTHS = (Fraction(1), Fraction(1, 2), Fraction(1, 4))
DEEP = {"layers": 4, "heads": (4,) * 4, "ffn": (16,) * 4}


def test_a_network_with_a_width_for_each_layer_equals_its_slices_and_no_more() -> None:
    encoder, batch = tiny_encoder(**DEEP), make_batch(random_rows(6), range(6), pad_id=0)
    subnetwork = Subnetwork("p1", None, Fraction(3, 4), (0, 1, 2), (1, 4, 2), (16, 4, 8))
    small = build_encoder(
        subnetwork.config(encoder.config),
        extract_weights(encoder.config, numpy_weights(encoder), subnetwork),
    )
    clear(encoder)
    sliced, alone = encoder(*batch.inputs, subnetwork=subnetwork), small(*batch.inputs)
    np.testing.assert_array_equal(alone.numpy(), sliced.numpy())
    sliced.square().sum().backward()
    found = gradients(encoder)
    assert not any(name.startswith("layers.3.") for name in found)
    for layer, (heads, neurons) in enumerate(((1, 16), (4, 4), (2, 8))):
        query = found[f"layers.{layer}.attention.query.weight"]
        out = found[f"layers.{layer}.ffn.output.weight"]
        assert np.abs(query[:, : 6 * heads]).max() > 0 and not query[:, 6 * heads :].any()
        assert np.abs(out[:neurons]).max() > 0 and not out[neurons:].any()


def test_what_is_timed_has_every_size_of_a_layer() -> None:
    space = SearchSpace(tiny_config(**DEEP), WIDTHS, (Fraction(1), Fraction(1, 2)))
    assert search.HELD_OUT_SHARE == UNFITTED_SHARE
    drawn = search.samples(space, 12, seed=0)
    assert len(drawn) == 12
    fitted = drawn[: 12 - 12 // search.HELD_OUT_SHARE]
    assert {n for each in fitted for n in each.heads} == {4, 2, 1}
    assert {n for each in fitted for n in each.ffn} == {16, 8, 4}


def latency_report(milliseconds: float, speedup: float | None = None) -> LatencyReport:
    return LatencyReport(
        p50_ms=milliseconds,
        p95_ms=2 * milliseconds,
        p99_ms=3 * milliseconds,
        rounds=5,
        batch_size=1,
        seq_len=8,
        threads=1,
        speedup=speedup,
    )


def test_limits_are_the_constraints_percentile_and_the_teachers_own_time() -> None:
    space = SearchSpace(tiny_config(**DEEP), WIDTHS, (Fraction(1),))
    drawn = search.samples(space, 16, seed=0)
    timed = {each.name: latency_report(float(sum(each.heads) + sum(each.ffn))) for each in drawn}
    timed[search.TEACHER] = latency_report(80.0)
    spec = Spec.model_validate(
        {
            "constraints": {
                "max_latency_ms": 100, "min_speedup": 2, "latency_at": {"percentile": 95},
            }
        }
    )  # fmt: skip
    late, fast = search.limits_of(spec, drawn, timed)
    assert (late.percentile, late.max_ms, fast.percentile, fast.max_ms) == (95, 100, 50, 40)
    assert late.report.held_out == 4 and late.report.fitted == 12
    assert late.report.max_error < 1e-9  # it is a sum over layers
    half = subnetwork_of(tiny_config(**DEEP), Fraction(1, 2))  # 8 heads and 32 neurons: 40 and 80
    assert late.model.predict(half) == pytest.approx(80)
    assert late.holds(half) and not fast.holds(subnetwork_of(tiny_config(**DEEP), Fraction(1)))


def test_a_models_error_is_room_that_is_left() -> None:
    report = LatencyModelReport(
        percentile=50, call_ms=1, heads_ms={}, ffn_ms={}, fitted=9, held_out=3,
        mean_error=0.1, max_error=0.2,
    )  # fmt: skip
    model = LatencyModel(1.0, {4: 1.0}, {16: 1.0})
    one = Subnetwork("x", None, Fraction(1), (0,), (4,), (16,))  # 3 ms
    assert search.Limit(50, model, report, 3.31).holds(one)
    assert not search.Limit(50, model, report, 3.29).holds(one)


def test_finalists_are_no_sub_network_that_the_job_has_anyway() -> None:
    config = tiny_config(**DEEP)
    space = SearchSpace(config, WIDTHS, (Fraction(1),))
    generator = np.random.default_rng(0)
    half = space.uniform(Fraction(1, 2), Fraction(1))
    others = [space.random(generator) for _ in range(3)]
    scored = [
        Scored(genes, space.subnetwork(genes, "candidate"), 0.9, 1.0) for genes in (half, *others)
    ]
    found = search.finalists(scored, [subnetwork_of(config, Fraction(1, 2))], 2)
    assert [each.subnetwork.name for each in found] == ["p1", "p2"]
    assert [each.genes for each in found] == others[:2]


def network(name: str, drop: float, milliseconds: float, **changes: Any) -> SubnetworkReport:
    own = latency_report(milliseconds, speedup=2.0)
    fmt = FormatReport(
        format="onnx", published=True, size_bytes=10, latency=own, latencies=(own,), speedup=2.0
    )
    return SubnetworkReport(
        name=name,
        width_mult=None if name.startswith("p") else Fraction(1, 2),
        heads=(2,),
        ffn=(8,),
        parameters=1,
        flops=1,
        accuracy=0.9 - drop / 100,
        accuracy_drop=drop,
        formats=(fmt.model_copy(update=changes),),
    )


def gain_of(*networks: SubnetworkReport) -> SearchReport:
    report = SearchReport(
        format="onnx",
        setting=LatencySetting(1, 8, 1),
        budget=("p50 of 5.00 ms",),
        holdout_rows=8,
        latency_models=(),
        scored=3,
        finalists=tuple(
            Finalist(subnetwork=name, holdout_accuracy=0.9, predicted_ms={50: 4}, predicted_mb=1)
            for name in ("p1", "p2")
        ),
    )
    spec = Spec.model_validate({"constraints": {"max_latency_ms": 5, "max_accuracy_drop": 0.1}})
    resampled = {each.name: np.full(9, each.accuracy) for each in networks}
    return search.with_gain(report, spec, networks, resampled)


def test_the_gain_is_that_of_the_best_of_both_kinds_that_hold_the_budget_as_measured() -> None:
    """The accuracy drop is no budget: it would leave nothing to compare."""
    gain = gain_of(
        network("w1", 0.0, 9.0),  # too slow
        network("w1_2", 1.5, 4.9),
        network("w1_4", 2.5, 3.0),
        network("p1", 0.2, 5.1),  # the model was wrong about it
        network("p2", 1.0, 4.8),
    ).gain
    assert gain is not None
    assert (gain.subnetwork, gain.reference) == ("p2", "w1_2")
    assert gain.points == pytest.approx(0.5)
    assert gain.intervals[0].low == pytest.approx(0.5)
    worse = gain_of(network("w1_2", 0.5, 4.0), network("p1", 0.9, 4.0)).gain
    assert worse is not None and worse.points == pytest.approx(-0.4)


def test_without_both_kinds_there_is_no_gain_and_a_reason() -> None:
    slow = gain_of(network("w1_2", 1.0, 4.0), network("p1", 0.0, 9.0))
    assert slow.gain is None and slow.note == "no finalist holds the budget as measured"
    alone = gain_of(network("w1_2", 1.0, 9.0), network("p1", 0.0, 4.0))
    assert alone.note == "no sub-network of one width holds the budget as measured"
    unpublished = gain_of(network("w1_2", 1.0, 4.0), network("p1", 0.0, 4.0, published=False))
    assert unpublished.gain is None


# --- the whole job --------------------------------------------------------------------------


def job_spec(**changes: Any) -> Spec:
    values = {
        "task": {"max_seq_len": 32},
        "distillation": {"max_steps": 3, "learning_rate": 1e-3},
        "depth": {"max_steps": 2},
        "supernet": {
            "width_mults": ["1", "1/2"],
            "depth_mults": ["1", "1/2"],
            "per_layer": {
                "holdout_rows": 16, "latency_samples": 12, "population": 4, "generations": 2,
                "finalists": 2,
            },
        },
        "importance": {"rows": 32},
        "latency": {"rounds": 5, "baselines": []},
        "constraints": {"max_latency_ms": 10_000, "objective": "accuracy"},
        "export": {"formats": ["onnx", "safetensors"]},
    }  # fmt: skip
    return Spec.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("search")
    model = tiny_bert(root / "model", num_labels=2, layers=2, seed=1)
    dataset = tiny_dataset(root / "dataset", rows={"train": 100, "dev": 40, "test": 20}, seed=1)
    seen: list[Progress] = []
    report = pipeline.compress(job_spec(), model, dataset, root / "run", seen.append)
    return {"root": root, "report": report, "seen": seen, "model": model, "dataset": dataset}


def test_finalists_are_sub_networks_like_all_others(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    assert report.search is not None
    names = [finalist.subnetwork for finalist in report.search.finalists]
    assert names == ["p1", "p2"]
    assert [each.name for each in report.subnetworks] == [
        "w1", "w1-d1_2", "w1_2", "w1_2-d1_2", "p1", "p2"
    ]  # fmt: skip
    shapes = {(each.layers, each.heads, each.ffn) for each in report.subnetworks}
    assert len(shapes) == 6
    for each in report.subnetworks[-2:]:
        assert each.width_mult is None
        assert all(fmt.published for fmt in each.formats), each.formats
        assert each.regression is not None
        folder = finished["root"] / "run" / "artifacts" / each.name
        assert read_checkpoint(folder / "safetensors").config.heads == each.heads
        assert (folder / "bundle.tar.gz").stat().st_size > 0
    text = (finished["root"] / "run" / "report.json").read_text()
    assert CompressionReport.model_validate_json(text) == report
    assert json.loads(text)["search"]["latency_models"][0]["heads_ms"].keys() == {"2", "4"}


def test_the_report_says_what_was_searched_and_what_it_gained(finished: dict[str, Any]) -> None:
    found = finished["report"].search
    assert found.format == "onnx"
    assert found.holdout_rows == 16
    (model,) = found.latency_models
    assert (model.percentile, model.fitted, model.held_out) == (50, 9, 3)
    assert 0 <= model.mean_error <= model.max_error
    assert 4 <= found.scored <= 4 * 3
    assert found.gain is not None
    named = {each.name: each for each in finished["report"].subnetworks}
    best, uniform = named[found.gain.subnetwork], named[found.gain.reference]
    assert best.width_mult is None and uniform.width_mult is not None
    assert found.gain.points == pytest.approx(100 * (best.accuracy - uniform.accuracy))
    for within in found.gain.intervals:
        assert within.low <= found.gain.points <= within.high
    notes = finished["report"].dataset.notes
    assert "16 rows of train score the search's candidates and teach nothing" in notes
    assert finished["report"].dataset.rows["train"] == 100


def test_each_step_learns_one_network_with_a_width_for_each_layer(finished: dict[str, Any]) -> None:
    def losses(stage: str) -> list[set[str]]:
        own = [p for p in finished["seen"] if p.stage == stage and "losses" in p.figures]
        return [set(p.figures["losses"]) for p in own]

    assert losses("distil") == [{"w1", "w1_2", "per-layer 1", "per-layer 2"}] * 3
    for step in losses("depth"):
        assert {"w1", "w1_2-d1_2", "per-layer 1"} < step
        assert len(step) == 4


def trained_job(root: Path, **changes: Any) -> tuple[pipeline.Job, pipeline.Learnt]:
    """A job whose trainings have learnt nothing, before its search."""
    model = tiny_bert(root / "model", num_labels=2, words=(*WORDS, *map(str, range(5000))))
    dataset = tiny_dataset(root / "dataset", rows={"train": 60, "dev": 20}, seed=1)
    job = pipeline.load(job_spec(**changes), model, dataset, 1)
    network = build_encoder(job.checkpoint.config, job.checkpoint.tensors)
    subnetworks = pipeline.planned_subnetworks(job, network)
    return job, pipeline.Learnt(network, {}, [], network, 0.0, subnetworks, {})


def searched(job: pipeline.Job, learnt: pipeline.Learnt, root: Path, cpu: str) -> search.Found:
    checkpoints = Checkpoints(
        root / "checkpoints",
        identity={},
        host={**host_facts({}), "cpu": cpu},
        every_seconds=math.inf,
    )
    found, warnings = pipeline.search_widths(
        job, learnt, checkpoints, root / "work", lambda *told: None
    )
    assert found is not None and warnings == ()
    return found


def test_sizes_are_searched_by_as_they_are_exported_with_the_smaller_vocabulary(
    tmp_path: Path,
) -> None:
    job, learnt = trained_job(
        tmp_path,
        vocabulary={"remove_unused": True},
        constraints={"max_size_mb": 0.4, "objective": "accuracy"},
        export={"formats": ["onnx"]},
    )
    found = searched(job, learnt, tmp_path, "this one")
    assert found.subnetworks  # with all 5,000 tokens each would have 0.7 MB
    for finalist in found.report.finalists:
        assert finalist.predicted_mb < 0.4


def test_a_job_that_goes_on_has_the_finalists_that_it_had_on_the_same_kind_of_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, learnt = trained_job(tmp_path)
    found = searched(job, learnt, tmp_path, "this one")
    assert found.subnetworks and found.report.latency_models
    anew = []

    def search_anew(*args: Any, **options: Any) -> search.Found:
        anew.append(args)
        return found

    monkeypatch.setattr(pipeline, "search", search_anew)
    assert searched(job, learnt, tmp_path, "this one") == found
    assert not anew
    searched(job, learnt, tmp_path, "another one")
    assert len(anew) == 1


def test_nothing_is_trained_on_the_rows_that_score(finished: dict[str, Any]) -> None:
    job = pipeline.load(job_spec(), finished["model"], finished["dataset"], 1)
    assert job.holdout is not None
    assert (len(job.holdout), len(job.splits["train"])) == (16, 84)
    learnt = {tuple(ids) for ids in job.splits["train"].input_ids}
    assert learnt.isdisjoint(tuple(ids) for ids in job.holdout.input_ids)
    again = pipeline.load(job_spec(), finished["model"], finished["dataset"], 1)
    assert again.holdout is not None and again.holdout.input_ids == job.holdout.input_ids
