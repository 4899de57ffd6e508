from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import sandbox
from jobs.errors import UploadRejected
from jobs.sandbox import Limits, run_sandboxed

ROOT = Path(__file__).parents[2]
LIMITS = Limits(seconds=30, memory_bytes=2**30, output_bytes=2**25)


def _run(work_dir: Path, trying: str, limits: Limits = LIMITS, **request: Any) -> dict[str, Any]:
    work_dir.mkdir(exist_ok=True)
    return run_sandboxed(
        "tests.jobs.sandbox_probe",
        {"try": trying, **request},
        work_dir,
        limits,
        # The probe lies outside the code that the sandbox lets its children import.
        readable=[ROOT, *(Path(p) for p in (request.get("readable"),) if p)],
    )


def _kernel_has(confine: str) -> bool:
    """Whether this kernel grants one of the confinements that the sandbox can do without."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import jobs.sandbox as s; "
    code += f"sys.exit(not {confine})"
    command = [sys.executable, "-I", "-c", code, str(ROOT)]
    return subprocess.run(command, check=False).returncode == 0


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _alive(pid)


def test_it_answers_and_nothing_printed_gets_into_the_answer(tmp_path: Path) -> None:
    answer = _run(tmp_path / "work", "echo", say=["hé", 1.5, None])
    assert answer["said"] == ["hé", 1.5, None]
    assert answer["cwd"] == str(tmp_path / "work")
    assert answer["path"] == str(ROOT)


def test_it_sees_nothing_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    answer = _run(tmp_path / "work", "environment")
    assert answer["isolated"] == 1
    assert not {"AWS_SECRET_ACCESS_KEY", "PYTHONPATH"} & set(answer["names"])
    assert set(answer["names"]) <= {
        *sandbox._environment(tmp_path), "LC_CTYPE", "LD_LIBRARY_PATH",
    }  # fmt: skip


def test_it_reaches_no_file_program_or_network_but_its_own(tmp_path: Path) -> None:
    for name in ("secret", "readable"):
        (tmp_path / name).write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = _run(
            tmp_path / "work",
            "files",
            readable=str(tmp_path / "readable"),
            secret=str(tmp_path / "secret"),
            port=server.getsockname()[1],
        )
    assert (answer["inside"], answer["readable"]) == ("done", "done")
    if _kernel_has("s._close_files(readable=[], writable=[])"):
        assert (
            answer["secret"] == answer["execute"] == answer["write_readable"] == "PermissionError"
        )
    if _kernel_has("s._leave_network()"):
        assert answer["connect"] != "done"


def test_a_refusal_keeps_its_code_pointer_and_rows(tmp_path: Path) -> None:
    with pytest.raises(UploadRejected) as caught:
        _run(tmp_path / "work", "refuse")
    error = caught.value
    assert (error.message, error.code, error.pointer) == (
        "two broken rows", "invalid-dataset", "train.tsv",
    )  # fmt: skip
    assert [(row.file, row.line, row.message) for row in error.rows] == [
        ("train.tsv", 7, "three cells")
    ]


@pytest.mark.parametrize(
    ("trying", "limits", "message"),
    [
        ("allocate", LIMITS, "more than 1 GiB of memory"),
        ("fill disk", LIMITS, "unpacks to more than"),
        ("crash", LIMITS, "its reader ended unexpectedly"),
        ("spin", Limits(seconds=1), "longer than 1 seconds"),
        ("too much", Limits(), "its reader ended unexpectedly"),
        ("no such thing", LIMITS, "its reader ended unexpectedly"),
    ],
)
def test_crashes_and_limits_are_refusals(
    tmp_path: Path, trying: str, limits: Limits, message: str
) -> None:
    with pytest.raises(UploadRejected, match=message) as caught:
        _run(tmp_path / "work", trying, limits)
    assert caught.value.code == "inspection-failed"


def test_a_child_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(UploadRejected, match="longer than 2 seconds"):
        _run(tmp_path / "work", "sleep", Limits(seconds=2))
    pids = [int(pid) for pid in (tmp_path / "work" / "pids").read_text().split()]
    assert len(pids) == 2
    assert all(_gone(pid) for pid in pids)


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from jobs.sandbox import Limits, run_sandboxed\n"
        "run_sandboxed('tests.jobs.sandbox_probe', {'try': 'sleep'}, Path(sys.argv[2]), Limits(),"
        " readable=[Path(sys.argv[1])])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(work)])
    deadline = time.monotonic() + 30
    while not (work / "pids").exists() or not (work / "pids").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child, grandchild = (int(pid) for pid in (work / "pids").read_text().split())
    parent.kill()
    parent.wait()
    try:
        assert _gone(child)
    finally:
        os.kill(grandchild, signal.SIGKILL)  # only a killed supervisor leaves one behind
