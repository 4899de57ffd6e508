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
from jobs.errors import StoreFull, UploadRejected
from jobs.sandbox import Limits, confinement, run_sandboxed

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


def _living(work: Path) -> list[int]:
    """The child in this folder and all that it started: their home is there."""
    home = f"HOME={work}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours
            continue
        if home in variables:
            found.append(int(place.name))
    return found


def _gone(work: Path) -> bool:
    deadline = time.monotonic() + 10
    while _living(work) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _living(work)


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
    ("trying", "limits", "message", "code"),
    [
        ("allocate", LIMITS, "more than 1 GiB of memory", "inspection-too-large"),
        ("bounded", LIMITS, "far more than its size explains", "inspection-too-large"),
        ("fill disk", LIMITS, "unpacks to more than", "inspection-too-large"),
        ("spin", Limits(seconds=1), "longer than 1 seconds", "inspection-too-slow"),
        ("crash", LIMITS, "its reader ended unexpectedly", "inspection-failed"),
        ("too much", Limits(), "its reader ended unexpectedly", "inspection-failed"),
        ("no such thing", LIMITS, "its reader ended unexpectedly", "inspection-failed"),
    ],
)
def test_crashes_and_limits_are_refusals(
    tmp_path: Path, trying: str, limits: Limits, message: str, code: str
) -> None:
    with pytest.raises(UploadRejected, match=message) as caught:
        _run(tmp_path / "work", trying, limits)
    assert caught.value.code == code


def test_a_full_disk_is_no_fault_of_the_upload(tmp_path: Path) -> None:
    with pytest.raises(StoreFull, match="inspected on is full"):
        _run(tmp_path / "work", "disk full")


def test_it_opens_so_many_files_and_has_inherited_none(tmp_path: Path) -> None:
    with (tmp_path / "ours").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        answer = _run(tmp_path / "work", "open files")
    assert answer["error"] == "EMFILE"
    assert 200 < answer["opened"] < 256
    assert len(answer["had"]) == 1  # where it tells its answer


@pytest.mark.parametrize(
    ("do", "code"),
    [
        ("spin", "tokenizer-too-slow"),
        ("crash", "tokenizer-too-large"),
        ("allocate", "tokenizer-too-large"),
    ],
)
def test_a_stage_has_limits_of_its_own_and_is_named(tmp_path: Path, do: str, code: str) -> None:
    with pytest.raises(UploadRejected, match="its tokenizer") as caught:
        _run(tmp_path / "work", "stage", do=do)
    assert caught.value.code == code


def test_what_follows_a_stage_has_the_limits_of_before(tmp_path: Path) -> None:
    assert _run(tmp_path / "work", "stage", do="nothing") == {"done": True}
    with pytest.raises(UploadRejected, match="longer than 2 seconds") as caught:
        _run(tmp_path / "later", "stage", Limits(seconds=2), do="nothing", then="spin")
    assert caught.value.code == "inspection-too-slow"


def test_outside_of_a_child_a_stage_bounds_nothing() -> None:
    with sandbox.stage("tokenizer", seconds=0.001):
        sum(range(10**6))
    sandbox.bound_memory(1)
    assert len(bytearray(2**20)) == 2**20


def test_it_sees_no_process_but_its_own(tmp_path: Path) -> None:
    answer = _run(tmp_path / "work", "processes", pid=os.getpid())
    if confinement().namespaces:
        assert answer["pid"] == 2
        assert answer["signal"] == "ProcessLookupError"


def test_a_child_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(UploadRejected, match="longer than 2 seconds"):
        _run(tmp_path / "work", "sleep", Limits(seconds=2))
    assert (tmp_path / "work" / "ready").exists()
    assert _gone(tmp_path / "work")


def test_nothing_outlives_an_answer_in_a_session_of_its_own(tmp_path: Path) -> None:
    work = tmp_path / "work"
    _run(work, "sleep", leave=True)
    if confinement().namespaces:
        assert _gone(work)
    else:  # the one thing that a process group does not reach
        for pid in _living(work):
            os.kill(pid, signal.SIGKILL)


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
    while not (work / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(_living(work)) >= 2
    parent.kill()
    parent.wait()
    if confinement().namespaces:
        assert _gone(work)
    else:  # only a killed supervisor leaves a grandchild behind
        for pid in _living(work):
            os.kill(pid, signal.SIGKILL)


def test_what_the_kernel_grants_is_told() -> None:
    granted = confinement()
    assert granted.namespaces == _kernel_has("s._leave_network()")
    assert bool(granted.landlock) == _kernel_has("s._close_files(readable=[], writable=[])")


def test_the_usage_of_each_child_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jobs.sandbox")
    ours = bytearray(b"x") * 2**28  # which is no child's
    _run(tmp_path / "work", "hold", size=2**26)
    _run(tmp_path / "more", "hold", size=2**27)
    small, large = [record.usage for record in caplog.records if hasattr(record, "usage")]
    assert 0 < small.cpu_seconds < 10
    assert 2**26 < small.peak_bytes < 2**27 < large.peak_bytes < len(ours)
