"""A training in a process of its own, for tests that kill it: `KIND FOLDER` as arguments.

It prints each step as it is done and writes a checkpoint after each; `end_weights` then gives
the weights that it ends with, and the same training can be run by the test itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from compression.checkpoint import Checkpoints, host_facts
from compression.distillation import distil, distil_depth
from compression.encoder import numpy_weights
from compression.report import TrainingReport
from compression.sampling import Sandwich
from compression.spec import DepthSpec, DistillationSpec, FineTuneSpec
from compression.supernet import subnetwork_of
from compression.training import Step, Surroundings, fine_tune
from tests.encoders import CLASSIFICATION, random_rows, tiny_encoder

STEPS = 24  # over several epochs, with dropout, a patience that never runs out and micro-batches
SETTINGS = {
    "batch_size": 8,
    "epochs": 4,
    "max_steps": STEPS,
    "patience": 50,
    "evaluate_every": 3,
    "micro_batch": 5,
}
DEEP = {"layers": 4, "heads": (4,) * 4, "ffn": (16,) * 4}


def checkpoints_in(folder: Path, every_seconds: float = 0.0) -> Checkpoints:
    return Checkpoints(
        folder, identity={"spec": "tiny"}, host=host_facts({}), every_seconds=every_seconds
    )


def run(
    kind: str,
    surroundings: Surroundings,
    on_step: Callable[[Step], None] = lambda step: None,
    *,
    seed: int = 4,
) -> tuple[TrainingReport, dict[str, np.ndarray]]:
    """The training from its start, or from its checkpoint; the weights that it ends with."""
    model, data = tiny_encoder(1), random_rows(60)
    if kind == "teacher":
        report = fine_tune(
            model,
            data,
            FineTuneSpec(**SETTINGS, learning_rate=1e-2),
            CLASSIFICATION,
            surroundings,
            seed=seed,
            on_step=on_step,
            replicas=2,
        )
    elif kind == "depth":
        model = tiny_encoder(1, **DEEP)
        report = distil_depth(
            model,
            tiny_encoder(2, **DEEP),
            data,
            Sandwich(
                [
                    subnetwork_of(model.config, Fraction(width), Fraction(depth))
                    for width in ("1", "1/2")
                    for depth in ("1", "3/4", "1/2")
                ],
                seed,
            ),
            DepthSpec(**SETTINGS, learning_rate=1e-2),
            CLASSIFICATION,
            surroundings,
            seed=seed,
            on_step=on_step,
            replicas=2,
        )
    else:
        report = distil(
            model,
            tiny_encoder(2),
            data,
            [subnetwork_of(model.config, Fraction(width)) for width in ("1", "1/2")],
            DistillationSpec(**SETTINGS, learning_rate=1e-2),
            CLASSIFICATION,
            surroundings,
            seed=seed,
            on_step=on_step,
            replicas=2,
        )
    return report, numpy_weights(model)


if __name__ == "__main__":
    run(
        sys.argv[1],
        Surroundings(sys.argv[1], "", checkpoints_in(Path(sys.argv[2]))),
        lambda step: print(step.done, flush=True),
    )
