"""Which layers a shallow network should keep: DynaBERT's choice, or the one with the last layer.

MiniLM-L6 on SST-2. Once a seed: a teacher is fine-tuned, scored, reordered and distilled at full
depth (widths 1, 3/4, 1/2, 1/4). From that one supernet the depth stage is then trained twice, on
the same batches with the same draws of the sandwich rule: "first" keeps the layers floor(i / d),
"last" floor((i + 1) / d) - 1. Both learn the same states of the frozen supernet. In the table
also the reference: each choice cut from the width stage without a depth stage ("... cut").

What is finished in --work-dir is not run again, and a training that was killed goes on from its
last checkpoint. The last line of standard output is one JSON object; `points_ahead` is
100 * (last - first), as a mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import inputs
from compression.runtime_env import core_count, replica_count

if TYPE_CHECKING:
    import numpy as np

    from compression.encoder import Encoder
    from compression.report import TrainingReport
    from compression.training import Surroundings

WIDTHS = ("1", "3/4", "1/2", "1/4")
CHOICES = ("first", "last")
JUDGED = ("dev", "test")
CHECKPOINT_SECONDS = 120.0
IMPORTANCE_ROWS = 1024
# What changes the result; other arguments may differ between two runs in one folder.
SETTING_NAMES = (
    "depths", "teacher_epochs", "distil_epochs", "depth_epochs", "learning_rate",
    "depth_learning_rate", "lambda_rep", "depth_lambda_rep", "max_steps",
)  # fmt: skip


class Seed:
    """One seed's data, and its trainings, each kept as a file of weights."""

    def __init__(self, seed: int, args: argparse.Namespace) -> None:
        from compression.spec import TaskSpec
        from compression.tasks import make_task

        self.seed, self.args = seed, args
        self.folder = args.work_dir / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.replicas = replica_count(os.environ, cores=core_count())
        self.task = make_task(TaskSpec(), ("0", "1"))
        self.config, self.weights = inputs.read_model(args.model, seed=seed)
        self.splits = inputs.read_rows(args.model, args.data, max_seq_len=64)

    def trained(
        self,
        name: str,
        stage: str,
        encoder: Encoder,
        train: Callable[[Surroundings], TrainingReport],
    ) -> float:
        """Trains the encoder in place, or loads what that came to; the seconds of a step."""
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        from compression.checkpoint import Checkpoints, host_facts
        from compression.encoder import load_weights, numpy_weights
        from compression.training import Surroundings

        kept = self.folder / f"{name}.safetensors"
        if not kept.exists():
            folder = self.folder / f"{name}-checkpoints"
            checkpoints = Checkpoints(
                folder,
                identity={"settings": (self.args.work_dir / inputs.SETTINGS).read_text()},
                host=host_facts(os.environ, replicas=self.replicas),
                every_seconds=CHECKPOINT_SECONDS,
            )
            report = train(Surroundings(stage, stage, checkpoints))
            partial = kept.with_suffix(".partial")
            save_file(
                numpy_weights(encoder), partial, metadata={"step_s": str(report.step_seconds)}
            )
            os.replace(partial, kept)
            shutil.rmtree(folder)
        load_weights(encoder, load_file(kept))
        with safe_open(kept, framework="np") as file:
            return float(file.metadata()["step_s"])

    def on_step(self, name: str) -> Callable[[Any], None]:
        def told(step: Any) -> None:
            if step.done % 25 == 0 or step.done in (1, step.total):
                self.log(f"{name} {step.done}/{step.total}, {step.seconds:.2f} s: {step.losses}")

        return told

    def log(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        print(f"[seed {self.seed}] {stamp} {text}", file=sys.stderr, flush=True)


def width_stage(seed: Seed) -> tuple[Encoder, Encoder]:
    """The teacher, and the supernet that was distilled from it at every width."""
    import numpy as np

    from compression.batches import sorted_rows
    from compression.distillation import distil
    from compression.encoder import build_encoder, numpy_weights
    from compression.importance import measure_importance
    from compression.learning import learning_config
    from compression.reorder import descending, reorder
    from compression.spec import DistillationSpec, FineTuneSpec
    from compression.supernet import subnetwork_of
    from compression.training import fine_tune

    args, config, train = seed.args, seed.config, seed.splits["train"]
    common = {"seed": seed.seed, "replicas": seed.replicas}
    teacher = build_encoder(config, seed.weights)
    tuning = FineTuneSpec(epochs=args.teacher_epochs, max_steps=args.max_steps)
    seed.trained(
        "teacher",
        "teacher",
        teacher,
        lambda around: fine_tune(
            teacher, train, tuning, seed.task, around, on_step=seed.on_step("teacher"), **common
        ),
    )
    distillation = DistillationSpec(
        epochs=args.distil_epochs,
        max_steps=args.max_steps,
        lambda_rep=args.lambda_rep,
        learning_rate=args.learning_rate,
    )
    supernet = build_encoder(learning_config(config, distillation), numpy_weights(teacher))

    def learn(around: Surroundings) -> TrainingReport:
        order = np.random.default_rng([seed.seed, 2]).permutation(len(train))
        sample = train.take(order[:IMPORTANCE_ROWS])
        scores = measure_importance(
            teacher,
            sample,
            sorted_rows(sample, batch_size=32),
            seed.task,
            replicas=seed.replicas,
        )
        ordered = reorder(
            config,
            numpy_weights(teacher),
            head_orders=[descending(each) for each in scores.heads],
            neuron_orders=[descending(each) for each in scores.neurons],
        )
        for name, parameter in supernet.state_dict().items():
            parameter.set_value(ordered[name])
        return distil(
            supernet,
            teacher,
            train,
            [subnetwork_of(config, Fraction(width)) for width in WIDTHS],
            distillation,
            seed.task,
            around,
            on_step=seed.on_step("width stage"),
            **common,
        )

    seed.trained("width-stage", "distil", supernet, learn)
    return teacher, supernet


def run_seed(number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Which rows each network gets right, by "<stage> <sub-network> <split>", as 0 and 1."""
    from compression.distillation import distil_depth
    from compression.encoder import build_encoder, numpy_weights
    from compression.evaluate import predict
    from compression.sampling import Sandwich
    from compression.spec import DepthSpec
    from compression.supernet import Subnetwork, subnetwork_of

    seed = Seed(number, args)
    teacher, frozen = width_stage(seed)
    correct: dict[str, list[int]] = {}

    def judge(stage: str, encoder: Encoder, networks: list[Subnetwork | None]) -> None:
        for network in networks:
            for split in JUDGED:
                rows = seed.splits[split]
                logits = predict(encoder, rows, subnetwork=network, threads=seed.replicas)
                right: np.ndarray = logits.argmax(-1) == rows.labels  # type: ignore[union-attr]
                key = f"{stage} {network.name if network else 'teacher'} {split}"
                correct[key] = right.astype(int).tolist()
                seed.log(f"{key}: {right.mean():.4f}")

    judge("teacher", teacher, [None])
    spec = DepthSpec(
        epochs=args.depth_epochs,
        max_steps=args.max_steps,
        learning_rate=args.depth_learning_rate,
        lambda_rep=args.depth_lambda_rep,
    )
    seconds = {}
    for choice in CHOICES:
        networks = [
            subnetwork_of(seed.config, Fraction(width), Fraction(depth), keep_last=choice == "last")
            for width in WIDTHS
            for depth in ("1", *args.depths)
        ]
        judge(f"{choice} cut", frozen, [each for each in networks if each.depth_mult != 1])
        supernet = build_encoder(frozen.config, numpy_weights(frozen))
        seconds[choice] = seed.trained(
            f"depth-{choice}",
            "depth",
            supernet,
            lambda around, supernet=supernet, networks=networks, choice=choice: distil_depth(
                supernet,
                frozen,
                seed.splits["train"],
                Sandwich(networks, seed.seed),
                spec,
                seed.task,
                around,
                seed=seed.seed,
                replicas=seed.replicas,
                on_step=seed.on_step(f"depth stage, {choice}"),
            ),
        )
        judge(choice, supernet, list(networks))
    return {"seed": number, "step_s": seconds, "correct": correct}


def summary(results: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Means over seeds; the choices' difference with its interval, rows resampled (paired)."""
    import numpy as np

    generator = np.random.default_rng(0)
    rows = {
        key: np.mean([result["correct"][key] for result in results], axis=0)
        for key in results[0]["correct"]
    }
    draws = {
        split: generator.integers(0, count, (2000, count))
        for split in JUDGED
        for count in [len(rows[f"teacher teacher {split}"])]
    }
    table, ahead_of_all = {}, {split: [] for split in JUDGED}
    for key in rows:
        stage, _, rest = key.partition(" ")
        if stage != "first" or rest.startswith("cut"):
            continue
        split = rest.rsplit(" ", 1)[1]
        cut = {
            f"{choice} cut": round(float(rows[name].mean()), 4)
            for choice in CHOICES
            if (name := f"{choice} cut {rest}") in rows
        }
        difference = 100 * (rows[f"last {rest}"] - rows[f"first {rest}"])
        low, high = np.quantile(difference[draws[split]].mean(axis=1), [0.025, 0.975])
        table[rest] = {
            **{choice: round(float(rows[f"{choice} {rest}"].mean()), 4) for choice in CHOICES},
            **cut,
            "points_ahead": round(float(difference.mean()), 2),
            "points_ahead_interval": [round(float(low), 2), round(float(high), 2)],
            "points_ahead_by_seed": [
                round(
                    100
                    * (
                        statistics.mean(result["correct"][f"last {rest}"])
                        - statistics.mean(result["correct"][f"first {rest}"])
                    ),
                    2,
                )
                for result in results
            ],
        }
        if "-d" in rest:
            ahead_of_all[split].append(difference)
    overall = {}
    for split, differences in ahead_of_all.items():
        mean = np.mean(differences, axis=0)
        low, high = np.quantile(mean[draws[split]].mean(axis=1), [0.025, 0.975])
        overall[split] = {
            "points_ahead": round(float(mean.mean()), 2),
            "interval": [round(float(low), 2), round(float(high), 2)],
        }
    return {
        "benchmark": "depth",
        "reference": "first: layers floor(i / d), DynaBERT's; last: floor((i + 1) / d) - 1",
        "seeds": args.seeds,
        "settings": settings(args),
        "teacher": {
            split: round(float(rows[f"teacher teacher {split}"].mean()), 4) for split in JUDGED
        },
        "step_s": [result["step_s"] for result in results],
        "last_ahead_of_first": overall,
        "table": table,
    }


def printed(found: dict[str, Any]) -> str:
    """The table as text: a line for each shallow network and split, and full depth after both."""
    lines = [
        f"{'sub-network':>14} {'split':>5} {'first cut':>9} {'last cut':>9} {'first':>7} "
        f"{'last':>7} {'points ahead':>12} {'95 %':>16}"
    ]
    for key, row in found["table"].items():
        name, split = key.rsplit(" ", 1)
        cuts = [f"{row[cut]:.4f}" if (cut := f"{c} cut") in row else "" for c in CHOICES]
        low, high = row["points_ahead_interval"]
        lines.append(
            f"{name:>14} {split:>5} {cuts[0]:>9} {cuts[1]:>9} {row['first']:>7.4f} "
            f"{row['last']:>7.4f} {row['points_ahead']:>+12.2f} {f'{low:+.2f} to {high:+.2f}':>16}"
        )
    for split, row in found["last_ahead_of_first"].items():
        low, high = row["interval"]
        lines.append(
            f"mean of the shallow ones on {split}: the choice with the last layer is ahead by "
            f"{row['points_ahead']:+.2f} points ({low:+.2f} to {high:+.2f}); the teacher has "
            f"{found['teacher'][split]:.4f}"
        )
    return "\n".join(lines)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTING_NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs.add_arguments(parser)
    parser.add_argument("--work-dir", type=Path, default=inputs.ROOT / "build" / "bench-depth")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--depths", nargs="+", default=["2/3", "1/2", "1/3"])
    parser.add_argument("--teacher-epochs", type=float, default=3)
    parser.add_argument("--distil-epochs", type=float, default=2)
    parser.add_argument("--depth-epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the width stage")
    parser.add_argument("--lambda-rep", type=float, default=1.0, help="of the width stage")
    parser.add_argument("--depth-learning-rate", type=float, default=1e-4)
    parser.add_argument("--depth-lambda-rep", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, help="cuts all trainings short, to try it out")
    args = parser.parse_args()
    inputs.check(args)
    inputs.require_environment("benchmarks.depth")
    inputs.keep_settings(args.work_dir, {**settings(args), "model": args.model, "data": args.data})
    results = []
    for seed in args.seeds:
        path = args.work_dir / f"seed-{seed}.json"
        if not path.exists():
            result = run_seed(seed, args)
            inputs.write_whole(path, json.dumps(result))
        results.append(json.loads(path.read_text()))
    found = summary(results, args)
    print(printed(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
