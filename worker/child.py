"""The process of one job: the only place that imports the half of `compression` with paddle.

One JSON request comes on standard input: `{"spec", "model_dir", "dataset_dir", "run_dir",
"checkpoint_seconds", "signing_key", "profile"}`, the last two a private key in PEM and a device's
profile, or null. JSON lines go to standard output: `{"kind": "progress", "stage", "step", "total",
"message", "figures"}` and `{"kind": "checkpoint", "name", "sha256", "stage", "step"}` as it goes,
then `{"kind": "done", "report"}` or `{"kind": "failed", "code", "message", "pointer", "rows"}`.
SIGTERM makes it write a checkpoint and end without either; where `run_dir/checkpoints` holds one,
the job goes on from it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 3  # the exit status of a process that was told to stop


def main() -> int:
    # Libraries print as they like: the protocol keeps the real standard output to itself.
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(kind: str, **data: Any) -> None:
        protocol.write(json.dumps({"kind": kind, **data}) + "\n")
        protocol.flush()

    stop = threading.Event()

    def heed_stop() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())

    heed_stop()

    from compression.checkpoint import Saved
    from compression.device_profile import DeviceProfile
    from compression.errors import CompressionError, Interrupted
    from compression.report import Progress
    from compression.signing import read_private_key
    from compression.spec import Spec
    from jobs.errors import as_json

    def on_progress(progress: Progress) -> None:
        send(
            "progress",
            stage=progress.stage,
            step=progress.step,
            total=progress.total,
            message=progress.message,
            figures=dict(progress.figures),
        )

    def on_checkpoint(saved: Saved) -> None:
        send(
            "checkpoint",
            name=saved.path.name,
            sha256=saved.sha256,
            stage=saved.stage,
            step=saved.step,
        )

    request = json.loads(sys.stdin.readline())
    try:
        from compression.pipeline import compress

        heed_stop()  # paddle takes the signal for itself when it is imported, and dies of it
        pem, profile = request["signing_key"], request["profile"]
        report = compress(
            spec=Spec.model_validate(request["spec"]),
            model_dir=Path(request["model_dir"]),
            dataset_dir=Path(request["dataset_dir"]),
            run_dir=Path(request["run_dir"]),
            on_progress=on_progress,
            checkpoint_seconds=request["checkpoint_seconds"],
            on_checkpoint=on_checkpoint,
            stop=stop.is_set,
            signing_key=None if pem is None else read_private_key(pem.encode()),
            profile=None if profile is None else DeviceProfile.model_validate(profile),
        )
    except Interrupted:
        return INTERRUPTED
    except CompressionError as error:
        send("failed", **as_json(error))
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        send(
            "failed",
            code="disk-full",
            message="The worker's disk has no room left for the files of the run. Retry the job "
            "once there is some: it goes on from its last checkpoint.",
            pointer=None,
            rows=[],
        )
        return 1
    # Any other error is ours: its traceback goes to standard error, whose end the job keeps.
    send("done", report=report.model_dump(mode="json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
