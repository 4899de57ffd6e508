"""A child process for reading what nobody trusts: limits, no environment, no files but its own.

The child is this interpreter in isolated mode. Before it reads a byte of the
upload it gives up what it will not need: memory, processor time, file sizes and
open files are bounded (setrlimit), it gets a network namespace without a network
and a Landlock domain in which only named folders can be read or written and
nothing can be executed. Namespaces and Landlock are refused by some kernels and
containers; the child then goes on with the rest, which holds everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import logging
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from compression.errors import CompressionError, RowError
from jobs.errors import StoreFull, UploadRejected, as_json

_LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parent.parent
_MAX_ANSWER_BYTES = 64 * 2**20
_MAX_ROWS = 100
_CODE = re.compile(r"[a-z][a-z0-9-]{0,63}")
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from jobs.sandbox import child_main; child_main(sys.argv[2])"
)


@dataclass(frozen=True)
class Limits:
    """What a child may use. `output_bytes` bounds what it may write, each file and all together."""

    seconds: float = 300
    memory_bytes: int = 4 * 2**30
    output_bytes: int = 8 * 2**30
    max_files: int = 1000


def run_sandboxed(
    module: str,
    request: Mapping[str, Any],
    work_dir: Path,
    limits: Limits,
    *,
    readable: Sequence[Path] = (),
    writable: Sequence[Path] = (),
) -> dict[str, Any]:
    """Runs `module.sandboxed(request)` in a confined child and returns what it returned.

    The child works in `work_dir`; besides it, it may read below `readable` and read
    and write below `writable`. UploadRejected is what the child raised as such (or
    as a CompressionError), or says that the upload could not be inspected: the child
    crashed, or ran into a limit. StoreFull: the disk, for which the upload is not to blame. The
    child and all it started are gone afterwards.
    """
    message = {
        "request": dict(request),
        "limits": asdict(limits),
        "readable": [str(path.absolute()) for path in readable],
        "writable": [str(path.absolute()) for path in (work_dir, *writable)],
    }
    # Files, not pipes: nothing to deadlock on, and RLIMIT_FSIZE bounds the answer.
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(json.dumps(message).encode())
        stdin.seek(0)
        status = _run_child(module, work_dir, limits, stdin=stdin, stdout=stdout, stderr=stderr)
        if status == _DISK_FULL:
            raise StoreFull("The disk that uploads are inspected on is full.")
        answer = _read_answer(stdout) if status == 0 else None
        if answer is None:
            _LOG.warning(
                "the inspection child ended with status %s: %s", status, _tail(stderr, 2000)
            )
            raise UploadRejected(
                f"The upload could not be inspected: {_why(status, limits)}.",
                code="inspection-failed",
            )
    if "rejected" in answer:
        raise _rejection(answer["rejected"])
    result = answer.get("result")
    if not isinstance(result, dict):
        raise UploadRejected("The upload could not be inspected.", code="inspection-failed")
    return result


def _run_child(
    module: str,
    work_dir: Path,
    limits: Limits,
    *,
    stdin: IO[bytes],
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> int | None:
    """The child's exit status (negative: a signal); None where it took too long."""
    process = subprocess.Popen(
        # -I: no PYTHON* variables, no user site, no current folder on the import path.
        [sys.executable, "-I", "-X", "utf8", "-c", _START, str(_ROOT), module],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=work_dir,
        env=_environment(work_dir),
        start_new_session=True,
    )
    try:
        in_time = _wait(process.pid, time.monotonic() + limits.seconds)
    finally:
        # Not reaped yet, so the number is still its own: whatever it forked goes with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status if in_time else None


def _wait(pid: int, deadline: float) -> bool:
    """Waits for the process to end, without reaping it; False where the deadline came first."""
    pause = 0.002
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return True


def _environment(work_dir: Path) -> dict[str, str]:
    """Nothing of ours but the path to shared libraries: credentials stay behind."""
    environment = {
        "LANG": "C.UTF-8",
        "HOME": str(work_dir),
        "TMPDIR": str(work_dir),
        # A pool of threads costs address space, and an inspection has nothing to share out.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _why(status: int | None, limits: Limits) -> str:
    if status is None or status == -signal.SIGXCPU:
        return f"it takes longer than {limits.seconds:g} seconds to read"
    if status == _OUT_OF_MEMORY:
        return f"it takes more than {limits.memory_bytes / 2**30:.3g} GiB of memory to read"
    if status == _OUT_OF_SPACE:
        return f"it unpacks to more than {limits.output_bytes / 2**30:.3g} GiB"
    return "its reader ended unexpectedly"


def _read_answer(stdout: IO[bytes]) -> dict[str, Any] | None:
    stdout.seek(0)
    raw = stdout.read(_MAX_ANSWER_BYTES + 1)
    if len(raw) > _MAX_ANSWER_BYTES:
        return None
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _tail(file: IO[bytes], size: int) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - size))
    return file.read().decode("utf-8", "replace").strip()


