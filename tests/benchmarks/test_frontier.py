from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import frontier
from benchmarks.frontier import ALONE, BATCHED, FP32, INT8
from compression import latency
from compression.spec import LatencySetting, LatencySpec

NOISE = 1e-3 * np.random.default_rng(0).uniform(1, 2, 41)  # of the machine, by round
P50 = 1e3 * float(np.median(NOISE))
SECONDS = {FP32: 8 * NOISE, INT8: 4 * NOISE, "own 0": NOISE, "own 1": 2 * NOISE}


def test_speedups_are_means_over_seeds() -> None:
    found = frontier.compared(SECONDS, "_b16")
    assert found["speedup_vs_ort_fp32_b16_by_seed"] == [8, 4]
    assert found["speedup_vs_ort_fp32_b16"] == 6
    assert found["speedup_vs_ort_int8_b16_by_seed"] == [4, 2]
    assert found["speedup_vs_ort_int8_b16"] == 3
    p50 = {FP32: 8 * P50, INT8: 4 * P50, "own": 1.5 * P50}
    assert found["p50_ms_b16"] == pytest.approx(p50, abs=1e-3)


def test_noise_that_all_files_share_does_not_widen_the_interval_of_a_speedup() -> None:
    assert frontier.compared(SECONDS, "")["speedup_vs_ort_fp32_ci"] == [6, 6]
    own_noise = np.random.default_rng(1).uniform(0.5, 1.5, 41)
    noisy = frontier.compared(SECONDS | {"own 1": SECONDS["own 1"] * own_noise}, "")
    for reference in ("fp32", "int8"):
        low, high = noisy[f"speedup_vs_ort_{reference}_ci"]
        assert low < noisy[f"speedup_vs_ort_{reference}"] < high


def test_the_files_of_all_seeds_are_timed_beside_the_first_seed_s_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def timed_rounds(
        served: Mapping[str, latency.Served], spec: LatencySpec, *, seq_len: int, vocab_size: int
    ) -> dict[LatencySetting, dict[str, Any]]:
        (setting,) = spec.settings(seq_len)
        asked.append((setting, {item.folder.relative_to(tmp_path) for item in served.values()}))
        return {setting: {name: np.full(spec.rounds, 1e-3) for name in served}}

    monkeypatch.setattr(latency, "timed_rounds", timed_rounds)
    monkeypatch.setattr(frontier, "teacher_files", lambda seed, _: tmp_path / f"teacher-{seed}")
    chosen = frontier.Point("w1_4", INT8, 0.5, (0.5, 0.5), 1.0, 2.0, 3.0, speedups=(8, 3))
    found = frontier.timed(
        chosen,
        argparse.Namespace(work_dir=tmp_path, seeds=[4, 2], final_rounds=7, vocab_size=50),
    )
    files = {Path(f"seed-{seed}/job/artifacts/w1_4/{INT8}") for seed in (4, 2)}
    files |= {Path(f"teacher-4/{fmt}") for fmt in (FP32, INT8)}
    settings = [LatencySetting(rows, 64, threads) for rows, threads in (ALONE, BATCHED)]
    assert asked == [(setting, files) for setting in settings]
    assert {"speedup_vs_ort_int8", "speedup_vs_ort_int8_b16_ci"} <= found.keys()
