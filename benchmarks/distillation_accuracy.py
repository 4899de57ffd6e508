"""Accuracy at each width: ours against PaddleSlim's recipe after the same examples, several seeds.

MiniLM-L6 fine-tuned on SST-2 is the teacher of both, once a seed. Both score importance on the
same sample of train, reorder, and distil `--steps` batches of 32 of the same rows of train, once
each, at the same peak rate and loss weights, widths 1, 3/4, 1/2, 1/4: ours in this process, as
the engine widthwise does; the reference in a process of its own, as the engine paddleslim does,
with the model's own dropout as its tutorial has it. Both results are judged by our `predict` on
dev and test.

Every part (teacher, ours, reference of each seed) is kept as a file and not run again. The last
line of standard output is one JSON object; `points_ahead` is 100 * (ours - reference).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import inputs
from compression.runtime_env import core_count, replica_count

BATCH = 32
IMPORTANCE_ROWS = 1024
JUDGED = ("dev", "test")
SIDES = ("ours", "reference")


def compare(seed: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{"ours", "reference"} -> accuracy by "width split" and a step's seconds."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from compression.batches import sorted_rows
    from compression.distillation import distil
    from compression.encoder import build_encoder, numpy_weights
    from compression.evaluate import predict
    from compression.importance import measure_importance
    from compression.learning import learning_config
    from compression.reference import run as reference
    from compression.reference.exchange import Orders, Request
    from compression.reorder import descending, reorder
    from compression.spec import FineTuneSpec, Spec, TaskSpec
    from compression.supernet import subnetwork_of
    from compression.tasks import make_task
    from compression.training import fine_tune

    task = make_task(TaskSpec(), ("0", "1"))
    replicas = replica_count(os.environ, cores=core_count())
    config, weights = inputs.read_model(args.model, seed=seed)
    splits = inputs.read_rows(args.model, args.data, max_seq_len=64)
    train = splits["train"]

    kept = args.out / f"seed-{seed}-teacher.safetensors"
    if not kept.exists():
        learner = build_encoder(config, weights)
        fine_tune(
            learner,
            train,
            FineTuneSpec(epochs=args.teacher_epochs, max_steps=args.teacher_steps),
            task,
            seed=seed,
            on_step=lambda step: log(seed, f"teacher {step.done}/{step.total}: {step.losses}"),
            replicas=replicas,
        )
        save_file(numpy_weights(learner), args.out / "unfinished.safetensors")
        os.replace(args.out / "unfinished.safetensors", kept)
    weights = load_file(kept)
    teacher = build_encoder(config, weights)

    spec = Spec.model_validate(
        {"seed": seed, "engine": "paddleslim", "distillation": {"epochs": 1, "batch_size": BATCH}}
    )
    subnetworks = [subnetwork_of(config, width) for width in spec.supernet.width_mults]
    order = np.random.default_rng([seed, 1]).permutation(len(train))
    rows = train.take(order[: args.steps * BATCH])
    sample = train.take(order[-IMPORTANCE_ROWS:])
    seconds: list[float] = []

    def on_step(step: Any) -> None:
        seconds.append(step.seconds)
        log(seed, f"step {step.done}/{step.total}, {step.seconds:.2f} s: {step.losses}")

    def ours() -> dict[str, np.ndarray]:
        scores = measure_importance(
            teacher,
            sample,
            sorted_rows(sample, batch_size=BATCH),
            task,
            replicas=replicas,
        )
        supernet = build_encoder(
            learning_config(config, spec.distillation),
            reorder(
                config,
                weights,
                head_orders=[descending(each) for each in scores.heads],
                neuron_orders=[descending(each) for each in scores.neurons],
            ),
        )
        distil(
            supernet,
            teacher,
            rows,
            subnetworks,
            spec.distillation,
            task,
            seed=seed,
            on_step=on_step,
            replicas=replicas,
        )
        return numpy_weights(supernet)

    def theirs() -> dict[str, np.ndarray]:
        own_dropout = spec.distillation.model_copy(update={"dropout": None})
        as_shipped = spec.model_copy(update={"distillation": own_dropout})
        work = args.out / f"seed-{seed}-work"
        scores = reference.measure_importance(
            work,
            Request(as_shipped, config, weights, sample),
            on_batch=lambda done: None,
            replicas=replicas,
        )
        orders = Orders(
            *([descending(row) for row in each] for each in (scores.heads, scores.neurons))
        )
        learnt, _ = reference.distil(
            work,
            Request(as_shipped, config, weights, rows, orders),
            on_step=on_step,
            replicas=replicas,
        )
        return learnt

    learn: dict[str, Callable[[], dict[str, np.ndarray]]] = {"ours": ours, "reference": theirs}
    results = {}
    for name in SIDES:
        path = args.out / f"seed-{seed}-{name}.json"
        if not path.exists():
            seconds.clear()
            trained = build_encoder(config, learn[name]())
            accuracy = {
                f"{each.width_mult} {split}": task.score(
                    predict(trained, splits[split], subnetwork=each), splits[split]
                )
                for each in subnetworks
                for split in JUDGED
            }
            accuracy |= {
                f"teacher {split}": task.score(predict(teacher, splits[split]), splits[split])
                for split in JUDGED
            }
            result = {
                "steps": args.steps,
                "accuracy": accuracy,
                "step_s": statistics.median(seconds),
            }
            path.write_text(json.dumps(result))
        results[name] = json.loads(path.read_text())
        if results[name]["steps"] != args.steps:
            sys.exit(f"{path} holds {results[name]['steps']} steps, not {args.steps}: move it away")
    return results


def log(seed: int, text: str) -> None:
    print(f"[seed {seed}] {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(results: list[dict[str, dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    """Means over seeds, and each seed's difference."""
    table = {}
    for key in results[0]["ours"]["accuracy"]:
        found = {side: [r[side]["accuracy"][key] for r in results] for side in SIDES}
        ahead = [100 * (own - other) for own, other in zip(*found.values(), strict=True)]
        table[key] = {
            **{side: round(statistics.mean(found[side]), 4) for side in SIDES},
            "points_ahead": round(statistics.mean(ahead), 2),
            "points_ahead_by_seed": [round(each, 2) for each in ahead],
        }
    widths = {key: row for key, row in table.items() if not key.startswith("teacher")}
    return {
        "benchmark": "distillation_accuracy",
        "reference": "PaddleSlim's recipe (engine paddleslim), the model's own dropout",
        "seeds": args.seeds,
        "steps": args.steps,
        "worst_points_ahead": {
            split: min(row["points_ahead"] for key, row in widths.items() if key.endswith(split))
            for split in JUDGED
        },
        "step_s": [r["ours"]["step_s"] for r in results],
        "reference_step_s": [r["reference"]["step_s"] for r in results],
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs.add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=inputs.ROOT / "build" / "bench-distillation-accuracy"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--teacher-epochs", type=float, default=3)
    parser.add_argument("--teacher-steps", type=int, help="cuts the fine-tuning short")
    args = parser.parse_args()
    inputs.check(args)
    inputs.require_environment("benchmarks.distillation_accuracy")
    args.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(summary([compare(seed, args) for seed in args.seeds], args)))


if __name__ == "__main__":
    main()
