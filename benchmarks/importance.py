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
from pathlib import Path

from compression.runtime_env import core_count, cpu_vendor, replica_count, training_environment

ROOT = Path(__file__).resolve().parent.parent
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "demo" / "model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for path, what in ((args.data / "sst2", "SST-2 (train.tsv)"), (args.model, "model")):
        if not path.is_dir():
            sys.exit(f"{path} is not there: name the folder of the {what}")
    environment = training_environment(cpu_count=core_count(), vendor=cpu_vendor())
    if any(os.environ.get(name) != value for name, value in environment.items()):
        # glibc reads its variables when a process starts.
        os.execve(
            sys.executable,
            [sys.executable, "-m", *module_arguments()],
            {**os.environ, **environment},
        )

    import numpy as np

    from benchmarks import inputs
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


def module_arguments() -> list[str]:
    return ["benchmarks.importance", *sys.argv[1:]]


if __name__ == "__main__":
    main()
