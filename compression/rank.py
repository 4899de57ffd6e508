"""One of the other processes of a job that trains in several; `compression.ranks` starts it.

The first line of standard input is JSON: the job's folders and spec, `rank` and `endpoints`;
each line after it says that the job's process has come to where both go on. It writes no
file; standard output and error are its log.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main() -> None:
    _leave_stopping_to_the_first()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # Linux: ends with the first one
    if str(os.getppid()) != os.environ["WIDTHWISE_RANK_OF"]:
        sys.exit("the job's process is gone")
    request = json.loads(sys.stdin.buffer.readline())

    def meet() -> None:
        if not sys.stdin.buffer.readline():
            sys.exit("the job's process is gone")

    from compression.errors import CompressionError, Interrupted
    from compression.learning import follow
    from compression.ranks import LINGER_SECONDS
    from compression.spec import Spec

    _leave_stopping_to_the_first()  # paddle takes SIGTERM for itself when it is imported
    try:
        follow(
            Spec.model_validate(request["spec"]),
            Path(request["model_dir"]),
            Path(request["dataset_dir"]),
            Path(request["run_dir"]),
            rank=request["rank"],
            endpoints=request["endpoints"],
            meet=meet,
        )
    except Interrupted:
        return
    except CompressionError as error:
        sys.exit(str(error))
    except RuntimeError:
        # Most likely another process died and this one lost it: that one is to be blamed.
        traceback.print_exc()
        time.sleep(LINGER_SECONDS)
        sys.exit(1)


def _leave_stopping_to_the_first() -> None:
    """Whoever stops the job signals its whole group: its first process decides, and says so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
