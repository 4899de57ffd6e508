"""Widths for each layer in a job: trained along, timed, searched for, judged, handed out."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression import search
from compression.batches import make_batch
from compression.budget import Timings
from compression.checkpoint import Checkpoints, host_facts, newest_snapshot
from compression.encoder import Encoder, build_encoder, numpy_weights
from compression.errors import Interrupted
from compression.evolution import Scored
from compression.job import load, row_notes
from compression.judging import subnetwork_in
from compression.learning import Learnt, planned_subnetworks
from compression.pipeline import compress
from compression.report import (
    CompressionReport,
    DeviceFingerprint,
    Finalist,
    FormatReport,
    LatencyReport,
    Progress,
    SearchReport,
    SubnetworkReport,
)
from compression.search import Memory
from compression.search_space import SearchSpace
from compression.search_stage import search_widths
from compression.spec import LatencySetting, PerLayerSpec, Spec
from compression.supernet import Subnetwork, extract_weights, subnetwork_of
from compression.teachers import read_checkpoint
from compression.tokenization import load_tokenizer
from tests.builders import WORDS, tiny_bert, tiny_dataset
from tests.encoders import (
    CLASSIFICATION,
    clear,
    gradients,
    random_rows,
    tiny_config,
    tiny_encoder,
)

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
    (more,) = search.finalists(scored, [each.subnetwork for each in found], 1, first=3)
    assert (more.subnetwork.name, more.genes) == ("p3", half)


def latency_report(milliseconds: float) -> LatencyReport:
    return LatencyReport(
        p50_ms=milliseconds,
        p95_ms=2 * milliseconds,
        p99_ms=3 * milliseconds,
        rounds=5,
        batch_size=1,
        seq_len=8,
        threads=1,
        speedup=2.0,
    )


def network(
    name: str, drop: float, milliseconds: float, *int8: FormatReport, **changes: Any
) -> SubnetworkReport:
    own = latency_report(milliseconds)
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
        formats=(fmt.model_copy(update=changes), *int8),
    )


def in_int8(drop: float, milliseconds: float) -> FormatReport:
    own = latency_report(milliseconds)
    return FormatReport(
        format="onnx-int8-dynamic",
        published=True,
        size_bytes=5,
        accuracy=0.9 - drop / 100,
        accuracy_drop=drop,
        latency=own,
        latencies=(own,),
        speedup=2.0,
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
    resampled = {
        (each.name, fmt.format): np.full(9, fmt.accuracy or each.accuracy)
        for each in networks
        for fmt in each.formats
    }
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


def test_the_gain_is_that_of_the_best_file_of_each_in_whichever_format() -> None:
    gain = gain_of(
        network("w1", 0.0, 9.0, in_int8(0.4, 4.9)),
        network("w1_2", 1.5, 4.9, in_int8(1.9, 2.0)),
        network("p1", 0.1, 8.0, in_int8(0.2, 4.8)),
    ).gain
    assert gain is not None
    assert (gain.subnetwork, gain.format) == ("p1", "onnx-int8-dynamic")
    assert (gain.reference, gain.reference_format) == ("w1", "onnx-int8-dynamic")
    assert gain.points == pytest.approx(0.2)
    assert gain.intervals[0].low == pytest.approx(0.2)


def test_without_both_kinds_there_is_no_gain_and_a_reason() -> None:
    slow = gain_of(network("w1_2", 1.0, 4.0), network("p1", 0.0, 9.0))
    assert slow.gain is None and slow.note == "no finalist holds the budget as measured"
    alone = gain_of(network("w1_2", 1.0, 9.0), network("p1", 0.0, 4.0))
    assert alone.note == "no sub-network of one width holds the budget as measured"
    unpublished = gain_of(network("w1_2", 1.0, 4.0), network("p1", 0.0, 4.0, published=False))
    assert unpublished.gain is None


# --- what it remembers ----------------------------------------------------------------------


def device(cpu: str = "Test CPU") -> DeviceFingerprint:
    return DeviceFingerprint(
        cpu=cpu,
        cores=2,
        threads=2,
        instruction_sets=(),
        memory_bytes=None,
        gpus=(),
        platform="Linux",
        python="3.11",
        libraries={},
    )


def found_with(memory: Memory, supernet: Encoder, folder: Path, **changes: Any) -> search.Found:
    """The search of a tiny supernet under a budget of megabytes, unless told otherwise."""
    asked = PerLayerSpec(
        holdout_rows=8, population=4, generations=2, finalists=2, budget_shares=(1, 0.9)
    )
    spec = Spec.model_validate(
        {
            "supernet": {"width_mults": ["1", "1/2", "1/4"], "per_layer": asked.model_dump()},
            "constraints": {"max_size_mb": 0.15},
            "export": {"formats": ["onnx"]},
            **changes,
        }
    )
    return search.search(
        spec,
        asked,
        supernet,
        supernet.config,
        CLASSIFICATION,
        random_rows(8),
        [subnetwork_of(supernet.config, width) for width in WIDTHS],
        memory,
        predictor=None,
        seq_len=8,
        threads=1,
        folder=folder,
        on_progress=lambda done, total, what: None,
    )


def test_each_share_of_the_budget_has_finalists_of_its_own(tmp_path: Path) -> None:
    report = found_with(Memory(device()), tiny_encoder(**DEEP), tmp_path).report
    assert report.budget == ("0.15 MB",) and report.latency_models == ()
    assert [(each.subnetwork, each.budget_share) for each in report.finalists] == [
        ("p1", 1), ("p2", 1), ("p3", 0.9), ("p4", 0.9)
    ]  # fmt: skip
    for each in report.finalists:
        assert each.predicted_mb <= 0.15 * each.budget_share
    assert report.finalists[0].holdout_accuracy >= report.finalists[1].holdout_accuracy


def test_rows_held_out_are_those_of_the_dataset_and_not_their_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question about a long context is asked of several windows."""
    monkeypatch.setattr(type(CLASSIFICATION), "row_lengths", lambda self, data: data.lengths[::2])
    report = found_with(Memory(device()), tiny_encoder(**DEEP), tmp_path).report
    assert report.holdout_rows == 4


