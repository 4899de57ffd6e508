"""Accuracy of MiniLM-L6 on SST-2 at each width: cut, reordered, distilled; several seeds.

Reference in the same run: the teacher, and each width cut without reordering.
The teacher is trained on nine tenths of train; the remaining tenth (the hold-out)
chooses its epoch. dev and test are only looked at. Source of the data: SST-2
(Socher et al. 2013), binary sentences as train.tsv, dev.tsv, test.tsv with the
columns `sentence` and `label`; licence as its README says.

A finished teacher and a finished seed are kept as files and not run again. The last
line of standard output is one JSON object: means over seeds and 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import inputs

if TYPE_CHECKING:
    import numpy as np

    from compression.batches import Encoded
    from compression.encoder import Encoder
    from compression.tasks import Task

WIDTHS = ("1", "3/4", "1/2", "1/4")
# What changes the result; other arguments may differ between two runs in one folder.
SETTING_NAMES = (
    "model", "data", "teacher_epochs", "distil_epochs", "lambda_rep", "learning_rate", "max_steps",
)  # fmt: skip


def run_seed(seed: int, args: argparse.Namespace) -> dict[str, object]:
    """All figures of one seed, with the rows that each stage got right."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from compression.batches import Encoded, sorted_rows
    from compression.distillation import distil
    from compression.encoder import build_encoder, with_new_head
    from compression.evaluate import predict
    from compression.importance import measure_importance
    from compression.learning import learning_config
    from compression.reorder import descending, reorder
    from compression.spec import DistillationSpec, TaskSpec
    from compression.supernet import subnetwork_of
    from compression.tables import read_splits
    from compression.tasks import make_task
    from compression.teachers import read_checkpoint
    from compression.tokenization import encode, load_tokenizer
    from compression.training import Step

    task = make_task(TaskSpec(), ("0", "1"))
    checkpoint = read_checkpoint(args.model)
    tokenizer = load_tokenizer(args.model)
    splits = {}
    for name, table in read_splits(args.data / "sst2").items():
        rows = encode(tokenizer, [str(row["sentence"]) for row in table.rows], None, 128)
        labels = np.array([int(row["label"] or "") for row in table.rows])
        splits[name] = Encoded([ids for ids, _ in rows], [types for _, types in rows], labels)
    train, judged = splits["train"], {name: splits[name] for name in ("dev", "test")}

    started = time.perf_counter()
    log(seed, f"{len(train)} rows of train")
    order = np.random.default_rng([seed, 1]).permutation(len(train))
    holdout, learnt = train.take(order[: len(train) // 10]), train.take(order[len(train) // 10 :])
    config, weights = with_new_head(checkpoint.config, checkpoint.tensors, num_labels=2, seed=seed)
    kept = args.out / f"teacher-{seed}.safetensors"
    if not kept.exists():
        best, epochs = train_teacher(
            seed, build_encoder(config, weights), learnt, holdout, task, args
        )
        save_file(best, kept, metadata={"holdout_accuracy_by_epoch": json.dumps(epochs)})
    with safe_open(kept, framework="np") as file:
        epochs = json.loads(file.metadata()["holdout_accuracy_by_epoch"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    teacher = build_encoder(config, weights)
    teacher_seconds = time.perf_counter() - started

    subnetworks = [subnetwork_of(config, Fraction(width)) for width in WIDTHS]
    correct: dict[str, list[int]] = {}

    def judge(stage: str, encoder: object, chosen: object = subnetworks) -> None:
        for subnetwork in chosen:  # type: ignore[attr-defined]
            for split, rows in judged.items():
                right = (
                    predict(encoder, rows, subnetwork=subnetwork, threads=args.threads).argmax(-1)
                    == rows.labels
                )
                key = f"{stage} {subnetwork.width_mult if subnetwork else 'teacher'} {split}"
                correct[key] = right.astype(int).tolist()
                log(seed, f"{key}: {right.mean():.4f}")

    judge("teacher", teacher, [None])
    judge("cut", teacher)

    distillation = DistillationSpec(
        epochs=args.distil_epochs,
        max_steps=args.max_steps,
        lambda_rep=args.lambda_rep,
        learning_rate=args.learning_rate,
    )

    def reordered(rows: Encoded) -> object:
        scores = measure_importance(
            teacher,
            rows,
            sorted_rows(rows, batch_size=32),
            task,
            replicas=args.threads,
        )
        return build_encoder(
            learning_config(config, distillation),
            reorder(
                config,
                weights,
                head_orders=[descending(one) for one in scores.heads],
                neuron_orders=[descending(one) for one in scores.neurons],
            ),
        )

    # The product's default: a seeded sample of train. dev, as the tutorial does, to compare.
    sample = train.take(np.random.default_rng([seed, 2]).permutation(len(train))[:1024])
    supernet = reordered(sample)
    judge("reordered", supernet)
    judge("reordered by dev", reordered(judged["dev"]), subnetworks[-1:])

    seconds: list[float] = []

    def after_distillation(step: Step) -> None:
        seconds.append(step.seconds)
        if step.done % 25 == 0 or step.done == step.total:
            log(seed, f"distillation {step.done}/{step.total}, {np.median(seconds):.2f} s a step")

    trained = distil(
        supernet,  # type: ignore[arg-type]
        teacher,
        train,
        subnetworks,
        distillation,
        task,
        seed=seed,
        on_step=after_distillation,
        replicas=args.threads,
    )
    judge("distilled", supernet)
    return {
        "seed": seed,
        "holdout_accuracy_by_epoch": epochs,
        "best_epoch": int(np.argmax(epochs)) + 1,
        "teacher_seconds": round(teacher_seconds, 1),
        "distillation_steps": trained.steps,
        "step_seconds": float(np.median(seconds)),
        "threads": args.threads,
        "lambda_rep": args.lambda_rep,
        "learning_rate": args.learning_rate,
        "correct": correct,
    }


def train_teacher(
    seed: int,
    teacher: Encoder,
    learnt: Encoded,
    holdout: Encoded,
    task: Task,
    args: argparse.Namespace,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The weights of the epoch that is best on the hold-out, and the accuracy after each."""
    from compression.encoder import numpy_weights
    from compression.evaluate import predict
    from compression.spec import FineTuneSpec
    from compression.training import Step, fine_tune, step_count

    spec = FineTuneSpec(epochs=args.teacher_epochs, max_steps=args.max_steps)
    epoch_steps = max(1, round(step_count(spec, len(learnt)) / args.teacher_epochs))
    epochs: list[float] = []
    best: dict[str, np.ndarray] = {}

    def after_step(step: Step) -> None:
        if step.done % epoch_steps == 0 or step.done == step.total:
            accuracy = task.score(predict(teacher, holdout, threads=args.threads), holdout)
            if accuracy > max(epochs, default=-1.0):
                best.update(numpy_weights(teacher))
            epochs.append(accuracy)
            log(seed, f"teacher step {step.done}/{step.total}, hold-out {accuracy:.4f}")

    fine_tune(teacher, learnt, spec, task, seed=seed, on_step=after_step, replicas=args.threads)
    return best, epochs


def log(seed: int, text: str) -> None:
    print(f"[seed {seed}] {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(results: list[dict[str, object]]) -> dict[str, object]:
    """Means over seeds with 95 % intervals: rows resampled, the same for every stage (paired)."""
    import numpy as np

    generator = np.random.default_rng(0)
    keys = list(results[0]["correct"])  # type: ignore[call-overload]
    rows = {k: np.mean([r["correct"][k] for r in results], axis=0) for k in keys}  # type: ignore[index]
    draws = {
        split: generator.integers(0, n, (2000, n))
        for split, n in (
            ("dev", len(rows["teacher teacher dev"])),
            ("test", len(rows["teacher teacher test"])),
        )
    }
    table = {}
    for key, right in rows.items():
        split = key.rsplit(" ", 1)[1]
        against = right - rows[f"teacher teacher {split}"]
        samples = right[draws[split]].mean(axis=1)
        differences = 100 * against[draws[split]].mean(axis=1)
        table[key] = {
            "accuracy": round(float(right.mean()), 4),
            "interval": [round(float(q), 4) for q in np.quantile(samples, [0.025, 0.975])],
            "points_against_teacher": round(100 * float(against.mean()), 2),
            "points_interval": [
                round(float(q), 2) for q in np.quantile(differences, [0.025, 0.975])
            ],
            "by_seed": [round(float(np.mean(r["correct"][key])), 4) for r in results],  # type: ignore[index]
        }
    return {
        "benchmark": "accuracy",
        "reference": "the teacher; each width cut without reordering",
        "seeds": [r["seed"] for r in results],
        "teacher_holdout_by_epoch": [r["holdout_accuracy_by_epoch"] for r in results],
        "teacher_best_epoch": [r["best_epoch"] for r in results],
        "distillation_steps": results[0]["distillation_steps"],
        "step_seconds": [r["step_seconds"] for r in results],
        "threads": [r["threads"] for r in results],
        "lambda_rep": results[0]["lambda_rep"],
        "learning_rate": results[0]["learning_rate"],
        "ratio": round(
            table["distilled 1/4 test"]["accuracy"] / table["teacher teacher test"]["accuracy"], 4
        ),
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    inputs.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=inputs.ROOT / "build" / "bench-accuracy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--distil-epochs", type=float, default=3)
    parser.add_argument("--lambda-rep", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-steps", type=int, help="cuts both trainings short, to try it out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    inputs.check(args)
    inputs.require_environment("benchmarks.accuracy")
    inputs.keep_settings(args.out, {name: getattr(args, name) for name in SETTING_NAMES})
    results = []
    for seed in args.seeds:
        path = args.out / f"seed-{seed}.json"
        if not path.exists():
            result = run_seed(seed, args)
            inputs.write_whole(path, json.dumps(result))
        results.append(json.loads(path.read_text()))
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
