"""Stands between the runner and a job's process, and outlives neither.

Started as a script, by its path, in a process group of its own: `supervise.py PARENT --
COMMAND...`. The command gets this process's standard streams. If the worker dies, the
kernel tells this process, which kills its whole group: the command and whatever that has
started. A job's process alone could be told too, but not the processes that it starts.
Exits with the command's exit status, or with 128 + N if signal N ended it.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _signal_me_when_my_parent_dies(number: int) -> None:
    if _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _kill_group(number: int = 0, frame: FrameType | None = None) -> None:
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    parent = int(sys.argv[1])
    command = sys.argv[3:]
    # The runner ends a job with SIGTERM to the group; the command is given time for it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, _kill_group)
    _signal_me_when_my_parent_dies(signal.SIGHUP)
    if os.getppid() != parent:  # it died before the call above
        return 1
    me = os.getpid()
    child = os.fork()  # this process has one thread, so a fork is safe
    if child == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            _signal_me_when_my_parent_dies(signal.SIGKILL)
            if os.getppid() == me:
                os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error}\n".encode())
        os._exit(127)
    for descriptor in (0, 1):  # the runner must see the command's end of file
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main())
