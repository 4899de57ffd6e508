"""The engine `paddleslim`: its stages, each in a fresh reference process, with files in and out."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from compression.errors import ReferenceFailed, TrainingDiverged
from compression.export.fresh import IMPORT_ROOT, fresh_command, fresh_environment, last_lines
from compression.importance import Importance
from compression.reference.exchange import SUPERNET, Request, read_scores, write_request
from compression.report import TrainingReport
from compression.supernet import subnetwork_name
from compression.training import Step

IMPORTANCE = "importance"
DISTIL = "distil"


def measure_importance(
    work: Path, request: Request, *, on_batch: Callable[[int], None], replicas: int = 1
) -> Importance:
    """PaddleSlim's compute_neuron_head_importance of the request's model and rows.

    Its process has one replica alone, whose kernels get the threads of `replicas`.
    """
    folder = work / IMPORTANCE
    write_request(folder, request)
    _run(IMPORTANCE, folder, lambda event: on_batch(event["step"]), replicas)
    return read_scores(folder)


def distil(
    work: Path,
    request: Request,
    *,
    on_step: Callable[[Step], None],
    replicas: int = 1,
) -> tuple[dict[str, np.ndarray], TrainingReport]:
    """PaddleSlim's reordering and training loop; the full-width supernet's weights by our names.

    The spec's patience, time budget, micro-batch and checkpoints are not for this engine.
    """
    folder = work / DISTIL
    write_request(folder, request)
    seconds: list[float] = []
    names = [subnetwork_name(width) for width in request.spec.supernet.width_mults]

    def on_event(event: dict[str, Any]) -> None:
        losses = dict(zip(names, event["losses"], strict=True))
        seconds.append(event["seconds"])
        on_step(Step(event["step"], event["total"], losses, event["seconds"]))

    _run(DISTIL, folder, on_event, replicas)
    report = TrainingReport(
        steps=len(seconds),
        planned_steps=len(seconds),
        best_step=len(seconds),
        ended="complete",
        step_seconds=statistics.median(seconds),
        micro_batch=None,
    )
    return load_file(folder / SUPERNET), report


def _run(
    command: str, folder: Path, on_event: Callable[[dict[str, Any]], None], replicas: int
) -> None:
    """Runs the process to its end, an event at a time. ReferenceFailed with its last words."""
    log = folder / "stderr.log"
    diverged = None
    threads = str(replicas * int(os.environ.get("OMP_NUM_THREADS", "1")))
    environment = fresh_environment(
        {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # At import PaddleNLP makes folders below its home, and hub clients look for theirs.
            "PPNLP_HOME": str(folder.resolve() / "paddlenlp"),
            "HF_HUB_OFFLINE": "1",
        }
    )
    with (
        log.open("w") as errors,
        subprocess.Popen(
            fresh_command("compression.reference", [command, folder.resolve()]),
            cwd=IMPORT_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if "diverged" in event:
                    diverged = event["diverged"]
                else:
                    on_event(event)
        except BaseException:
            process.kill()
            raise
    if diverged is not None:
        raise TrainingDiverged(diverged)
    if process.returncode != 0:
        said = last_lines(log.read_text(errors="replace"))
        raise ReferenceFailed(
            f"the {command} process of the engine paddleslim ended with status "
            f"{process.returncode}: {said}; the engine widthwise does the same job"
        )
