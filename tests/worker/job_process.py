"""Stands in for `worker.child` in tests: the same protocol, told by the spec what to do.

A real process: it needs neither paddle nor a real model. `spec["do"]`: a list of steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any


def send(kind: str, **data: Any) -> None:
    print(json.dumps({"kind": kind, **data}), flush=True)


def progress(step: int = 0, total: int = 1, stage: str = "load") -> None:
    send("progress", stage=stage, step=step, total=total, message="", figures={"pid": os.getpid()})


def checkpoint(folder: Path, step: int) -> None:
    """A real file without tensors, of a processor that no host has."""
    host = {"cpu": "", "replicas": 1, "libraries": {}, "variables": {"OMP_NUM_THREADS": "77"}}
    stages = {"distil": {"step": step, "done": False, "figures": {}}}
    facts = {"identity": {}, "host": host, "seconds": 1.0, "stages": stages}
    header = json.dumps({"__metadata__": {"job": json.dumps(facts)}}).encode()
    content = len(header).to_bytes(8, "little") + header
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"{step:06d}.{sha256}.safetensors"
    (folder / name).write_bytes(content)
    send("checkpoint", name=name, sha256=sha256, stage="distil", step=step)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    run_dir = Path(request["run_dir"])
    checkpoints = run_dir / "checkpoints"

    def write_the_last_and_end(number: int, frame: FrameType | None) -> None:
        checkpoint(checkpoints, 99)
        sys.exit(3)

    for step in request["spec"]["do"]:
        name, _, value = step.partition(" ")
        if name == "progress":
            progress()
        elif name == "many":
            for number in range(int(value) + 1):
                progress(number, int(value), stage="distil")
        elif name == "check":
            assert (Path(request["model_dir"]) / "config.json").read_bytes() == b"{}"
            assert (Path(request["dataset_dir"]) / "train.jsonl").read_bytes() == b"[]"
        elif name == "key":
            assert request["signing_key"] == value
            assert value not in os.environ.values()
        elif name == "profile":
            assert (request["profile"] or {}).get("device") == value, request["profile"]
        elif name == "artifact":
            path = run_dir / "artifacts" / value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value.encode())
        elif name == "checkpoint":
            checkpoint(checkpoints, int(value))
        elif name == "checkpoint-at-the-end":
            signal.signal(signal.SIGTERM, write_the_last_and_end)
        elif name == "resumed":
            found = [int(path.name[:6]) for path in sorted(checkpoints.iterdir())]
            send("progress", stage="found", step=0, total=1, message="", figures={"found": found})
        elif name == "environment":
            send("progress", stage="load", step=0, total=2, message="", figures=dict(os.environ))
        elif name == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif name == "spawn":
            # A grandchild that is deaf too and holds our standard output open.
            code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
            child = subprocess.Popen([sys.executable, "-S", "-c", code])
            pids = {"pid": os.getpid(), "grandchild": child.pid}
            send("progress", stage="spawned", step=0, total=1, message="", figures=pids)
        elif name == "sleep":
            time.sleep(float(value))
        elif name == "wait":  # for a file, so that a test decides when the job goes on
            while not Path(value).exists():
                time.sleep(0.02)
        elif name == "garbage":
            print("not JSON")
            print("[1]", flush=True)
        elif name == "complain":
            print(value, file=sys.stderr, flush=True)
        elif name == "fail":
            send("failed", code="invalid-dataset", message=value, pointer="/task", rows=[])
            sys.exit(1)
        elif name == "exit":
            sys.exit(int(value))
        elif name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise ValueError(step)
    send("done", report={"selection": {"subnetwork": "w1_2"}})


if __name__ == "__main__":
    main()