def test_what_was_scored_is_not_scored_again(tmp_path: Path) -> None:
    """A search that goes on finds the same with a supernet that would score otherwise."""
    memory = Memory(device())
    whole = found_with(memory, tiny_encoder(**DEEP), tmp_path)
    other = found_with(Memory(device()), tiny_encoder(1, **DEEP), tmp_path)
    assert whole.report.scored == len(memory.accuracies)
    state = memory.state(4, done=True)
    assert state.step == whole.report.scored
    json.dumps(state.figures)  # what a checkpoint takes
    again = Memory.restored(state, device())
    assert again.accuracies == memory.accuracies
    assert found_with(again, tiny_encoder(1, **DEEP), tmp_path) == whole != other


def test_times_are_those_of_the_same_machine() -> None:
    timings = Timings("onnx", {"sample0": latency_report(1.5), "teacher": latency_report(3.0)})
    state = Memory(device(), timings, {((0, 2), (1, 4), (16, 8)): 0.75}).state(4, done=False)
    assert Memory.restored(state, device()).timings == timings
    elsewhere = Memory.restored(state, device(cpu="Another"))
    assert elsewhere.timings is None
    assert elsewhere.accuracies == {((0, 2), (1, 4), (16, 8)): 0.75}
    assert Memory.restored(None, device()) == Memory(device())


# --- the whole job --------------------------------------------------------------------------


PER_LAYER = {
    "holdout_rows": 16, "latency_samples": 4, "population": 4, "generations": 2, "finalists": 1,
}  # fmt: skip


def job_spec(**changes: Any) -> Spec:
    values = {
        "task": {"max_seq_len": 32},
        "distillation": {"max_steps": 3, "learning_rate": 1e-3, "teacher_cache_mb": 1},
        "supernet": {"width_mults": ["1", "1/2"], "per_layer": PER_LAYER},
        "refinement": {"subnetworks": ["finalists", "w1_2"], "max_steps": 2, "learning_rate": 1e-3},
        "importance": {"rows": 32},
        "latency": {"rounds": 5, "baselines": []},
        "constraints": {"max_latency_ms": 10_000, "objective": "accuracy"},
        "export": {"formats": ["onnx-int8-dynamic", "safetensors"]},
    }  # fmt: skip
    return Spec.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job that is stopped when its search has scored two candidates, and when its finalist has
    learnt one step alone (after two of another sub-network), and goes on."""
    root = tmp_path_factory.mktemp("search")
    model = tiny_bert(root / "model", num_labels=2, layers=2, seed=1)
    dataset = tiny_dataset(root / "dataset", rows={"train": 100, "dev": 40, "test": 20}, seed=1)
    seen: list[Progress] = []
    saved: list[str] = []

    def run(*until: object) -> tuple[CompressionReport | None, list[Progress]]:
        """Until a stage's message and step."""
        before = len(seen)

        def is_reached() -> bool:
            last = seen[-1] if seen else Progress("load")
            return (last.stage, last.message, last.step) == until

        try:
            report = compress(
                job_spec(), model, dataset, root / "run", seen.append, stop=is_reached,
                on_checkpoint=lambda each: saved.append(each.stage),
            )  # fmt: skip
        except Interrupted:
            return None, seen[before:]
        return report, seen[before:]

    _, first = run("search", "candidates", 2)
    _, stopped, _ = newest_snapshot(root / "run" / "checkpoints")
    _, second = run("refine", "", 3)
    report, third = run()
    return {
        "root": root, "report": report, "model": model, "dataset": dataset, "stopped": stopped,
        "first": first, "second": second, "third": third, "saved": saved,
    }  # fmt: skip


