"""What candidates must hold: by files timed on this machine, or by another device's profile."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from compression import budget
from compression.budget import Limit, Timings
from compression.device_profile import DeviceProfile, job_predictor
from compression.encoder import numpy_weights
from compression.errors import ExportFailed
from compression.export import paddle_bf16
from compression.report import LatencyReport
from compression.search_space import SearchSpace
from compression.spec import Spec
from compression.supernet import Subnetwork, subnetwork_of
from tests.builders import device_profile
from tests.encoders import tiny_config, tiny_encoder

WIDTHS = (Fraction(1), Fraction(1, 2), Fraction(1, 4))
DEEP = {"layers": 4, "heads": (4,) * 4, "ffn": (16,) * 4}
CONFIG = tiny_config(**DEEP)
FULL, HALF = (subnetwork_of(CONFIG, Fraction(width)) for width in ("1", "1/2"))


def spec_of(*formats: str, **constraints: Any) -> Spec:
    return Spec.model_validate(
        {
            "constraints": constraints,
            "export": {"formats": formats or ["onnx"]},
            "latency": {"rounds": 5},
        }
    )


def test_what_is_timed_has_every_size_of_a_layer() -> None:
    space = SearchSpace(CONFIG, WIDTHS, (Fraction(1), Fraction(1, 2)))
    drawn = budget.samples(space, 12, seed=0)
    assert len(drawn) == 12
    fitted = drawn[: 12 - 12 // 4]
    assert {n for each in fitted for n in each.heads} == {4, 2, 1}
    assert {n for each in fitted for n in each.ffn} == {16, 8, 4}


def latency_report(milliseconds: float) -> LatencyReport:
    return LatencyReport(
        p50_ms=milliseconds,
        p95_ms=2 * milliseconds,
        p99_ms=3 * milliseconds,
        rounds=5,
        batch_size=1,
        seq_len=8,
        threads=1,
    )


def test_limits_are_the_constraints_percentile_and_the_teachers_own_time() -> None:
    space = SearchSpace(CONFIG, WIDTHS, (Fraction(1),))
    drawn = budget.samples(space, 16, seed=0)
    timed = {each.name: latency_report(float(sum(each.heads) + sum(each.ffn))) for each in drawn}
    timed[budget.TEACHER] = latency_report(80.0)
    spec = spec_of(
        max_latency_ms=100, min_speedup=1.6, latency_at={"percentile": 95}, max_size_mb=1
    )
    found = budget.measured_budget(spec, CONFIG, drawn, Timings("onnx", timed), seq_len=8)
    late, fast = found.limits
    assert (late.percentile, late.max_ms, fast.percentile, fast.max_ms) == (95, 100, 50, 50)
    assert found.models[0].held_out == 4 and found.models[0].fitted == 12
    assert found.models[0].max_error < 1e-9  # it is a sum over layers
    assert late.milliseconds(HALF) == pytest.approx(80)  # twice 8 heads and 32 neurons
    assert late.holds(HALF) and not fast.holds(FULL)
    assert found.holds(HALF) and not found.holds(HALF, 0.75) and not found.holds(FULL)
    setting = "(batch 1, 8 tokens, 1 thread)"
    assert found.words == (f"p95 of 100 ms {setting}", f"p50 of 50.0 ms {setting}", "1.00 MB")


def test_two_bounds_of_one_percentile_have_one_model() -> None:
    space = SearchSpace(CONFIG, WIDTHS, (Fraction(1),))
    drawn = budget.samples(space, 16, seed=0)
    timed = {each.name: latency_report(float(sum(each.heads) + sum(each.ffn))) for each in drawn}
    timed[budget.TEACHER] = latency_report(80.0)
    spec = spec_of(max_latency_ms=70, min_speedup=1.6)
    found = budget.measured_budget(spec, CONFIG, drawn, Timings("onnx", timed), seq_len=8)
    assert [(each.percentile, each.max_ms) for each in found.limits] == [(50, 70), (50, 50)]
    assert [each.percentile for each in found.models] == [50]


def test_a_models_error_is_room_that_is_left() -> None:
    one = Subnetwork("x", None, Fraction(1), (0,), (4,), (16,))
    assert Limit(50, 3.31, lambda subnetwork: 3.0, 0.1).holds(one)
    assert not Limit(50, 3.29, lambda subnetwork: 3.0, 0.1).holds(one)
    assert Limit(50, 6.61, lambda subnetwork: 3.0, 0.1).holds(one, 0.5)


def test_without_a_bound_on_latency_the_smallest_format_is_searched_in() -> None:
    spec = spec_of("onnx", "onnx-int8-dynamic", max_size_mb=0.5)
    found = budget.size_budget(spec, tiny_config(vocab_size=20_000), seq_len=8)
    assert (found.format, found.words) == ("onnx-int8-dynamic", ("0.50 MB",))
    assert budget.size_budget(spec, CONFIG, seq_len=8).format == "onnx"  # of so little, the graph


def test_real_files_are_timed_in_the_fastest_format(tmp_path: Path) -> None:
    """int8 has more to do than to gain in a network as tiny as this: whichever is faster, its
    samples are in that format, and the teacher in fp32 beside them."""
    encoder = tiny_encoder(**DEEP)
    told: list[tuple[int, int, str]] = []
    timings = budget.time_subnetworks(
        [HALF],
        CONFIG,
        numpy_weights(encoder),
        spec_of("safetensors", "onnx", "onnx-int8-static", max_latency_ms=1),
        seq_len=8,
        folder=tmp_path / "search",
        on_progress=lambda *progress: told.append(progress),
    )
    assert timings.format in ("onnx", "onnx-int8-static")
    assert timings.timed.keys() == {"w1_2", budget.TEACHER}
    assert all(each.p50_ms > 0 and each.rounds == 5 for each in timings.timed.values())
    assert told == [
        *((done, 5, "latency") for done in range(1, 6)),
        (1, 1, "samples"),
        *((done, 5, "latency") for done in range(1, 6)),
    ]
    written = {path.name for path in (tmp_path / "search" / "w1_2").iterdir()} - {"int8"}
    assert written == {timings.format}


def test_a_format_that_cannot_be_written_here_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paddle_bf16, "instruction_sets", lambda: ("avx2",))

    def time_in(*formats: str) -> Timings:
        return budget.time_subnetworks(
            [HALF],
            CONFIG,
            numpy_weights(tiny_encoder(**DEEP)),
            spec_of(*formats, max_latency_ms=1),
            seq_len=8,
            folder=tmp_path / formats[0],
            on_progress=lambda *_: None,
        )

    timings = time_in("paddle-bf16", "onnx")
    assert timings.format == "onnx"
    assert timings.timed.keys() == {"w1_2", budget.TEACHER}
    with pytest.raises(ExportFailed, match="no bf16 instructions"):
        time_in("paddle-bf16")


def test_another_devices_budget_is_what_its_profile_predicts() -> None:
    """There a call takes a millisecond, and each head of a layer one more for ten tokens, a
    quarter in int8; nothing is timed here."""
    profile = DeviceProfile.model_validate(
        device_profile(
            hidden=24, head_dim=6, layers=4, heads=(1, 4), ffn=(4, 16),
            formats=("onnx", "onnx-int8-dynamic"),
        )
    )  # fmt: skip
    spec = spec_of(
        "paddle", "onnx", "onnx-int8-dynamic", max_latency_ms=6, min_speedup=3, latency_on="board"
    )
    predictor = job_predictor(spec, profile, CONFIG, seq_len=10)
    found = budget.predicted_budget(spec, CONFIG, predictor)
    assert found.format == "onnx-int8-dynamic"
    assert (found.setting, found.on) == (predictor.setting, predictor.on)
    latency, speedup = found.limits
    expected = 1 + 4 * (2 + 0.8) / 4  # four layers of two heads and eight neurons
    assert latency.milliseconds(HALF) == pytest.approx(expected)
    assert latency.holds(HALF) and latency.max_ms == 6
    assert speedup.max_ms == pytest.approx((1 + 4 * (4 + 1.6)) / 3)
    mixed = Subnetwork("p1", None, Fraction(1), (0, 1, 2, 3), (3, 1, 4, 2), (8, 4, 16, 12))
    assert latency.milliseconds(mixed) == pytest.approx(1 + (10 + 4) / 4)
