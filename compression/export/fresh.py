"""A module of this library run in a fresh process, with a timeout and a JSON answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compression
from compression.errors import ExportFailed

IMPORT_ROOT = Path(compression.__file__).resolve().parent.parent
LIBRARIES = frozenset({"onnx", "onnxruntime", "paddle", "paddlenlp", "paddle2onnx", "torch"})
STDERR_LINES = 5  # the last ones; a C++ stack trace above them helps nobody


def fresh_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with paddle kept quiet and pip kept from the network."""
    return {
        **os.environ,
        # paddle2onnx's optimizer would otherwise run pip install.
        "PIP_NO_INDEX": "1",
        "GLOG_minloglevel": "2",
        "PYTHONDONTWRITEBYTECODE": "1",
        **(extra or {}),
    }


def fresh_command(module: str, arguments: Sequence[str | Path] = ()) -> list[str]:
    """The command line; run it in IMPORT_ROOT, so `arguments` must hold absolute paths."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def last_lines(text: str, count: int = STDERR_LINES) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def runtime_libraries() -> list[str]:
    """Which of LIBRARIES this process has imported: the proof of what a file was run with."""
    return sorted({name.partition(".")[0] for name in sys.modules} & LIBRARIES)


def run_fresh(
    module: str,
    arguments: Sequence[str | Path],
    *,
    timeout_s: float,
    extra_environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `python -m module` and returns the JSON object of its last line of standard output.

    ExportFailed, with the last lines of its standard error, when it fails or takes too long.
    The process stays in this one's process group: who stops this one's group stops it.
    """
    resolved = [item.resolve() if isinstance(item, Path) else item for item in arguments]
    try:
        done = subprocess.run(
            fresh_command(module, resolved),
            cwd=IMPORT_ROOT,
            env=fresh_environment(extra_environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise ExportFailed(f"{module} took longer than {timeout_s:g} seconds") from expired
    if done.returncode != 0:
        raise ExportFailed(
            f"{module} ended with status {done.returncode}: {last_lines(done.stderr)}"
        )
    answer = last_lines(done.stdout, 1)
    try:
        parsed = json.loads(answer)
    except ValueError as error:
        raise ExportFailed(f"{module} answered {answer[:200]!r}, which is not JSON") from error
    if not isinstance(parsed, dict):
        raise ExportFailed(f"{module} answered {answer[:200]!r}, which is not an object")
    return parsed
