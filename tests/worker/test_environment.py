"""What a job's process trains with: measured once, kept, and the user's own settings win."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from compression import runtime_env
from compression.runtime_env import core_count
from tests.worker.helpers import settings_for
from worker.environment import expected, measured


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """The candidates that were measured; many threads a kernel are said to be fastest."""
    seen: list[Mapping[str, str]] = []

    def seconds(variables: Mapping[str, str]) -> float:
        seen.append(variables)
        return 1 / int(variables["OMP_NUM_THREADS"])

    monkeypatch.setattr(runtime_env, "measured_seconds", seconds)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_the_fastest_is_chosen_once_and_kept(
    tmp_path: Path, asked: list[Mapping[str, str]]
) -> None:
    settings = settings_for(tmp_path, measure_training=True)
    chosen = measured(settings)
    assert chosen["OMP_NUM_THREADS"] == str(core_count())
    count = len(asked)
    assert measured(settings) == chosen  # another worker of this folder, or this one again
    assert len(asked) == count


def test_the_users_own_settings_win(
    tmp_path: Path, asked: list[Mapping[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert measured(settings_for(tmp_path, measure_training=True))["OMP_NUM_THREADS"] == "7"
    assert expected()["OMP_NUM_THREADS"] == "7"
    assert expected()["FLAGS_use_stride_kernel"] == "0"


def test_the_measurement_can_be_switched_off(
    tmp_path: Path, asked: list[Mapping[str, str]]
) -> None:
    assert measured(settings_for(tmp_path)) == expected()
    assert asked == []
