"""How far the weights of one training part, when it goes on with kernels that round otherwise.

A distillation of a random encoder (4 layers, hidden 128) with dropout, from one start, in
processes that differ in the environment: MKL's code path for one kind of processor or
another, and the threads of a kernel. That stands for a job that is resumed on another kind
of host, which takes the other path from where it goes on; here it differs from the first
step. The largest difference of any weight from the first setting's, and the same over the
learning rate (AdamW moves a weight by about that much a step). Key biases are left out:
they have no effect and no gradient, so that AdamW scales rounding up.

The last line of standard output is one JSON object.
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

SETTINGS = {
    "reference": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "another code path": {"MKL_DEBUG_CPU_TYPE": "5"},
    "2 threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
}
RATE = 1e-4


def train(out: Path, *, steps: int) -> None:
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
    )
    np.savez(out, **numpy_weights(supernet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        train(args.one, steps=args.steps)
        return
    import numpy as np

    ends = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, variables in SETTINGS.items():
            out = Path(folder) / f"{len(ends)}.npz"
            command = [sys.executable, "-m", "benchmarks.host_change", "--one", str(out)]
            command += ["--steps", str(args.steps)]
            plain = {k: v for k, v in os.environ.items() if k != "MKL_DEBUG_CPU_TYPE"}
            environment = plain | SETTINGS["reference"] | variables
            subprocess.run(command, env=environment, check=True)
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
    report = {
        "benchmark": "host_change",
        "reference": "the same training with one thread and MKL's own choice of a code path",
        "steps": args.steps,
        "learning_rate": RATE,
        "largest_difference": found,
        "ratio": {name: round(value / RATE, 4) for name, value in found.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
