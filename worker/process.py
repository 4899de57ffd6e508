"""A job's process: started fresh, spoken to in JSON lines, ended with all that it started."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_SUPERVISOR = Path(__file__).with_name("supervise.py")
_LAST_LINES = 50
_LINE_CHARACTERS = 2000


class JobProcess:
    """Starts `command` in its own session and writes `request` to it as one JSON line.

    The thread that makes this object must live until `end` has returned: the kernel takes
    that thread's end for the parent's death, and the process is then killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        request: Mapping[str, Any],
        *,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(maxsize=1000)
        self._errors: deque[str] = deque(maxlen=_LAST_LINES)
        self._exit_code: int | None = None
        # Nothing of this process's Python settings reaches the supervisor (-I), and it
        # needs no installed package (-S), so it starts in a few milliseconds.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid()), "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._readers = [
            threading.Thread(target=self._read_messages, args=(self._process.stdout,)),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,)),
        ]
        for reader in self._readers:
            reader.daemon = True
            reader.start()
        with suppress(BrokenPipeError):  # it died at once; `message` and `end` tell the rest
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.close()

    @property
    def pid(self) -> int:
        """The supervisor's, which is also the process group's."""
        return self._process.pid

    def message(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None if none came in time. EOFError when there will be none."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
            raise EOFError
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            self._errors.append(line[:_LINE_CHARACTERS])
            return None
        return message

    def last_lines(self) -> list[str]:
        """The end of what it wrote to standard error."""
        return list(self._errors)

    def ask_to_end(self) -> None:
        """SIGTERM to the whole group: the job's process writes a checkpoint and ends."""
        self._signal(signal.SIGTERM)

    def kill_rest(self) -> None:
        """Kills what the command has left behind, once it has ended: then its messages end too."""
        self._signal(signal.SIGKILL)

    def end(self, *, grace_seconds: float = 0) -> int:
        """Ends the whole group and returns the command's exit status.

        It is given `grace_seconds` to end by itself, and is then killed.
        """
        if self._exit_code is not None:
            return self._exit_code
        deadline = time.monotonic() + grace_seconds
        while not self.has_exited() and time.monotonic() < deadline:
            # Its messages are no longer wanted, but a full pipe must not keep it alive.
            self._drop_messages()
            time.sleep(0.02)
        # The supervisor is not reaped yet, so its number still belongs to this group.
        self._signal(signal.SIGKILL)
        self._exit_code = self._process.wait()
        for reader in self._readers:
            while reader.is_alive():
                self._drop_messages()
                reader.join(timeout=0.02)
        self._drop_messages()
        self._lines.put(None)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):
                    stream.close()
        return self._exit_code

    def has_exited(self) -> bool:
        """Whether the command has ended; what it started, or its messages, may remain."""
        try:
            state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        return state is not None

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _drop_messages(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._lines.get_nowait()

    def _read_messages(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._lines.put(line.decode("utf-8", "replace").rstrip("\n"))
        self._lines.put(None)

    def _read_errors(self, stream: IO[bytes]) -> None:
        # A progress bar writes no line ends: read pieces, so that nothing grows unbounded.
        rest = ""
        while piece := os.read(stream.fileno(), 65536):
            *lines, rest = (rest + piece.decode("utf-8", "replace")).split("\n")
            self._errors.extend(line[-_LINE_CHARACTERS:].rstrip("\r") for line in lines)
            rest = rest[-_LINE_CHARACTERS:]
        if rest:
            self._errors.append(rest)


def exit_in_words(code: int) -> str:
    """Of a status as `JobProcess.end` returns it."""
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        if number == signal.SIGKILL:
            return f"was ended by {name}, most often a sign that the memory ran out"
        return f"was ended by {name}"
    return f"ended with status {code}"
