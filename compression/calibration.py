"""Seconds of one distillation step of a small random supernet, in this process's environment.

    python -m compression.calibration

prints them. A worker runs it once with each environment that it may give to trainings.
"""

from __future__ import annotations

import os
import statistics
import time
from fractions import Fraction

import numpy as np

from compression.batches import Encoded
from compression.distillation import SupernetGradients
from compression.encoder import Encoder
from compression.parallel import Replicas
from compression.runtime_env import core_count, replica_count
from compression.spec import DistillationSpec, TaskSpec
from compression.supernet import subnetwork_of
from compression.tasks import make_task
from compression.teachers.config import EncoderConfig

# Two of MiniLM's layers and a batch as long as short sentences are: half a second a step.
CONFIG = EncoderConfig(
    family="bert",
    vocab_size=2000,
    hidden=384,
    layers=2,
    heads=(12, 12),
    head_dim=32,
    ffn=(1536, 1536),
    max_positions=64,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    activation="gelu",
    hidden_dropout=0.0,
    attention_dropout=0.0,
    pad_token_id=0,
    num_labels=2,
)
ROWS, TOKENS, STEPS = 32, 24, 5


def step_seconds() -> float:
    """The median of a few steps after one that warms up."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1, CONFIG.vocab_size, (ROWS, TOKENS)).tolist()
    data = Encoded(ids, [[0] * TOKENS] * ROWS, np.zeros(ROWS, np.int64))
    supernet, teacher = Encoder(CONFIG), Encoder(CONFIG)
    subnetworks = [subnetwork_of(CONFIG, Fraction(w)) for w in ("1", "1/2")]
    count = replica_count(os.environ, cores=core_count())
    seconds = []
    with Replicas(supernet, count) as replicas:
        gradients = SupernetGradients(
            replicas,
            teacher,
            data,
            subnetworks,
            DistillationSpec(),
            make_task(TaskSpec(), ("0", "1")),
            seed=0,
        )
        for step in range(STEPS + 1):
            started = time.perf_counter()
            gradients(np.arange(ROWS), step=step)
            supernet.clear_gradients(set_to_zero=False)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    print(step_seconds())
