"""How far the weights of one training part, when it goes on with other threads or replicas.

A distillation of a random encoder (4 layers, hidden 128) with dropout, run in processes that
differ in the threads of a kernel or in the replicas that share a batch: the largest difference
of any weight from one thread and one replica, and in units of a step's learning rate. Key
biases are left out: they have no effect and no gradient, so that AdamW scales rounding up.

    .venv/worker/bin/python -m benchmarks.host_change
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

SETTINGS = {"1 thread": (1, 1), "2 threads": (2, 1), "2 replicas": (1, 2)}
RATE = 1e-4


def train(out: Path, *, steps: int, replicas: int) -> None:
    """Writes the weights that the training ends with."""
    import numpy as np

    from compression.batches import Encoded
    from compression.distillation import distil
    from compression.encoder import Encoder, build_encoder, numpy_weights
    from compression.spec import DistillationSpec, TaskSpec
    from compression.supernet import subnetwork_of
    from compression.tasks import make_task
    from compression.teachers.config import EncoderConfig

    config = EncoderConfig(
        family="bert",
        vocab_size=2000,
        hidden=128,
        layers=4,
        heads=(4,) * 4,
        head_dim=32,
        ffn=(512,) * 4,
        max_positions=64,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        activation="gelu",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        pad_token_id=0,
        num_labels=2,
    )

    def encoder(seed: int) -> Encoder:
        generator = np.random.default_rng(seed)
        weights = {
            name: generator.normal(name.endswith("norm.weight"), 0.05, value.shape)
            for name, value in Encoder(config).state_dict().items()
        }
        return build_encoder(config, weights)

    generator = np.random.default_rng(0)
    ids = [generator.integers(1, 2000, n).tolist() for n in generator.integers(8, 32, 512)]
    supernet = encoder(1)
    distil(
        supernet,
        encoder(2),
        Encoded(ids, [[0] * len(row) for row in ids], None),
        [subnetwork_of(config, Fraction(width)) for width in ("1", "1/2")],
        DistillationSpec(max_steps=steps, epochs=100, batch_size=16, learning_rate=RATE),
        make_task(TaskSpec(), ("0", "1")),
        seed=0,
        on_step=lambda step: None,
        replicas=replicas,
    )
    np.savez(out, **numpy_weights(supernet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--replicas", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        train(args.one, steps=args.steps, replicas=args.replicas)
        return
    import numpy as np

    ends = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (threads, replicas) in SETTINGS.items():
            out = Path(folder) / f"{len(ends)}.npz"
            command = [sys.executable, "-m", "benchmarks.host_change", "--one", str(out)]
            command += ["--steps", str(args.steps), "--replicas", str(replicas)]
            numbers = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            subprocess.run(command, env={**os.environ, **numbers}, check=True)
            ends[name] = dict(np.load(out))
    first = next(iter(ends.values()))
    found = {
        name: max(
            float(np.abs(value - first[key]).max())
            for key, value in weights.items()
            if not key.endswith("key.bias")
        )
        for name, weights in ends.items()
    }
    print(json.dumps({"steps": args.steps, "largest_difference": found, "learning_rate": RATE}))


if __name__ == "__main__":
    main()
