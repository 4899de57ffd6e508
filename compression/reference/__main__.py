"""The reference process: `python -m compression.reference importance|distil FOLDER`.

FOLDER holds a request (`exchange.py`) and receives the answer: the scores, or the trained
supernet's full-width weights by our names. JSON lines on standard output tell of each batch or
step, `{"step", "total", "losses", "seconds"}`, or of a loss that was not finite, `{"diverged"}`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import paddle

from compression.errors import TrainingDiverged
from compression.reference.exchange import read_request


def main() -> int:
    # Libraries print as they like: the protocol keeps the real standard output to itself.
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**event: Any) -> None:
        protocol.write(json.dumps(event) + "\n")
        protocol.flush()

    command, folder = sys.argv[1], Path(sys.argv[2])
    request = read_request(folder)
    paddle.set_device("gpu:0" if request.spec.device == "gpu" else request.spec.device)
    paddle.seed(request.spec.seed)
    # Takes several seconds: a request that cannot be read has failed before.
    from compression.reference import stages

    try:
        {"importance": stages.importance, "distil": stages.distil}[command](request, folder, send)
    except TrainingDiverged as error:
        send(diverged=error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
