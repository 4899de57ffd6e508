from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.worker.helpers import CHILD_COMMAND, JOB_PROCESS, is_alive, wait_for_death
from worker.process import JobProcess, exit_in_words

REPOSITORY = Path(__file__).resolve().parents[2]


def start(folder: Path, *steps: str) -> JobProcess:
    request = {"spec": {"do": list(steps)}, "run_dir": str(folder)}
    return JobProcess(CHILD_COMMAND, request, folder=folder, environment={"A": "b"})


def messages(process: JobProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        try:
            message = process.message(30)
        except EOFError:
            return found
        if message is not None:
            found.append(message)


def test_messages_come_in_order_until_the_end(tmp_path: Path) -> None:
    process = start(tmp_path, "many 3", "environment")
    found = messages(process)
    assert [m["kind"] for m in found] == ["progress"] * 5 + ["done"]
    assert [m["step"] for m in found[:4]] == [0, 1, 2, 3]
    environment = found[4]["figures"]
    assert environment.pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"  # Python's own doing
    assert environment == {"A": "b"}
    assert process.end(grace_seconds=10) == 0
    with pytest.raises(EOFError):
        process.message(0)


@pytest.mark.parametrize(
    ("steps", "status", "words"),
    [
        (("exit 3",), 3, "status 3"),
        (("kill",), 137, "memory"),
        (("sleep x",), 1, "status 1"),
    ],
)
def test_its_status_and_last_lines_are_kept(
    tmp_path: Path, steps: tuple[str, ...], status: int, words: str
) -> None:
    process = start(tmp_path, "complain a word before", "garbage", *steps)
    assert messages(process) == []
    assert process.end(grace_seconds=10) == status
    assert words in exit_in_words(status)
    assert {"a word before", "not JSON", "[1]"} <= set(process.last_lines())
    assert any("ValueError" in line for line in process.last_lines()) == (status == 1)


def test_a_flood_of_errors_is_kept_short(tmp_path: Path) -> None:
    process = start(tmp_path, *["complain " + "x" * 5000] * 80)
    assert messages(process)[-1]["kind"] == "done"
    process.end(grace_seconds=10)
    lines = process.last_lines()
    assert len(lines) == 50
    assert max(map(len, lines)) <= 2000


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    process = JobProcess(["/no/such"], {}, folder=tmp_path, environment={})
    assert messages(process) == []
    assert process.end(grace_seconds=10) == 127
    assert "/no/such" in process.last_lines()[-1]


def test_the_whole_group_ends_also_when_it_is_deaf(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf", "spawn", "sleep 600")
    spawned = process.message(30)
    assert spawned is not None
    process.ask_to_end()
    process.end(grace_seconds=0.1)
    wait_for_death(process.pid, *spawned["figures"].values())


def test_one_that_floods_its_output_can_be_ended(tmp_path: Path) -> None:
    process = start(tmp_path, "many 20000")
    assert process.message(30) is not None
    process.end(grace_seconds=0.1)
    assert not is_alive(process.pid)


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    process = start(tmp_path, "spawn", "kill")
    spawned = process.message(30)
    assert spawned is not None
    assert is_alive(spawned["figures"]["grandchild"])
    assert process.end(grace_seconds=10) == 137
    wait_for_death(spawned["figures"]["grandchild"])


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """Also what it started, which the kernel's signal to a child does not reach."""
    program = f"""
import sys
from pathlib import Path
from worker.process import JobProcess
steps = ["deaf", "spawn", "sleep 600"]
request = {{"spec": {{"do": steps}}, "run_dir": "."}}
command = [sys.executable, "-S", {str(JOB_PROCESS)!r}]
process = JobProcess(command, request, folder=Path("/"), environment={{}})
figures = process.message(30)["figures"]
print(process.pid, *figures.values(), flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None and parent.stdin is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3 and all(is_alive(pid) for pid in pids)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for_death(*pids)
    parent.stdin.close()
    parent.stdout.close()
