"""Several processes that train one model, over gloo: the same weights, one job, one end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from compression.checkpoint import StageState, newest_snapshot
from compression.precision import Precision
from compression.ranks import ALONE, Group, free_endpoints
from compression.spec import Spec
from tests.builders import tiny_bert, tiny_dataset

REPOSITORY = Path(__file__).resolve().parents[2]


class JobFiles:
    """A model and a dataset; train's last batch has one row, fewer than there are processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = tiny_bert(root / "model", num_labels=None, seed=1)
        config = json.loads((self.model / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (self.model / "config.json").write_text(json.dumps(config))
        self.dataset = tiny_dataset(root / "dataset", rows={"train": 65, "dev": 40}, seed=1)

    def command(self, name: str, *options: str, **changes: Any) -> list[str]:
        """The job as a command, with its result in the folder `name`."""
        values = {
            "task": {"max_seq_len": 32},
            "teacher": {"epochs": 1, "learning_rate": 2e-3, "patience": 2, "evaluate_every": 1},
            "distillation": {"epochs": 1, "learning_rate": 1e-3},
            "depth": {"epochs": 1, "learning_rate": 1e-3},
            "final": {"when": "always", "epochs": 1},
            "supernet": {"width_mults": ["1", "1/2"]},
            "importance": {"rows": 64},
            "latency": {"rounds": 5, "baselines": []},
            "export": {"formats": ["onnx"]},
            **changes,
        }
        spec = self.root / f"{name}.json"
        spec.write_text(Spec.model_validate(values).model_dump_json())
        arguments = ["--model", self.model, "--dataset", self.dataset, "--spec", spec]
        arguments += ["--out", self.root / name]
        return [sys.executable, "-m", "compression", *map(str, arguments), *options]

    def start(self, name: str, *options: str, **changes: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(name, *options, **changes),
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )

    def state(self, name: str, stage: str) -> StageState | None:
        """What the job's newest checkpoint knows of a stage."""
        _, snapshot, _ = newest_snapshot(self.root / name / "checkpoints")
        return None if snapshot is None else snapshot.stages.get(stage)

    def learn(self, name: str, *options: str, last: str, **changes: Any) -> dict[str, np.ndarray]:
        """The supernet's weights after the training `last`; what follows is spared."""
        process = self.start(name, *options, **changes)
        wait_for_bar(process, "search:")  # what comes after all trainings
        assert stopped(process) == 3
        state = self.state(name, last)
        assert state is not None and state.done
        return dict(state.tensors)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> JobFiles:
    return JobFiles(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", autouse=True)
def late_pair() -> Iterator[tuple[subprocess.Popen[bytes], ...]]:
    """Two processes, the first 33 seconds late: gloo itself gives up after 30.

    They sleep while the other tests run.
    """
    command = [sys.executable, "-m", "tests.compression.rank_process"]
    endpoints = free_endpoints(3)
    with (
        subprocess.Popen(
            [*command, "0", "33", *endpoints], cwd=REPOSITORY, stdout=subprocess.PIPE
        ) as first,
        subprocess.Popen(
            [*command, "1", "0", *endpoints], cwd=REPOSITORY, stdin=first.stdout
        ) as second,
    ):
        yield first, second
        first.kill()
        second.kill()


def wait_for_bar(process: subprocess.Popen[str], pattern: str) -> None:
    """Until it shows such a progress bar."""
    assert process.stderr is not None
    bars = []
    for bar in process.stderr:  # a bar ends where the next one overwrites it
        bars.append(bar)
        if re.search(pattern, bar):
            return
    raise AssertionError(f"it ended before {pattern}: {bars[-5:]}")


def stopped(process: subprocess.Popen[str]) -> int:
    """The status that it ends with when it is told to stop."""
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    return process.returncode


def others_of(pid: int) -> list[int]:
    """The processes that this one has started and that train with it."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"compression.rank" in command:
            found.append(int(status.parent.name))
    return found


def test_two_processes_end_with_the_weights_of_one(files: JobFiles) -> None:
    """All four trainings, early stopping among them; a layer is in none of the last two."""
    supernet = {"width_mults": ["1", "1/2"], "depth_mults": ["1/2"]}
    one = files.learn("one", last="final", supernet=supernet)
    two = files.learn("two", last="final", supernet=supernet, processes=2)
    assert one.keys() == two.keys()
    for name, array in one.items():
        if not name.endswith("key.bias"):  # without effect: AdamW scales rounding up
            np.testing.assert_allclose(two[name], array, atol=1e-5, err_msg=name)


def test_two_processes_are_stopped_and_resumed(files: JobFiles) -> None:
    long = {
        "teacher": {"max_steps": 2},
        "supernet": {"width_mults": ["1"]},
        "distillation": {"max_steps": 40, "epochs": 100},
        "final": {"when": "never"},
        "processes": 2,
    }
    whole = files.learn("whole", last="distil", **long)
    process = files.start("parts", **long)
    wait_for_bar(process, r"distil:.*\| [1-9][0-9]*/")
    (other,) = others_of(process.pid)
    assert stopped(process) == 3
    assert not Path(f"/proc/{other}").exists()
    state = files.state("parts", "distil")
    assert state is not None and not state.done
    assert 0 < state.step < 40
    parts = files.learn("parts", "--resume", last="distil", **long)
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)
    finished = files.start("parts", "--resume", **long)
    _, errors = finished.communicate(timeout=240)
    assert finished.returncode == 0, errors
    report = json.loads((files.root / "parts" / "report.json").read_text())
    assert report["environment"]["processes"] == "2"


def test_a_process_that_dies_ends_the_job(files: JobFiles) -> None:
    process = files.start("dead", processes=2, distillation={"max_steps": 300, "epochs": 100})
    wait_for_bar(process, "distil:")
    (other,) = others_of(process.pid)
    os.kill(other, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "rank-failed: rank 1 of the 2 processes that train ended with status -9" in errors
    assert not (files.root / "dead" / "report.json").exists()


def test_the_others_wait_for_the_first_however_late_it_is(
    late_pair: tuple[subprocess.Popen[bytes], ...],
) -> None:
    assert [process.wait(120) for process in late_pair] == [0, 0]


class Scaler:
    """What of paddle's GradScaler is used; the real one switches itself off without a GPU."""

    def __init__(self) -> None:
        self.held = {"scale": np.array([8.0], np.float32), "incr_count": 3, "decr_count": 0}
        self.held |= {"incr_ratio": 2.0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state


def test_the_scale_of_float16_is_kept_in_checkpoints() -> None:
    plain = Precision()
    assert plain.state() == {}
    plain.restore({"scale": 2.0})  # of no use, and no error
    precision, other = Precision(), Precision()
    precision._scaler, other._scaler = Scaler(), Scaler()
    other._scaler.held |= {"scale": np.array([2.0], np.float32), "incr_count": 1}
    kept = json.loads(json.dumps(precision.state()))
    assert kept == {"scale": 8.0, "incr_count": 3.0, "decr_count": 0.0}
    other.restore(kept)
    assert other._scaler.held == precision._scaler.held


def test_shares_leave_no_row_out_and_none_twice() -> None:
    rows = np.arange(7)
    parts = [Group(rank, 3).share(rows) for rank in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert len(Group(2, 3).share(rows[:2])) == 0
    assert ALONE.share(rows) is rows
    assert ALONE.add_up([1.0, 2.0]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "mixed"}, 'needs device "gpu"'),
        ({"processes": 2, "engine": "paddleslim"}, "trains in one process"),
        ({"engine": "paddleslim", "precision": "mixed", "device": "gpu"}, "in fp32"),
        ({"processes": 0}, "greater than or equal to 1"),
        ({"device": "gpu:x"}, "should match pattern"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Spec.model_validate(changes)
