"""A training that was killed and resumed ends with the bits of one that never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compression.checkpoint import newest_snapshot
from compression.errors import Interrupted
from compression.training import Surroundings
from tests.compression.training_process import STEPS, checkpoints_in, run

REPOSITORY = Path(__file__).resolve().parents[2]


def kill_after(kind: str, folder: Path, step: int) -> None:
    """Runs the training in a process and kills it (SIGKILL) as soon as it tells of the step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.compression.training_process", kind, str(folder)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if int(line) >= step:
                process.kill()
                break
    assert process.wait() == -9


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(("kind", "seed"), [("teacher", 1), ("distil", 2), ("depth", 3)])
def test_killed_twice_at_random_steps_and_resumed_it_ends_the_same(
    tmp_path: Path, kind: str, seed: int
) -> None:
    first, second = np.sort(np.random.default_rng(seed).choice(STEPS - 2, 2, replace=False) + 1)
    kill_after(kind, tmp_path, int(first))
    kill_after(kind, tmp_path, int(second))
    _, snapshot, _ = newest_snapshot(tmp_path)
    assert snapshot is not None
    # The kill may have fallen before the step's own checkpoint, or some steps after it.
    assert second - 1 <= snapshot.stages[kind].step < STEPS
    seen: list[int] = []
    resumed, weights = run(
        kind,
        Surroundings(kind, "", checkpoints_in(tmp_path)),
        lambda step: seen.append(step.done),
    )
    assert seen == list(range(snapshot.stages[kind].step + 1, STEPS + 1))
    uninterrupted, expected = run(kind, Surroundings(kind, ""))
    equal(weights, expected)
    again, same = run(kind, Surroundings(kind, ""))
    equal(same, expected)
    for report in (resumed, again):
        assert report.model_copy(update={"step_seconds": 0}) == uninterrupted.model_copy(
            update={"step_seconds": 0}
        )
    _, other = run(kind, Surroundings(kind, ""), seed=5)
    assert not np.array_equal(other["classifier.weight"], expected["classifier.weight"])


def test_told_to_stop_it_writes_a_checkpoint_and_ends(tmp_path: Path) -> None:
    seen: list[int] = []
    checkpoints = checkpoints_in(tmp_path, every_seconds=1000)
    stopping = Surroundings("teacher", "", checkpoints, stop=lambda: len(seen) == 3)
    with pytest.raises(Interrupted, match=r"stopped in stage teacher; the checkpoint is 000001\."):
        run("teacher", stopping, lambda step: seen.append(step.done))
    state = checkpoints_in(tmp_path)["teacher"]
    assert state is not None and (state.step, state.done) == (3, False)
