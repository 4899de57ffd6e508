"""Latency: percentiles by definition, and real measurements of tiny models."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from compression.encoder import build_encoder, numpy_weights
from compression.errors import ExportFailed
from compression.export import INPUTS, export_formats
from compression.export.fresh import IMPORT_ROOT, fresh_command, fresh_environment
from compression.intervals import RESAMPLES, round_resamples
from compression.latency import (
    Served,
    measure,
    p95_length,
    percentile,
    resampled_percentiles,
    summaries,
    token_ids,
)
from compression.report import Interval
from compression.runtime_env import training_environment
from compression.spec import CONFIDENCES, Format, LatencySetting, LatencySpec
from compression.supernet import extract_weights, subnetwork_of
from tests.encoders import tiny_encoder

SPEC = LatencySpec(rounds=5, batch_size=2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """Widths 1 and 1/2 of one encoder, each in both served formats."""
    root = tmp_path_factory.mktemp("latency")
    full = tiny_encoder()
    found = {}
    for width in (Fraction(1), Fraction(1, 2)):
        subnetwork = subnetwork_of(full.config, width)
        weights = extract_weights(full.config, numpy_weights(full), subnetwork)
        small = build_encoder(full.config.narrowed(width), weights)
        formats: tuple[Format, ...] = ("paddle", "onnx")
        for fmt, item in export_formats(
            formats, small, root / subnetwork.name, labels=None
        ).items():
            found[f"{subnetwork.name}/{fmt}"] = Served(fmt, item.folder)
    return found


@pytest.mark.parametrize(
    ("count", "share", "rank"),
    [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (50, 0.95, 48), (50, 0.99, 50), (100, 0.99, 99)],
)
def test_percentiles_are_nearest_rank(count: int, share: float, rank: int) -> None:
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert percentile(values, share) == rank


@pytest.mark.parametrize("count", range(1, 130))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(count: int) -> None:
    values = [float(value) for value in range(count)]
    for percent in (50, 55, 95, 99):
        found = percentile(values, percent / 100)
        at_most = sum(value <= found for value in values)
        below = sum(value < found for value in values)
        assert at_most * 100 >= percent * count > below * 100


def test_the_measured_length_covers_95_percent_of_the_rows() -> None:
    assert p95_length([10] * 95 + [90] * 5) == 10
    assert p95_length([10] * 94 + [90] * 6) == 90


def test_every_call_gets_the_same_tokens_under_a_full_mask() -> None:
    first, second = (token_ids(batch_size=2, seq_len=7, vocab_size=50) for _ in range(2))
    assert tuple(first) == INPUTS
    for name in INPUTS:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].shape == (2, 7)
        assert first[name].dtype == np.int64
    assert first["attention_mask"].all()
    assert 0 <= first["input_ids"].min() <= first["input_ids"].max() < 50


def test_all_candidates_of_both_runtimes_are_measured_in_every_setting(
    served: dict[str, Served],
) -> None:
    rounds: list[tuple[int, int]] = []
    spec = LatencySpec(
        rounds=5, batch_size=2, batch_sizes=(1,), seq_lens=(5, 9), thread_counts=(2,)
    )
    found = measure(
        served,
        spec,
        seq_len=9,
        vocab_size=50,
        references={"w1_2/onnx": "w1/onnx"},
        on_round=lambda done, total: rounds.append((done, total)),
    )
    assert found.keys() == served.keys()
    assert rounds == [(i, 8 * 5) for i in range(1, 8 * 5 + 1)]
    for reports in found.values():
        assert [report.setting for report in reports] == [
            (2, 9, 1), (1, 9, 1), (2, 5, 1), (1, 5, 1), (2, 9, 2), (1, 9, 2), (2, 5, 2), (1, 5, 2),
        ]  # fmt: skip
        for report in reports:
            assert report.rounds == 5
            assert 0 < report.p50_ms <= report.p95_ms <= report.p99_ms < 10_000
    firsts = {reports[0].p50_ms for reports in found.values()}
    assert len(firsts) == 4
    for half, full in zip(found["w1_2/onnx"], found["w1/onnx"], strict=True):
        assert half.speedup == pytest.approx(full.p50_ms / half.p50_ms)
        assert (full.speedup, full.speedup_intervals) == (None, ())


def interval(intervals: tuple[Interval, ...], confidence: float) -> tuple[float, float]:
    (found,) = [each for each in intervals if each.confidence == confidence]
    return found.low, found.high


def test_a_ratio_survives_a_machine_that_slows_down() -> None:
    """Both take 1.5 times as long in the second half: the ratio's interval is as narrow as ever."""
    generator = np.random.default_rng(0)
    mood = np.where(np.arange(60) < 30, 1.0, 1.5) * generator.uniform(0.99, 1.01, 60)
    seconds = {"teacher": 0.010 * mood, "w1_2": 0.004 * mood * generator.uniform(0.99, 1.01, 60)}
    setting = LatencySetting(batch_size=1, seq_len=8, threads=2)
    found = summaries(seconds, setting, {"w1_2": "teacher"})["w1_2"]
    assert found.setting == setting
    low, high = interval(found.speedup_intervals, 0.95)
    assert 2.4 < low < 2.5 < high < 2.6
    assert found.speedup is not None and low <= found.speedup <= high
    slow, fast = interval(found.p50_intervals, 0.95)
    assert fast / slow > 1.3  # the times themselves are as uncertain as they were


