"""One of the other processes of a job that trains in several; `compression.ranks` starts it.

Standard input is one line of JSON: the job's folders and spec, `rank` and `endpoints`. It
writes no file; standard output and error are its log.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main() -> None:
    # Whoever stops the job signals its whole group: its first process decides, and says so here.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # Linux: ends with the first one
    if str(os.getppid()) != os.environ["WIDTHWISE_RANK_OF"]:
        sys.exit("the job's process is gone")
    request = json.loads(sys.stdin.readline())

    from compression.errors import CompressionError, Interrupted
    from compression.pipeline import follow
    from compression.spec import Spec

    try:
        follow(
            Spec.model_validate(request["spec"]),
            Path(request["model_dir"]),
            Path(request["dataset_dir"]),
            Path(request["run_dir"]),
            rank=request["rank"],
            endpoints=request["endpoints"],
        )
    except (CompressionError, Interrupted) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
