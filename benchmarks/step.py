"""Seconds of one distillation step, against the same step padded to 64 tokens.

MiniLM-L6 (random classifier), SST-2 rows, batch 32, widths 1, 3/4, 1/2, 1/4, the
environment that the worker chooses. Reference, in the same process and alternating
with ours round by round: the same loop fed with unsorted batches padded to 64 tokens,
as PaddleSlim's tutorial pads. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path

from compression.runtime_env import cpu_vendor, training_environment

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = ("1", "3/4", "1/2", "1/4")
PADDED = 64
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "demo" / "model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    for path, what in ((args.data / "sst2", "SST-2 (train.tsv)"), (args.model, "model")):
        if not path.is_dir():
            sys.exit(f"{path} is not there: name the folder of the {what}")
    # Before the first import of paddle.
    os.environ.update(
        training_environment(cpu_count=len(os.sched_getaffinity(0)), vendor=cpu_vendor())
    )

    import numpy as np
    import paddle

    from compression.batches import Batch, Encoded, epoch_order, make_batch
    from compression.distillation import distillation_loss
    from compression.encoder import build_encoder, with_new_head
    from compression.spec import DistillationSpec, TaskSpec
    from compression.supernet import subnetwork_of
    from compression.tables import read_splits
    from compression.tasks import make_task
    from compression.teachers import read_checkpoint
    from compression.tokenization import encode, load_tokenizer
    from compression.training import Optimizer

    checkpoint = read_checkpoint(args.model)
    config, weights = with_new_head(checkpoint.config, checkpoint.tensors, num_labels=2, seed=0)
    table = read_splits(args.data / "sst2")["train"]
    texts = [str(row["sentence"]) for row in table.rows]
    rows = encode(load_tokenizer(args.model), texts, None, PADDED)
    data = Encoded(
        [ids for ids, _ in rows],
        [types for _, types in rows],
        np.array([int(row["label"] or "") for row in table.rows]),
    )
    lengths = np.array([len(ids) for ids in data.input_ids])
    generator = np.random.default_rng(0)
    bucketed = epoch_order(lengths, batch_size=BATCH, generator=generator)[: args.rounds + 1]
    random = generator.permutation(len(data))[: (args.rounds + 1) * BATCH].reshape(-1, BATCH)

    def padded(numbers: np.ndarray) -> Batch:
        return make_batch(data, numbers, pad_id=config.pad_token_id, length=PADDED)

    teacher, supernet = build_encoder(config, weights), build_encoder(config, weights)
    spec = DistillationSpec()
    optimizer = Optimizer(supernet, spec, steps=1000)
    subnetworks = [subnetwork_of(config, Fraction(width)) for width in WIDTHS]
    task = make_task(TaskSpec(), ("0", "1"))

    def step(batch: Batch) -> float:
        started = time.perf_counter()
        with paddle.no_grad():
            targets = teacher.encode(*batch.inputs)
        for subnetwork in subnetworks:
            states = supernet.encode(*batch.inputs, subnetwork=subnetwork)
            distillation_loss(states, targets, batch, spec, task).backward()
        optimizer.step()
        return time.perf_counter() - started

    ours, reference = [], []
    for number in range(args.rounds + 1):  # the first round warms up
        ours.append(step(make_batch(data, bucketed[number], pad_id=config.pad_token_id)))
        reference.append(step(padded(random[number])))
        print(f"round {number}: {ours[-1]:.2f} s, padded {reference[-1]:.2f} s", file=sys.stderr)
    step_s, reference_s = statistics.median(ours[1:]), statistics.median(reference[1:])
    print(
        json.dumps(
            {
                "benchmark": "step",
                "reference": "the same loop, unsorted, padded to 64 tokens",
                "ratio": round(reference_s / step_s, 2),
                "step_s": round(step_s, 3),
                "reference_step_s": round(reference_s, 3),
                "rounds": args.rounds,
                "threads": int(os.environ["OMP_NUM_THREADS"]),
            }
        )
    )


if __name__ == "__main__":
    main()
