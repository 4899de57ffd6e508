"""Other tasks than SST-2: what half and a quarter of MiniLM-L6 keep on banking77 and wnut17.

One compression job a task and seed, as the library runs it: MiniLM-L6 gets a new head, is
fine-tuned on train until a tenth of it stops gaining, and is distilled at every width. Reference
in the same run: that teacher. Figures are accuracy (banking77, 77 intents) and entity F1 (wnut17,
six kinds of entities) on test, in fp32, means over seeds; nothing is chosen by it. banking77 has
no dev: a stratified tenth of its train becomes dev.

Finished jobs are kept in `--work-dir` and not run again, and one that was stopped goes on from its
checkpoint. Sources of the data: banking77 (Casanueva et al. 2020, CC BY 4.0), WNUT-2017 (Derczynski
et al. 2017, CC BY 4.0), as train, dev and test tables under `--data`. The last line of standard
output is one JSON object; `points_lost` is 100 * (teacher - width).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import inputs

if TYPE_CHECKING:
    from compression.spec import Spec

TASKS: dict[str, dict[str, Any]] = {
    "banking77": {"kind": "classification", "text": "text", "label": "category"},
    "wnut17": {"kind": "token_classification", "text": "tokens", "label": "ner_tags"},
}
WEIGHTS = "safetensors"


def spec_of(name: str, seed: int, args: argparse.Namespace) -> Spec:
    from compression.spec import Spec

    return Spec.model_validate(
        {
            "seed": seed,
            "task": {**TASKS[name], "max_seq_len": 128},
            "teacher": {
                "when": "always",
                "epochs": args.teacher_epochs,
                "patience": 2,
                "max_steps": args.max_steps,
            },
            "supernet": {"width_mults": args.widths},
            "distillation": {
                "epochs": args.distil_epochs,
                "max_steps": args.max_steps,
                "lambda_rep": args.lambda_rep,
                "learning_rate": args.learning_rate,
            },
            "export": {"formats": ["onnx", WEIGHTS]},
            "latency": {"baselines": []},
        }
    )


def scores(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """The main metric on test of the teacher and of each width, by name."""
    from compression.encoder import build_encoder
    from compression.evaluate import predict
    from compression.job import load
    from compression.pipeline import compress
    from compression.report import CompressionReport
    from compression.teachers import read_checkpoint

    folder, spec = args.work_dir / name / f"seed-{seed}", spec_of(name, seed, args)
    data, kept = args.data / name, folder / "report.json"
    if not kept.exists():
        said: dict[str, int] = {}

        def on_progress(progress: Any) -> None:
            tenth = 10 * progress.step // max(progress.total, 1)
            if said.get(progress.stage) != tenth:
                said[progress.stage] = tenth
                log(f"{name}, seed {seed}: {progress.stage} {progress.step}/{progress.total}")

        compress(spec, args.model, data, folder, on_progress, checkpoint_seconds=60.0)
    report = CompressionReport.model_validate_json(kept.read_text())
    if report.spec != spec:
        sys.exit(f"{kept} is of another spec: move {folder} away, or name another work-dir")
    job = load(spec, args.model, data, None)
    test, found = job.splits["test"], {"teacher": report.teacher.test_accuracy or 0.0}
    for subnetwork in report.subnetworks:
        extracted = read_checkpoint(folder / "artifacts" / subnetwork.name / WEIGHTS)
        network = build_encoder(extracted.config, extracted.tensors)
        found[subnetwork.name] = job.task.score(predict(network, test, threads=job.replicas), test)
    return found


def summary(found: list[dict[str, float]], name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One task: means over seeds, and the points that each width loses."""
    mean = {key: statistics.mean(each[key] for each in found) for key in found[0]}
    return {
        "metric": spec_of(name, 0, args).task.main_metric,
        "test": {key: round(value, 4) for key, value in mean.items()},
        "points_lost": {
            key: round(100 * (mean["teacher"] - value), 2)
            for key, value in mean.items()
            if key != "teacher"
        },
        "test_by_seed": [{key: round(value, 4) for key, value in each.items()} for each in found],
    }


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs.add_arguments(parser)
    parser.add_argument("--work-dir", type=Path, default=inputs.ROOT / "build" / "bench-tasks")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--widths", nargs="+", default=["1", "1/2", "1/4"])
    parser.add_argument("--teacher-epochs", type=float, default=10)
    parser.add_argument("--distil-epochs", type=float, default=3)
    parser.add_argument("--lambda-rep", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-steps", type=int, help="cuts both trainings short, to try it out")
    args = parser.parse_args()
    for name in args.tasks:
        if not (args.data / name).is_dir():
            sys.exit(f"{args.data / name} is not there: name the folder of the tables of {name}")
    if not args.model.is_dir():
        sys.exit(f"{args.model} is not there: name the folder of MiniLM-L6 (`make demo`)")
    inputs.require_environment("benchmarks.tasks")
    # The specs of finished jobs tell all else that changes a result.
    inputs.keep_settings(args.work_dir, {"model": args.model, "data": args.data})
    started = time.monotonic()
    tasks = {
        name: summary([scores(name, seed, args) for seed in args.seeds], name, args)
        for name in args.tasks
    }
    result = {
        "benchmark": "tasks",
        "reference": "the teacher, MiniLM-L6 fine-tuned on each task",
        "seeds": args.seeds,
        "tasks": tasks,
        "wall_s": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
