"""Checkpoints: whole or not there, of this job or refused, the damaged ones passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from compression.checkpoint import (
    Checkpoints,
    Saved,
    StageState,
    host_differences,
    host_facts,
    newest_snapshot,
    resumed_replicas,
    resumed_variables,
    resumption,
)
from compression.errors import CheckpointRefused

IDENTITY = {"spec": "a", "model": "b", "dataset": "c"}
HOST = host_facts({"OMP_NUM_THREADS": "2", "HOME": "/nobody"})


def state(step: int, *, done: bool = False) -> StageState:
    generator = np.random.default_rng(step)
    tensors = {
        "weights/a.weight": generator.normal(size=(3, 5)).astype(np.float32),
        "order": generator.permutation(7),
        "scalar": np.float64(step),
        "empty": np.zeros((0, 4), np.float32),
    }
    return StageState(step, done, {"loss": 0.5, "seen": [1, 2]}, tensors)


def open_folder(folder: Path, **changes: Any) -> Checkpoints:
    values = {"identity": IDENTITY, "host": HOST, "every_seconds": 1000.0, **changes}
    return Checkpoints(folder, **values)


def test_what_was_saved_is_read_back_exactly(tmp_path: Path) -> None:
    heard: list[Saved] = []
    checkpoints = open_folder(tmp_path, on_saved=heard.append)
    assert checkpoints.resumed is None
    checkpoints.save("teacher", state(9, done=True))
    checkpoints.save("distil", state(4))
    assert [(saved.stage, saved.step) for saved in heard] == [("teacher", 9), ("distil", 4)]

    again = open_folder(tmp_path)
    assert again.resumed == "distil"
    assert again.newest == heard[-1].path
    assert again["importance"] is None
    assert again.seconds >= 0
    for stage, step in (("teacher", 9), ("distil", 4)):
        found, expected = again[stage], state(step)
        assert found is not None
        assert (found.step, found.done, found.figures) == (
            step,
            stage == "teacher",
            expected.figures,
        )
        assert found.tensors.keys() == expected.tensors.keys()
        for name, array in expected.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], array)
            assert found.tensors[name].dtype == array.dtype
    # Any reader of the format reads it; nothing in it is code.
    assert set(load_file(heard[-1].path)) == {
        f"{stage}/{name}" for stage in ("teacher", "distil") for name in state(0).tensors
    }


def test_the_newest_two_are_kept_and_numbered_on(tmp_path: Path) -> None:
    for first in (1, 3):
        checkpoints = open_folder(tmp_path)
        for step in (first, first + 1):
            checkpoints.save("distil", state(step))
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["000003", "000004"]


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "empty"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpoints = open_folder(tmp_path)
    checkpoints.save("distil", state(1))
    checkpoints.save("distil", state(2))
    newest = checkpoints.newest
    assert newest is not None
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(
        {"a flipped bit": bytes(content), "cut short": content[:-9], "empty": b""}[damage]
    )
    (tmp_path / "000003.partial").write_bytes(b"killed while it was written")
    again = open_folder(tmp_path)
    found = again["distil"]
    assert found is not None and found.step == 1
    (sentence,) = again.warnings
    assert "000002 cannot be used" in sentence and "digest" in sentence
    again.save("distil", state(3))
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["000002", "000003"]


def test_without_a_good_one_the_job_starts_anew_and_says_so(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path)
    checkpoints.save("distil", state(1))
    assert checkpoints.newest is not None
    checkpoints.newest.write_bytes(b"")
    again = open_folder(tmp_path)
    assert again.resumed is None
    assert len(again.warnings) == 1


def test_another_jobs_checkpoint_is_refused_and_what_differs_named(tmp_path: Path) -> None:
    open_folder(tmp_path).save("distil", state(1))
    with pytest.raises(CheckpointRefused, match=r"of another job \(not the same: spec, dataset\)"):
        open_folder(tmp_path, identity={**IDENTITY, "spec": "x", "dataset": "y"})
    assert open_folder(tmp_path).resumed == "distil"


def test_the_pause_between_checkpoints(tmp_path: Path) -> None:
    assert not open_folder(tmp_path).is_due
    assert open_folder(tmp_path, every_seconds=0.0).is_due


def test_a_forgotten_stage_is_in_no_later_checkpoint(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path)
    checkpoints.save("distil", state(1))
    checkpoints.save("refine p1", state(2))
    checkpoints.forget(["refine p1", "refine p2"])
    assert checkpoints.known == ("distil",)
    checkpoints.save("refine w1_4", state(3))
    assert open_folder(tmp_path).known == ("distil", "refine w1_4")


def test_a_stage_that_is_done_again_is_the_newest(tmp_path: Path) -> None:
    """A search on another machine measures anew, and what was refined before it stays."""
    heard: list[Saved] = []
    checkpoints = open_folder(tmp_path, on_saved=heard.append)
    for stage in ("search", "refine w1_4", "search"):
        checkpoints.save(stage, state(len(heard)))
    assert (heard[-1].stage, heard[-1].step) == ("search", 2)
    again = open_folder(tmp_path)
    assert again.known == ("refine w1_4", "search")
    assert again.resumed == "search"
    assert resumption(again) == "goes on from step 2 of search"


def test_the_time_of_earlier_runs_counts(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path)
    checkpoints.save("distil", state(1))
    _, snapshot, _ = newest_snapshot(tmp_path)
    assert snapshot is not None
    assert 0 < snapshot.seconds <= open_folder(tmp_path).seconds <= checkpoints.seconds


def test_a_host_is_told_from_another_by_what_changes_the_bits(tmp_path: Path) -> None:
    assert HOST["variables"] == {"OMP_NUM_THREADS": "2"}
    json.dumps(HOST)
    assert host_differences(HOST, host_facts({"OMP_NUM_THREADS": "2"})) == ()
    other = host_facts({"MKL_DEBUG_CPU_TYPE": "5"})
    assert host_differences(HOST, other) == (
        "MKL_DEBUG_CPU_TYPE was unset, is 5",
        "OMP_NUM_THREADS was 2, is unset",
    )
    assert resumed_variables(tmp_path) == {}
    assert resumed_replicas(tmp_path) is None
    open_folder(tmp_path).save("distil", state(1))
    assert resumed_variables(tmp_path) == {"OMP_NUM_THREADS": "2"}
    assert resumed_replicas(tmp_path) == 1
    open_folder(tmp_path, host={**HOST, "cpu": "another"}).save("distil", state(2))
    assert resumed_variables(tmp_path) == {}
    (warning,) = open_folder(tmp_path).warnings
    assert f"another kind of host (cpu was another, is {HOST['cpu']})" in warning
