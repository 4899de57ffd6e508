"""Seconds of one importance pass against one epoch of plain training on the same rows.

MiniLM-L6 with a random head, SST-2 rows, batch 32. Reference, in the same process and in
turns with ours: an epoch of `fine_tune` (width 1, labels, optimizer included). Wanted: a ratio
of at most 1.5. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

from benchmarks import inputs
from compression.runtime_env import core_count, replica_count

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    inputs.add_arguments(parser)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    inputs.check(args)
    inputs.require_environment("benchmarks.importance")

    import numpy as np

    from compression.batches import sorted_rows
    from compression.encoder import build_encoder
    from compression.importance import measure_importance
    from compression.spec import FineTuneSpec, TaskSpec
    from compression.tasks import make_task
    from compression.training import fine_tune

    config, weights = inputs.read_model(args.model, seed=0)
    train = inputs.read_rows(args.model, args.data, max_seq_len=64)["train"]
    rows = train.take(np.random.default_rng(0).permutation(len(train))[: args.rows])
    task = make_task(TaskSpec(), ("0", "1"))
    replicas = replica_count(os.environ, cores=core_count())
    encoder = build_encoder(config, weights)

    def importance() -> None:
        batches = sorted_rows(rows, batch_size=BATCH)
        measure_importance(encoder, rows, batches, task, replicas=replicas)

    def epoch() -> None:
        fine_tune(
            encoder,
            rows,
            FineTuneSpec(epochs=1, batch_size=BATCH),
            task,
            seed=0,
            on_step=lambda step: None,
            replicas=replicas,
        )

    seconds: dict[str, list[float]] = {"importance": [], "epoch": []}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, work in (("importance", importance), ("epoch", epoch)):
            started = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {number}", file=sys.stderr)
    own, reference = (statistics.median(seconds[name]) for name in ("importance", "epoch"))
    print(
        json.dumps(
            {
                "benchmark": "importance",
                "reference": "one epoch of plain training on the same rows",
                "ratio": round(own / reference, 2),
                "importance_s": round(own, 2),
                "epoch_s": round(reference, 2),
                "rows": len(rows),
                "replicas": replicas,
            }
        )
    )


if __name__ == "__main__":
    main()