def test_intervals_hold_the_percentile_and_widen_with_the_confidence() -> None:
    seconds = {"w1": np.random.default_rng(1).gamma(50.0, 1e-4, 200)}
    report = summaries(seconds, LatencySetting(1, 8, 1), {})["w1"]
    for value, intervals in (
        (report.p50_ms, report.p50_intervals),
        (report.p95_ms, report.p95_intervals),
        (report.p99_ms, report.p99_intervals),
    ):
        ends = [interval(intervals, confidence) for confidence in CONFIDENCES]
        assert all(low <= value <= high for low, high in ends)
        assert ends[0][0] >= ends[1][0] >= ends[2][0]
        assert ends[0][1] <= ends[1][1] <= ends[2][1]


@pytest.mark.parametrize("rounds", [5, 27, 50, 101])
def test_resamples_are_blocks_of_neighbouring_rounds_the_same_each_time(rounds: int) -> None:
    first, second = (np.array(list(round_resamples(rounds))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (RESAMPLES, rounds)
    assert (np.bincount(first.ravel(), minlength=rounds) > 0).all()
    follows = (np.diff(first, axis=1) % rounds) == 1
    assert follows.mean() > 0.4


def test_resampled_percentiles_are_those_of_the_resample() -> None:
    seconds = np.random.default_rng(2).permutation(50) / 1000
    resampled = resampled_percentiles(seconds)
    rows = next(iter(round_resamples(50)))
    expected = [percentile(seconds[rows].tolist(), share) for share in (0.50, 0.95, 0.99)]
    assert resampled.shape == (RESAMPLES, 3)
    assert resampled[0].tolist() == expected


def test_a_file_that_does_not_load_is_named_and_nothing_keeps_running(
    served: dict[str, Served], tmp_path: Path
) -> None:
    broken = {**served, "w1_4/onnx": Served("onnx", tmp_path)}
    with pytest.raises(ExportFailed, match=r"(?s)measuring onnx ended with status 1: .*NoSuchFile"):
        measure(broken, SPEC, seq_len=9, vocab_size=50)
    assert children_measuring() == []


def test_a_measurement_that_takes_too_long_is_ended(served: dict[str, Served]) -> None:
    with pytest.raises(ExportFailed, match=r"measuring onnx took longer than 0\.05 seconds"):
        measure(served, SPEC, seq_len=9, vocab_size=50, timeout_s=0.05)
    assert children_measuring() == []


def test_the_time_limit_is_one_for_each_answer(
    served: dict[str, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large spec may take hours in all; only a round that takes too long is a fault."""
    started: list[threading.Timer] = []

    class Recorded(threading.Timer):
        def start(self) -> None:
            assert all(other.finished.is_set() for other in started)
            started.append(self)
            super().start()

    monkeypatch.setattr(threading, "Timer", Recorded)
    measure({"w1": served["w1/onnx"]}, SPEC, seq_len=9, vocab_size=50, timeout_s=300)
    assert [timer.interval for timer in started] == [300] * (2 + SPEC.rounds)
    assert all(timer.finished.is_set() for timer in started)


def test_onnx_is_measured_without_paddle_in_the_process(served: dict[str, Served]) -> None:
    request = {
        "format": "onnx",
        "folders": {"w1": str(served["w1/onnx"].folder)},
        "threads": 1,
        "vocab_size": 50,
    }
    done = subprocess.run(
        fresh_command("compression.latency"),
        cwd=IMPORT_ROOT,
        env=fresh_environment(),
        input=json.dumps(request) + '\n{"batch_size": 1, "seq_len": 5}\n{"round": 0}\n',
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    ready, warm, seconds = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": ["w1"], "libraries": ["onnxruntime"]}
    assert warm == {"warm": ["w1"]}
    assert seconds["w1"] > 0


def test_files_are_timed_in_the_environment_of_who_serves_them(
    served: dict[str, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_environment(cpu_count=2, vendor="AuthenticAMD")
    for name, value in training.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")  # the host's own
    found: list[dict[str, str]] = []

    def look(done: int, total: int) -> None:
        (pid,) = children_measuring()
        entries = Path(f"/proc/{pid}/environ").read_text().rstrip("\0").split("\0")
        found.append(dict(entry.split("=", 1) for entry in entries))

    measure({"w1": served["w1/onnx"]}, SPEC, seq_len=9, vocab_size=50, on_round=look)
    left = {name: found[0][name] for name in training if name in found[0]}
    assert left == {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",
        "GLOG_minloglevel": "2",
        "MALLOC_ARENA_MAX": "4",
    }


def children_measuring() -> list[int]:
    """Processes that this one started and that still run the driver."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == os.getpid() and b"compression.latency" in command:
            found.append(int(entry.name))
    return found