def test_a_stopped_search_goes_on_with_its_times_and_scores(finished: dict[str, Any]) -> None:
    kept = finished["stopped"].stages["search"]
    assert (kept.step, kept.done, kept.figures["format"]) == (2, False, "onnx-int8-dynamic")
    assert kept.figures["timed"].keys() == {"teacher", *(f"sample{i}" for i in range(4))}

    def told(run: str) -> set[str]:
        return {p.message for p in finished[run] if p.stage == "search"}

    assert told("first") == {"", "samples", "latency", "candidates"}
    assert told("second") == {"", "candidates"}

    def went_on(run: str) -> str:
        (message,) = (p.message for p in finished[run] if p.stage == "load" and p.step == 1)
        return str(message)

    assert went_on("second") == "goes on from step 2 of search"
    # When all was timed, when it was stopped and when it was done; not again when that was known.
    assert finished["saved"].count("search") == 3
    assert went_on("third").startswith("goes on from step 1 of refine p1")
    (model,) = finished["report"].search.latency_models
    measured = kept.figures["timed"]["sample0"]["p50_ms"]  # of the full width
    whole = 2 * (model.heads_ms[4] + model.ffn_ms[64])
    assert model.call_ms + whole == pytest.approx(measured, rel=0.5)


def test_finalists_are_sub_networks_like_all_others(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    assert report.search is not None
    names = [finalist.subnetwork for finalist in report.search.finalists]
    assert names == ["p1"]
    assert [each.name for each in report.subnetworks] == ["w1", "w1_2", "p1"]
    assert len({(each.heads, each.ffn) for each in report.subnetworks}) == 3
    found = report.subnetworks[-1]
    assert found.width_mult is None
    assert all(fmt.published for fmt in found.formats), found.formats
    in_int8 = next(fmt for fmt in found.formats if fmt.format == "onnx-int8-dynamic")
    assert in_int8.latency is not None and in_int8.accuracy is not None
    assert found.regression is not None
    folder = finished["root"] / "run" / "artifacts" / "p1"
    assert read_checkpoint(folder / "safetensors").config.heads == found.heads
    assert (folder / "bundle.tar.gz").stat().st_size > 0
    text = (finished["root"] / "run" / "report.json").read_text()
    assert CompressionReport.model_validate_json(text) == report
    assert json.loads(text)["search"]["latency_models"][0]["heads_ms"].keys() == {"2", "4"}


@pytest.mark.parametrize("name", ["w1_2", "p1"])
def test_what_the_spec_refines_has_weights_of_its_own(finished: dict[str, Any], name: str) -> None:
    report: CompressionReport = finished["report"]
    training = report.trainings[f"refine {name}"]
    assert (training.steps, training.ended) == (2, "complete")
    assert "refine w1" not in report.trainings
    artifacts = finished["root"] / "run" / "artifacts"
    whole, own = (read_checkpoint(artifacts / each / "safetensors") for each in ("w1", name))
    found = subnetwork_in(next(each for each in report.subnetworks if each.name == name))
    shared = extract_weights(whole.config, whole.tensors, found)
    assert shared.keys() == own.tensors.keys()
    moved = {name: np.abs(own.tensors[name] - each).max() for name, each in shared.items()}
    assert max(moved.values()) > 1e-4
    assert moved["layers.0.ffn.output.weight"] > 0
    with tarfile.open(artifacts / name / "bundle.tar.gz") as bundle:
        card = next(each for each in bundle.getnames() if each.endswith("MODEL_CARD.md"))
        file = bundle.extractfile(card)
        assert file is not None
        words = b"It was then distilled alone for 2 of 2 steps: batches of 32 rows, learning rate"
        assert words in file.read()


def test_the_report_says_what_was_searched_and_what_it_gained(finished: dict[str, Any]) -> None:
    found = finished["report"].search
    assert found.format == "onnx-int8-dynamic"
    assert found.holdout_rows == 16
    (model,) = found.latency_models
    assert (model.percentile, model.fitted, model.held_out) == (50, 3, 1)
    assert 0 <= model.mean_error <= model.max_error
    assert 4 <= found.scored <= 4 * 3
    assert found.gain is not None
    named = {each.name: each for each in finished["report"].subnetworks}
    best, uniform = named[found.gain.subnetwork], named[found.gain.reference]
    assert best.width_mult is None and uniform.width_mult is not None
    in_int8 = [
        next(fmt.accuracy for fmt in each.formats if fmt.format == found.gain.format)
        for each in (best, uniform)
    ]
    assert found.gain.format == found.gain.reference_format == "onnx-int8-dynamic"
    assert found.gain.points == pytest.approx(100 * (in_int8[0] - in_int8[1]))
    for within in found.gain.intervals:
        assert within.low <= found.gain.points <= within.high
    notes = finished["report"].dataset.notes
    assert "16 rows of train score the search's candidates and teach nothing" in notes
    assert finished["report"].dataset.rows["train"] == 100


def test_each_step_learns_one_network_with_a_width_for_each_layer(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    spec = job_spec(
        supernet={
            "width_mults": ["1", "1/2"], "depth_mults": ["1", "1/2"], "per_layer": PER_LAYER
        },
        depth={"max_steps": 2},
    )  # fmt: skip
    seen: list[Progress] = []
    arguments = (spec, finished["model"], finished["dataset"], tmp_path, seen.append)
    with pytest.raises(Interrupted):
        compress(*arguments, stop=lambda: bool(seen) and seen[-1].stage == "final")

    def losses(stage: str) -> list[set[str]]:
        own = [p for p in seen if p.stage == stage and "losses" in p.figures]
        return [set(p.figures["losses"]) for p in own]

    assert losses("distil") == [{"w1", "w1_2", "per-layer 1", "per-layer 2"}] * 3
    for step in losses("depth"):
        assert {"w1", "w1_2-d1_2", "per-layer 1"} < step
        assert len(step) == 4


def test_sizes_are_searched_by_as_they_are_exported_with_the_smaller_vocabulary(
    tmp_path: Path,
) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, words=(*WORDS, *map(str, range(5000))))
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 60, "dev": 20}, seed=1)
    spec = job_spec(
        vocabulary={"remove_unused": True},
        constraints={"max_size_mb": 0.4, "objective": "accuracy"},
        export={"formats": ["onnx"]},
    )
    job = load(spec, model, dataset, 1)
    network = build_encoder(job.checkpoint.config, job.checkpoint.tensors)
    subnetworks = planned_subnetworks(job, network)
    learnt = Learnt(network, {}, [], network, 0.0, subnetworks, {})
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", identity={}, host=host_facts({}), every_seconds=math.inf
    )
    found, warnings = search_widths(
        job, learnt, None, checkpoints, tmp_path / "work", lambda *told: None
    )
    assert found is not None and warnings == ()
    assert found.subnetworks  # with all 5,000 tokens each would have 0.7 MB
    for finalist in found.report.finalists:
        assert finalist.predicted_mb < 0.4


