"""What the sandbox's tests run inside it: each request names one thing to try."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from compression.errors import InvalidDataset, RowError
from jobs.sandbox import bound_memory, stage


def sandboxed(request: dict[str, Any]) -> dict[str, Any]:
    return _TRIES[request["try"]](request)


def _try(action: Any) -> str:
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"


def _echo(request: dict[str, Any]) -> dict[str, Any]:
    print("printed, but no answer")
    os.write(1, b"written to the file descriptor\n")
    return {"said": request["say"], "cwd": os.getcwd(), "path": sys.path[0]}


def _environment(_: dict[str, Any]) -> dict[str, Any]:
    return {"names": sorted(os.environ), "isolated": sys.flags.isolated}


def _files(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "inside": _try(lambda: Path("note").write_text("x")),
        "readable": _try(lambda: Path(request["readable"]).read_bytes()),
        "secret": _try(lambda: Path(request["secret"]).read_bytes()),
        "write_readable": _try(lambda: Path(request["readable"]).write_text("x")),
        "execute": _try(lambda: os.execv("/bin/true", ["true"])),
        "connect": _try(lambda: socket.create_connection(("127.0.0.1", request["port"]), 5)),
    }


def _refuse(_: dict[str, Any]) -> dict[str, Any]:
    raise InvalidDataset(
        "two broken rows", pointer="train.tsv", rows=(RowError("train.tsv", 7, "three cells"),)
    )


def _allocate(_: dict[str, Any]) -> dict[str, Any]:
    return {"size": len(bytearray(2**31))}


def _fill_disk(_: dict[str, Any]) -> dict[str, Any]:
    with Path("big").open("wb") as file:
        for _ in range(64):
            file.write(b"x" * 2**20)
    return {}


def _crash(_: dict[str, Any]) -> dict[str, Any]:
    os.abort()


def _spin(_: dict[str, Any]) -> dict[str, Any]:
    while True:
        pass


def _sleep(request: dict[str, Any]) -> dict[str, Any]:
    """Also leaves a grandchild that would outlive it, where it is asked to in another session."""
    child = os.fork()
    if child == 0:
        if request.get("leave"):
            os.setsid()
        Path("ready").write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    if not request.get("leave"):
        time.sleep(60)
    while not Path("ready").exists():
        time.sleep(0.01)
    return {}


def _open_files(_: dict[str, Any]) -> dict[str, Any]:
    inherited = [number for number in range(3, 256) if _is_open(number)]
    opened = []
    try:
        while True:
            opened.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        return {"opened": len(opened), "error": errno.errorcode[error.errno], "had": inherited}


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _processes(request: dict[str, Any]) -> dict[str, Any]:
    return {"pid": os.getpid(), "signal": _try(lambda: os.kill(request["pid"], 0))}


def _hold(request: dict[str, Any]) -> dict[str, Any]:
    return {"size": len(bytearray(b"x") * request["size"])}


def _disk_full(_: dict[str, Any]) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device")


def _stage(request: dict[str, Any]) -> dict[str, Any]:
    """Does in a stage what the request says."""
    with stage("tokenizer", seconds=0.5):
        {"spin": _spin, "crash": _crash, "allocate": _allocate, "nothing": dict}[request["do"]]({})
    return _spin({}) if request.get("then") == "spin" else {"done": True}


def _bounded(request: dict[str, Any]) -> dict[str, Any]:
    bound_memory(2**28)
    return {"size": len(bytearray(2**28))}


def _lie(_: dict[str, Any]) -> dict[str, Any]:
    return {"deep": "x" * (65 * 2**20)}


_TRIES = {
    "echo": _echo,
    "environment": _environment,
    "files": _files,
    "refuse": _refuse,
    "allocate": _allocate,
    "fill disk": _fill_disk,
    "crash": _crash,
    "spin": _spin,
    "sleep": _sleep,
    "open files": _open_files,
    "processes": _processes,
    "disk full": _disk_full,
    "hold": _hold,
    "stage": _stage,
    "bounded": _bounded,
    "too much": _lie,
}