def _rejection(data: Any) -> UploadRejected:
    """The child's refusal; believed no more than anything else that the child says."""
    data = data if isinstance(data, dict) else {}
    message, code, pointer = data.get("message"), data.get("code"), data.get("pointer")
    known = isinstance(code, str) and _CODE.fullmatch(code)
    listed = data.get("rows")
    rows = []
    for row in listed[:_MAX_ROWS] if isinstance(listed, list) else []:
        if isinstance(row, dict) and type(row.get("line")) is int:
            file, said = str(row.get("file"))[:300], str(row.get("message"))[:1000]
            rows.append(RowError(file=file, line=row["line"], message=said))
    return UploadRejected(
        message[:4000] if isinstance(message, str) else "The upload could not be inspected.",
        code=str(code) if known else "upload-rejected",
        pointer=pointer[:300] if isinstance(pointer, str) else None,
        rows=tuple(rows),
    )


# --- in the child ---------------------------------------------------------------------------

_OUT_OF_MEMORY = 70
_OUT_OF_SPACE = 71
_DISK_FULL = 72


def child_main(module: str) -> None:
    """Confines this process, answers the one request on stdin, and exits."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    message = json.load(sys.stdin)
    limits = Limits(**message["limits"])
    _leave_network()
    _die_with_parent()  # after the namespaces: entering one may clear the signal
    _bound_resources(limits)
    _close_files(readable=message["readable"], writable=message["writable"])
    try:
        answer = _answer(module, message["request"])
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            os._exit(_DISK_FULL)
        if error.errno == errno.EFBIG:
            os._exit(_OUT_OF_SPACE)
        raise
    json.dump(answer, answers)
    answers.flush()
    os._exit(0)  # without finalizers: nothing left in memory gets a last word


def _answer(module: str, request: dict[str, Any]) -> dict[str, Any]:
    sandboxed = importlib.import_module(module).sandboxed
    try:
        return {"result": sandboxed(request)}
    except (UploadRejected, CompressionError) as error:
        return {"rejected": as_json(error)}


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWNET = 0x40000000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWIPC = 0x08000000


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _leave_network() -> bool:
    """A network namespace of its own, which holds no network. Must come before any thread."""
    if sys.platform != "linux":
        return False
    return bool(_LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC) == 0)


def _bound_resources(limits: Limits) -> None:
    cpu = max(1, round(limits.seconds))
    for kind, amount, beyond in (
        (resource.RLIMIT_AS, limits.memory_bytes, 0),
        (resource.RLIMIT_CPU, cpu, 1),  # SIGXCPU first: SIGKILL would not say why
        (resource.RLIMIT_FSIZE, limits.output_bytes, 0),
        (resource.RLIMIT_NOFILE, 256, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = amount + beyond if hard == resource.RLIM_INFINITY else min(amount + beyond, hard)
        resource.setrlimit(kind, (min(amount, most), most))


# Landlock (docs.kernel.org/userspace-api/landlock.html); its calls have the same numbers on
# every architecture. Rights by bit: 0 execute, 1 write file, 2 read file, 3 read folder,
# 4-12 remove and make entries, 13 refer, 14 truncate, 15 device ioctl.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_READ = 1 << 2 | 1 << 3
_ON_FILES = 1 << 1 | 1 << 2 | 1 << 14
_SYSTEM_READABLE = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/random",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/sys/devices/system/cpu",
)  # fmt: skip


def _close_files(*, readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Leaves only the interpreter, this code and the given paths to be opened; nothing to execute.

    False where the kernel has no Landlock.
    """
    if sys.platform != "linux":
        return False
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    handled = (1 << _RIGHTS_BY_VERSION.get(version, 16)) - 1
    network = 0b11 if version >= 4 else 0  # bind and connect over TCP
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals outside
    attributes = struct.pack("=QQQ", handled, network, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    try:
        interpreter = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
        code = (str(_ROOT / "jobs"), str(_ROOT / "compression"))
        for path in (*_SYSTEM_READABLE, *interpreter, *code, *readable):
            _allow(ruleset, path, _READ)
        for path in writable:
            _allow(ruleset, path, handled & ~1)
        return bool(_LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)) == 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not on this machine
        return
    try:
        if not os.path.isdir(path):
            rights &= _ON_FILES
        rule = struct.pack("=Qi", rights, handle)
        _LIBC.syscall(_LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(handle)
