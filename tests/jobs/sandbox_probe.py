"""What the sandbox's tests run inside it: each request names one thing to try."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from compression.errors import InvalidDataset, RowError


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
    """Also leaves a grandchild that would outlive it."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    Path("pids").write_text(f"{os.getpid()} {child}")
    time.sleep(60)
    return {}


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
    "too much": _lie,
}
