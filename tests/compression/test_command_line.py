"""What the command line prints of a report."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from compression.__main__ import main
from compression.command_line import on_dev, search_words, show_selection, vocabulary_words
from compression.report import (
    Candidate,
    CompressionReport,
    DatasetReport,
    FormatReport,
    Interval,
    LatencyModelReport,
    LatencyReport,
    PerLayerGain,
    SearchReport,
    Selection,
    SubnetworkReport,
    TeacherReport,
    VocabularyReport,
)
from compression.selection import select
from compression.spec import ConstraintSpec, LatencySetting, Spec


def half_with(*formats: FormatReport) -> SubnetworkReport:
    return SubnetworkReport(
        name="w1_2",
        width_mult=Fraction(1, 2),
        heads=(2,),
        ffn=(8,),
        parameters=1,
        flops=1,
        accuracy=0.75,
        accuracy_drop=5.0,
        formats=formats,
    )


def test_a_file_that_rounds_has_figures_of_its_own_or_none() -> None:
    plain = FormatReport(format="onnx", published=True)
    rounded = FormatReport(
        format="onnx-int8-dynamic", published=True, accuracy=0.7, accuracy_drop=10.0
    )
    half = half_with()
    assert on_dev(half, plain) == (0.75, 5.0)
    assert on_dev(half, rounded) == (0.7, 10.0)
    teacher = TeacherReport(family="bert", fine_tuned_steps=0, parameters=1, accuracy=0.8)
    unjudged = FormatReport(format="onnx-int8-dynamic", published=False)
    assert on_dev(teacher, plain) == (0.8, 0.0)
    assert on_dev(teacher, rounded) == (0.7, 10.0)
    assert on_dev(teacher, unjudged) == (None, None)


def test_what_the_removal_of_tokens_does_is_a_line() -> None:
    told = VocabularyReport(
        tokens_before=30522,
        tokens_after=8123,
        split="test",
        unk_before=0.0001,
        unk_after=0.0012,
        length_before=20,
        length_after=22,
        changed_texts=0.25,
    )
    assert vocabulary_words(told) == (
        "vocabulary: 8,123 of 30,522 tokens are left; on test 25.0% of the texts have a removed "
        "one, [UNK] is 0.12% of the tokens (0.01% before)"
    )


def test_a_search_is_told_with_its_error_and_its_gain_or_why_there_is_none() -> None:
    model = LatencyModelReport(
        percentile=95,
        call_ms=0.1,
        heads_ms={2: 1.0},
        ffn_ms={8: 1.0},
        fitted=18,
        held_out=6,
        mean_error=0.021,
        max_error=0.05,
    )
    gain = PerLayerGain(
        subnetwork="p1",
        reference="w1_2",
        points=0.0,
        intervals=(Interval(confidence=0.95, low=-0.7, high=0.7),),
    )
    found = SearchReport(
        format="onnx",
        setting=LatencySetting(1, 64, 1),
        budget=("p95 of 5.00 ms (batch 1, 64 tokens, 1 thread)", "20.0 MB"),
        holdout_rows=512,
        latency_models=(model,),
        scored=90,
        finalists=(),
        gain=gain,
    )
    assert list(search_words(found)) == [
        "search: 90 candidates within p95 of 5.00 ms (batch 1, 64 tokens, 1 thread) and 20.0 MB, "
        "in onnx, scored on 512 rows of train",
        "search: latency (p95) was predicted 2.1% off on average, 5.0% at most, on 6 sub-networks "
        "that were measured and not fitted",
        "search: p1 gains +0.00 points on dev over w1_2, the best of one width (95 %: -0.70 to "
        "0.70)",
    ]
    without = found.model_copy(update={"gain": None, "note": "no finalist holds it"})
    assert list(search_words(without))[-1] == "search: no finalist holds it"


def test_a_finished_job_is_asked_under_its_own_constraints_unless_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latency = LatencyReport(
        p50_ms=4, p95_ms=5, p99_ms=6, rounds=5, batch_size=1, seq_len=8, threads=1, speedup=2
    )
    half = half_with(FormatReport(format="onnx", published=True, size_bytes=10**6, latency=latency))
    finished = CompressionReport(
        spec=Spec(constraints=ConstraintSpec(max_latency_ms=3)),
        dataset=DatasetReport(rows={}, labels=(), label_names=(), text="text", label="label"),
        teacher=TeacherReport(family="bert", fine_tuned_steps=0, parameters=1, accuracy=0.8),
        reorder_max_abs=0,
        subnetworks=(half,),
        selection=Selection(subnetwork=None, format=None, reason="none"),
        distillation_steps=1,
        step_seconds=1,
        stage_seconds={},
        environment={},
    )
    report, other = tmp_path / "report.json", tmp_path / "other.yaml"
    report.write_text(finished.model_dump_json())
    other.write_text("constraints: {max_size_mb: 2}")
    assert main(["select", str(report)]) == 1
    assert "takes 4.00 ms, at most 3.00 ms allowed" in capsys.readouterr().out
    assert main(["select", str(report), "--spec", str(other)]) == 0
    assert "max_size_mb 2 rules out none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"task": {}}', "is no report.json of a job: /spec: Field required"),
        ("{", "is no report.json of a job: /: Invalid JSON"),
    ],
)
def test_what_is_no_report_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["select", str(path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{path} {told}" in said and "pydantic" not in said


def test_where_nothing_holds_the_nearest_three_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    choices = [
        Candidate(
            subnetwork=f"w{number}",
            format="onnx",
            accuracy_drop=number,
            latency_ms=9 - number,
            speedup=1.5,
            size_mb=10,
        )
        for number in range(1, 6)
    ]
    show_selection(select(choices, ConstraintSpec(max_accuracy_drop=0.5)))
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("near: ")] == [
        f"near: w{number} in onnx loses {number}.0 points of accuracy, at most 0.5 points allowed"
        for number in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"task: {text: \xff}", "spec.yaml cannot be read as YAML or JSON: 'utf-8' codec"),
        (b"task: {text", "spec.yaml cannot be read as YAML or JSON: while parsing"),
        (b"[" * 5000, "spec.yaml cannot be read as YAML or JSON: "),
        (b"seed: 1" + b"0" * 5000, "spec.yaml cannot be read as YAML or JSON: Exceeds the limit"),
        (b"[]", "valid dictionary"),
        (
            b"supernet: {depth_mults: [one]}",
            "spec.yaml: /supernet/depth_mults/0: write a depth as a fraction or decimal, for "
            'example "3/4" or 0.5\n',
        ),
        (b"supernet: {depth_mults: []}", "/supernet/depth_mults: Tuple should have at least 1"),
        (b"constraints: {latency_on: prf_1}", "names 'prf_1', which is no file here"),
    ],
)
def test_a_spec_that_cannot_be_used_is_told_in_a_sentence(
    tmp_path: Path, content: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_bytes(content)
    folders = [part for name in ("--model", "--dataset") for part in (name, str(tmp_path))]
    for command in (
        [*folders, "--out", str(tmp_path / "out"), "--spec", str(spec)],
        ["select", str(tmp_path / "report.json"), "--spec", str(spec)],
    ):
        with pytest.raises(SystemExit):
            main(command)
        assert told in capsys.readouterr().err
