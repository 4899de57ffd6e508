from __future__ import annotations

from pathlib import Path

import pytest

from jobs.settings import Settings
from worker import gpus
from worker.gpus import offered_gpus


@pytest.mark.parametrize(
    ("setting", "visible", "gpu_build", "listed", "offered"),
    [
        (None, None, True, 2, ("0", "1")),
        (None, None, False, 2, ()),  # a CPU's build of Paddle could not use them
        (None, None, True, 0, ()),
        (None, "3, GPU-aa", True, 4, ("3", "GPU-aa")),
        (None, "", True, 4, ()),
        (None, "0", True, 0, ()),  # left over in the environment of a host without one
        (2, None, False, 0, ("0", "1")),
        (2, "4,5,6", True, 8, ("4", "5")),
        (0, "4", True, 8, ()),
    ],
)
def test_gpus_are_found_limited_and_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: int | None,
    visible: str | None,
    gpu_build: bool,
    listed: int,
    offered: tuple[str, ...],
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpus, "_paddle_knows_gpus", lambda: gpu_build)
    settings = Settings(data_dir=tmp_path, worker_gpus=setting)
    assert offered_gpus(settings, listed=lambda: range(listed)) == offered