def test_nothing_is_trained_on_the_rows_that_score(finished: dict[str, Any]) -> None:
    job = load(job_spec(), finished["model"], finished["dataset"], 1)
    assert job.holdout is not None
    assert (len(job.holdout), len(job.splits["train"])) == (16, 84)
    learnt = {tuple(ids) for ids in job.splits["train"].input_ids}
    assert learnt.isdisjoint(tuple(ids) for ids in job.holdout.input_ids)
    again = load(job_spec(), finished["model"], finished["dataset"], 1)
    assert again.holdout is not None and again.holdout.input_ids == job.holdout.input_ids


def test_nor_on_unlabelled_rows_of_their_texts(finished: dict[str, Any], tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(finished["dataset"], tmp_path / "dataset"))
    lines = (dataset / "train.tsv").read_text().splitlines()
    texts = [line.split("\t")[0] for line in lines]
    (dataset / "unlabelled.tsv").write_text("\n".join(texts) + "\n")
    job = load(job_spec(), finished["model"], dataset, 1)
    assert job.holdout is not None
    assert job.rows["unlabelled"] == 100
    learnt = {tuple(ids) for ids in job.splits["unlabelled"].input_ids}
    assert learnt == {tuple(ids) for ids in job.splits["train"].input_ids}
    assert learnt.isdisjoint(tuple(ids) for ids in job.holdout.input_ids)
    assert row_notes(job) == (
        "16 rows of train score the search's candidates and teach nothing, nor do unlabelled rows "
        "of the same text",
    )
    held_out = {tuple(ids) for ids in job.holdout.input_ids}
    tokenizer = load_tokenizer(finished["model"])
    scoring = [text for text in texts if tuple(tokenizer.encode(text).ids) in held_out]
    assert len(scoring) == 16
    (dataset / "unlabelled.tsv").write_text("\n".join(["text", *scoring]) + "\n")
    job = load(job_spec(), finished["model"], dataset, 1)
    assert job.rows["unlabelled"] == 16
    assert "unlabelled" not in job.splits
