"""What the command line prints of a report."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from compression.__main__ import main
from compression.command_line import on_dev, vocabulary_words
from compression.report import FormatReport, SubnetworkReport, TeacherReport, VocabularyReport


def test_a_file_that_rounds_has_figures_of_its_own_or_none() -> None:
    plain = FormatReport(format="onnx", published=True)
    rounded = FormatReport(
        format="onnx-int8-dynamic", published=True, accuracy=0.7, accuracy_drop=10.0
    )
    half = SubnetworkReport(
        name="w1_2",
        width_mult=Fraction(1, 2),
        heads=(2,),
        ffn=(8,),
        parameters=1,
        flops=1,
        accuracy=0.75,
        accuracy_drop=5.0,
    )
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
