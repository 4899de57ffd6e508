"""The fastest artifact that loses at most a point, and the front: MiniLM-L6 on SST-2, one command.

A seed is a teacher, which learns nine tenths of train (the rest, the hold-out, chooses its epoch),
and then one compression job on all of train, as the library runs it: uniform widths at every depth,
each in fp32 and in int8, judged on dev and measured beside the teacher at batch 1 and 16, 64
tokens, one and two threads. Those of `--refined` are distilled alone at the end. The job of a seed
of `--per-layer-seeds` (the first alone, unless told) also teaches its supernet a width for each
layer, searches for such sub-networks within a budget and refines what it finds. For that its
supernet is trained slightly differently (512 rows of train are held out, and one of a step's two
draws is a width for each layer), so means over seeds mix both.

The artifact is the one of a uniform width whose drop on dev is at most `--max-drop` points as a
mean over seeds and whose latency (batch 1, one thread, as a share of the teacher's in the same
measurement) is the smallest; only it is judged on test. Networks of the search are of one seed,
so they stand on the front and are not chosen.

References in the same run: the teacher in ONNX Runtime in fp32 and in its dynamic int8, which is
what one would do instead of compressing. `speedup_*` are ratios of medians, the first seed's
teacher (those of other seeds have the same shapes) over the file of each seed, as means over seeds;
all are timed in turns in one last measurement. `_ci`: that mean's 95 % bootstrap interval, rounds
resampled, the same for all files; it knows the noise of these rounds alone. `_b16`: batch 16, two
threads. `p50_ms`: of both teachers and, as a mean over seeds, of the chosen one. `accuracy_drop`,
`accuracy_drop_test`: points against the teacher, dev and test, means over seeds; `drop_ci_high`:
the upper end of dev's 95 % bootstrap interval, rows resampled, the same for both. `size_ratio`:
bytes of the file over the fp32 teacher's. `latency_model_*_error`: |predicted / measured - 1| over
sub-networks that the search's latency model was not fitted to, largest over seeds. `per_layer`: the
gain on dev over the best uniform sub-network of the same job under the same budget, by seed.
`reselection_ms`: from a finished job's report as text to the answer under other constraints,
median.

Finished parts are kept in `--work-dir` and not run again, and a job goes on from its checkpoint.
More seeds may follow there; another model, other data or another training is refused. A table of
all candidates is `front.md` there, and a plot `front.svg`. Source of the data: SST-2 (Socher et al.
2013), as benchmarks/inputs.py says. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import inputs

if TYPE_CHECKING:
    import numpy as np

    from compression.batches import Encoded
    from compression.report import CompressionReport, LatencyReport
    from compression.spec import Format, Spec

SEQ_LEN = 64
ALONE, BATCHED = (1, 1), (16, 2)  # (rows of a call, threads)
FP32: Format = "onnx"
INT8: Format = "onnx-int8-dynamic"
LABELS = ("0", "1")
JOB = "job"  # its folder in a seed's
FINALISTS = 1
TEACHER_CACHE_MB = 4000
RESELECTIONS = 20
RESAMPLES = 2000
CALIBRATION_ROWS = 128
CHOSEN = (  # figures of the chosen artifact: null where none loses so little
    *("accuracy_drop", "accuracy_drop_test", "drop_ci_high", "size_ratio"),
    *("speedup_vs_ort_fp32", "speedup_vs_ort_int8"),
    *("speedup_vs_ort_fp32_b16", "speedup_vs_ort_int8_b16"),
)
TEACHER = "teacher"
EPOCHS = "holdout_accuracy_by_epoch.json"  # in its folder
# What changes a teacher, or what a job reads, and no job's spec tells (threads: rounding alone).
SETTING_NAMES = ("model", "data", "teacher_epochs", "max_steps")


def spec_of(seed: int, args: argparse.Namespace) -> Spec:
    """A seed's job."""
    from compression import spec

    values: dict[str, Any] = {
        "seed": seed,
        "task": {
            "text": "sentence",
            "label": "label",
            "labels": LABELS,
            "max_seq_len": SEQ_LEN,
        },
        "teacher": {"when": "never"},
        "supernet": {"width_mults": args.widths, "depth_mults": args.depths},
        "distillation": {
            "epochs": args.distil_epochs,
            "max_steps": args.max_steps,
            "lambda_rep": args.lambda_rep,
            "learning_rate": args.learning_rate,
            "teacher_cache_mb": TEACHER_CACHE_MB,
        },
        "depth": {
            "epochs": args.depth_epochs,
            "max_steps": args.max_steps,
            "learning_rate": args.depth_learning_rate,
        },
        "refinement": {
            "subnetworks": list(args.refined),
            "epochs": args.refine_epochs,
            "max_steps": args.max_steps,
            "learning_rate": args.learning_rate,
        },
        "constraints": {"max_accuracy_drop": args.max_drop, "objective": "latency"},
        "export": {"formats": [FP32, INT8]},
        "latency": {
            "batch_size": ALONE[0],
            "threads": ALONE[1],
            "batch_sizes": [BATCHED[0]],
            "thread_counts": [BATCHED[1]],
            "seq_len": SEQ_LEN,
            "rounds": args.rounds,
            "baselines": [INT8],
        },
    }
    if seed in args.per_layer_seeds:
        values["refinement"]["subnetworks"].append(spec.FINALISTS)
        values["supernet"]["per_layer"] = {
            "finalists": FINALISTS,
            "latency_samples": args.latency_samples,
            "generations": args.generations,
        }
        values["constraints"] |= {"min_speedup": args.per_layer_speedup}
    return spec.Spec.model_validate(values)


def run_job(seed: int, args: argparse.Namespace) -> CompressionReport:
    """The job's report; the seed's teacher, files and checkpoints stay in its folder."""
    from compression.pipeline import compress
    from compression.report import CompressionReport

    folder, spec = args.work_dir / f"seed-{seed}", spec_of(seed, args)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / JOB / "report.json"
    if not kept.exists():
        log(seed, "teacher")
        model = teacher_folder(seed, folder, args)
        said: dict[str, int] = {}

        def on_progress(progress: Any) -> None:
            tenth = 10 * progress.step // max(progress.total, 1)
            if said.get(progress.stage) != tenth:
                said[progress.stage] = tenth
                done = f"{progress.step}/{progress.total}"
                log(seed, f"{progress.stage} {done} {progress.message}")

        data, out = args.data / "sst2", folder / JOB
        compress(spec, model, data, out, on_progress, checkpoint_seconds=60.0)
    report = CompressionReport.model_validate_json(kept.read_text())
    if report.spec != spec:
        sys.exit(f"{kept} is of another spec: move {kept.parent} away, or name another work-dir")
    return report


def teacher_folder(seed: int, folder: Path, args: argparse.Namespace) -> Path:
    """A model folder of the teacher, trained to its plateau: the best epoch on the hold-out."""
    import numpy as np

    from benchmarks.accuracy import train_teacher
    from compression.encoder import build_encoder
    from compression.spec import TaskSpec
    from compression.tasks import make_task
    from compression.teachers import write_checkpoint
    from compression.tokenization import save_tokenizer

    kept = folder / TEACHER
    if kept.exists():
        return kept
    train = inputs.read_rows(args.model, args.data, max_seq_len=SEQ_LEN)["train"]
    order = np.random.default_rng([seed, 1]).permutation(len(train))
    holdout, learnt = train.take(order[: len(train) // 10]), train.take(order[len(train) // 10 :])
    config, weights = inputs.read_model(args.model, seed=seed)
    best, epochs = train_teacher(
        seed,
        build_encoder(config, weights),
        learnt,
        holdout,
        make_task(TaskSpec(), LABELS),
        args,
    )
    unfinished = folder / "unfinished"
    save_tokenizer(args.model, unfinished)
    write_checkpoint(unfinished, config, best, LABELS)
    (unfinished / EPOCHS).write_text(json.dumps(epochs))
    os.replace(unfinished, kept)
    return kept


# --- the candidates --------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A sub-network in a format: means over the seeds that have it."""

    subnetwork: str
    format: Format
    accuracy_drop: float  # points, dev
    drops: tuple[float, ...]  # of each seed
    p50_ms: float  # batch 1, one thread
    p50_ms_batched: float
    size_mb: float
    speedups: tuple[float, float]  # against the teacher of its own run in fp32 and in int8

    @property
    def kind(self) -> str:
        layers = "fewer layers" if "-d" in self.subnetwork else "one width"
        if self.subnetwork.startswith("p"):
            layers = "a width for each layer"
        return f"{layers}, {'int8' if self.format == INT8 else 'fp32'}"

    @property
    def share(self) -> float:
        """Its latency over the fp32 teacher's: of different runs, this can be compared."""
        return 1 / self.speedups[0]


def points(reports: Sequence[CompressionReport], *, uniform: bool = True) -> list[Point]:
    """Of every sub-network and format that each of the jobs has published, the fastest first.

    `uniform`: those of one width, else those with a width for each layer.
    """
    found: dict[tuple[str, Format], list[tuple[float, ...]]] = {}
    for report in reports:
        teacher = [alone for alone, _, _ in baselines([report]).values()]
        for subnetwork in report.subnetworks:
            for own in subnetwork.formats:
                is_wanted = uniform == (subnetwork.width_mult is not None)
                if is_wanted and own.published and own.latencies:
                    drop, alone = own.accuracy_drop, at(own.latencies, ALONE).p50_ms
                    found.setdefault((subnetwork.name, own.format), []).append(
                        (
                            subnetwork.accuracy_drop if drop is None else drop,
                            alone,
                            at(own.latencies, BATCHED).p50_ms,
                            own.size_bytes / 1e6,
                            *(each / alone for each in teacher),
                        )
                    )
    made = []
    for (name, fmt), rows in found.items():
        if len(rows) == len(reports):
            drop, *figures, fp32, int8 = (statistics.mean(each) for each in zip(*rows, strict=True))
            drops = tuple(row[0] for row in rows)
            made.append(Point(name, fmt, drop, drops, *figures, speedups=(fp32, int8)))
    return sorted(made, key=lambda point: point.share)


def on_front(found: Sequence[Point]) -> list[Point]:
    """Those that no other beats in latency and accuracy, in their order."""
    from compression.pareto import pareto_front

    front = pareto_front([(point.share, point.accuracy_drop) for point in found])
    return [point for point, best in zip(found, front, strict=True) if best]


def at(latencies: Sequence[LatencyReport], setting: tuple[int, int]) -> LatencyReport:
    return next(each for each in latencies if (each.batch_size, each.threads) == setting)


def baselines(reports: Sequence[CompressionReport]) -> dict[Format, tuple[float, float, float]]:
    """Of the teacher in each format: p50 alone and batched in ms, MB; means over seeds."""
    found = {}
    for fmt in (FP32, INT8):
        own = [next(f for f in report.teacher.formats if f.format == fmt) for report in reports]
        found[fmt] = (
            statistics.mean(at(each.latencies, ALONE).p50_ms for each in own),
            statistics.mean(at(each.latencies, BATCHED).p50_ms for each in own),
            statistics.mean(each.size_bytes / 1e6 for each in own),
        )
    return found


def table(found: Sequence[Point], teacher: dict[Format, tuple[float, float, float]]) -> str:
    """Markdown, the fastest first."""
    lines = [
        "| sub-network | format | points lost on dev (by seed) | ms, batch 1 | times fp32 | times "
        "int8 | ms, batch 16 | MB | on the front |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    front = on_front(found)

    def add(*cells: str) -> None:
        lines.append(f"| {' | '.join(cells)} |")

    for fmt, (alone, batched, size) in teacher.items():
        against = [f"{teacher[each][0] / alone:.2f}" for each in (FP32, INT8)]
        add(TEACHER, fmt, "", f"{alone:.2f}", *against, f"{batched:.2f}", f"{size:.1f}", "")
    for point in found:
        by_seed = " ".join(f"{drop:.2f}" for drop in point.drops)
        add(
            point.subnetwork,
            point.format,
            f"{point.accuracy_drop:.2f} ({by_seed})",
            f"{point.p50_ms:.2f}",
            *(f"{each:.2f}" for each in point.speedups),
            f"{point.p50_ms_batched:.2f}",
            f"{point.size_mb:.1f}",
            "yes" if point in front else "",
        )
    return "\n".join(lines) + "\n"


def plot(
    found: Sequence[Point],
    teacher: dict[Format, tuple[float, float, float]],
    chosen: Point | None,
    path: Path,
) -> None:
    """Points lost against latency: each kind of sub-network with the line of its own front."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for kind in sorted({point.kind for point in found}):
        own = [point for point in found if point.kind == kind]
        front = on_front(own)
        (line,) = axes.plot(
            [point.share for point in front],
            [point.accuracy_drop for point in front],
            marker="o",
            label=kind,
        )
        axes.scatter(
            [point.share for point in own],
            [point.accuracy_drop for point in own],
            s=12,
            color=line.get_color(),
        )
        for point in front:
            axes.annotate(
                point.subnetwork,
                (point.share, point.accuracy_drop),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
            )
    for fmt, (alone, _, _) in teacher.items():
        share = alone / teacher[FP32][0]
        axes.axvline(share, linestyle="--", linewidth=1, color="grey")
        axes.text(share, 0, f" teacher, {fmt}", rotation=90, fontsize=7, color="grey")
    if chosen is not None:
        place = ([chosen.share], [chosen.accuracy_drop])
        axes.scatter(*place, s=160, facecolors="none", edgecolors="black", label="chosen")
    axes.set_xlabel(
        f"latency over the fp32 teacher's (p50, batch 1, {SEQ_LEN} tokens, one thread; it takes "
        f"{teacher[FP32][0]:.2f} ms)"
    )
    axes.set_ylabel("points lost on dev")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


# --- the search, and asking again ---------------------------------------------------------------


def searched(reports: dict[int, CompressionReport]) -> dict[str, Any]:
    """What the search over per-layer widths came to, by seed, and its latency models' errors."""
    by_seed, models = [], []
    for seed, report in reports.items():
        search = report.search
        if search is None:
            by_seed.append({"seed": seed, "warnings": report.warnings})
            continue
        models += search.latency_models
        told: dict[str, Any] = {
            "seed": seed,
            "format": search.format,
            "budget": search.budget,
            "scored": search.scored,
            "note": search.note,
        }
        if (gain := search.gain) is not None:
            within = next(each for each in gain.intervals if each.confidence == 0.95)
            told |= {
                "subnetwork": gain.subnetwork,
                "reference": gain.reference,
                "gain_points": round(gain.points, 2),
                "gain_ci": [round(within.low, 2), round(within.high, 2)],
            }
        by_seed.append(told)
    return {
        "per_layer": by_seed,
        "latency_model_mean_error": max((round(m.mean_error, 4) for m in models), default=None),
        "latency_model_max_error": max((round(m.max_error, 4) for m in models), default=None),
        "latency_model_held_out": sum(m.held_out for m in models),
    }


def reselection_ms(kept: Path, max_drop: float) -> float:
    """Of a finished job, from its report as text to the smallest file at half that drop."""
    from compression.report import CompressionReport
    from compression.selection import reselect
    from compression.spec import ConstraintSpec

    text = kept.read_text()
    other = ConstraintSpec(max_accuracy_drop=max_drop / 2, objective="size")
    took = []
    for _ in range(RESELECTIONS):
        started = time.perf_counter()
        report = CompressionReport.model_validate_json(text)
        reselect(report.subnetworks, other, main_metric=report.main_metric)
        took.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(took), 1)


# --- the chosen one --------------------------------------------------------------------------


def judged(
    chosen: Point, args: argparse.Namespace, reports: Sequence[CompressionReport]
) -> dict[str, Any]:
    """Drops on dev and test with the served files, and their interval."""
    import numpy as np

    splits = inputs.read_rows(args.model, args.data, max_seq_len=SEQ_LEN)
    against: dict[str, list[np.ndarray]] = {"dev": [], "test": []}
    for seed, _ in zip(args.seeds, reports, strict=True):
        # In the job's folder: whoever moves that away moves its answers too.
        name = f"answers-{chosen.subnetwork}-{chosen.format}.json"
        kept = args.work_dir / f"seed-{seed}" / JOB / name
        if not kept.exists():
            inputs.write_whole(kept, json.dumps(dict(answers(seed, chosen, args, splits))))
        right = json.loads(kept.read_text())
        for split, own in against.items():
            own.append(
                np.array(right[f"{TEACHER} {split}"], int) - np.array(right[f"own {split}"], int)
            )
    lost = {split: 100 * np.mean(own, axis=0) for split, own in against.items()}  # by row
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(lost["dev"]), (RESAMPLES, len(lost["dev"])))
    within = np.quantile(lost["dev"][rows].mean(axis=1), [0.025, 0.975])
    return {
        "accuracy_drop": round(float(lost["dev"].mean()), 2),
        "accuracy_drop_test": round(float(lost["test"].mean()), 2),
        "drop_ci_low": round(float(within[0]), 2),
        "drop_ci_high": round(float(within[1]), 2),
        "drop_test_by_seed": [round(100 * float(own.mean()), 2) for own in against["test"]],
    }


def answers(
    seed: int, chosen: Point, args: argparse.Namespace, splits: dict[str, Encoded]
) -> Iterator[tuple[str, list[int]]]:
    """("teacher" or "own", split) -> which rows are right, by the served files.

    Row by row, as the job judges: dynamic int8 rounds by what else is in a batch.
    """
    from compression.int8 import served_predictions

    folder = args.work_dir / f"seed-{seed}"
    files = {
        TEACHER: (FP32, teacher_files(seed, args) / FP32),
        "own": (chosen.format, own_files(seed, chosen, args)),
    }
    for name, (fmt, path) in files.items():
        for split in ("dev", "test"):
            rows = splits[split]
            found = served_predictions(
                fmt, path, rows, batch_size=ALONE[0], pad_token_id=args.pad_token_id, work=folder
            )
            yield f"{name} {split}", (found.argmax(-1) == rows.labels).astype(int).tolist()


def own_files(seed: int, chosen: Point, args: argparse.Namespace) -> Path:
    job = args.work_dir / f"seed-{seed}" / JOB
    return job / "artifacts" / chosen.subnetwork / chosen.format


def teacher_files(seed: int, args: argparse.Namespace) -> Path:
    """The folder of the teacher's own files in fp32 and int8."""
    import numpy as np

    from compression.batches import pad
    from compression.encoder import build_encoder
    from compression.export import Int8Source, export_formats
    from compression.teachers import read_checkpoint

    folder = args.work_dir / f"seed-{seed}"
    kept = folder / "teacher-files"
    if not kept.exists():
        checkpoint = read_checkpoint(folder / TEACHER)
        work = folder / "teacher-int8"
        work.mkdir(exist_ok=True)
        train = inputs.read_rows(args.model, args.data, max_seq_len=SEQ_LEN)["train"]
        calibration = work / "calibration.npz"
        np.savez(calibration, **pad(train, range(CALIBRATION_ROWS), pad_id=args.pad_token_id))
        written = export_formats(
            [FP32, INT8],
            build_encoder(checkpoint.config, checkpoint.tensors),
            folder / "unfinished-files",
            labels=LABELS,
            int8=Int8Source(calibration, work),
        )
        for files in written.values():
            if files.error is not None:
                sys.exit(f"the teacher as {files.format}: {files.error}")
        os.replace(folder / "unfinished-files", kept)
    return kept


def timed(chosen: Point, args: argparse.Namespace) -> dict[str, Any]:
    """The file of every seed and the first seed's teachers in turns, at both settings."""
    from compression.latency import Served, timed_rounds
    from compression.spec import LatencySpec

    teachers = teacher_files(args.seeds[0], args)
    served = {str(fmt): Served(fmt, teachers / fmt) for fmt in (FP32, INT8)} | {
        f"own {seed}": Served(chosen.format, own_files(seed, chosen, args)) for seed in args.seeds
    }
    found: dict[str, Any] = {}
    # One after the other: a spec of both would time two more settings, of which nothing is told.
    for suffix, (batch_size, threads) in (("", ALONE), ("_b16", BATCHED)):
        spec = LatencySpec(batch_size=batch_size, threads=threads, rounds=args.final_rounds)
        (seconds,) = timed_rounds(
            served, spec, seq_len=SEQ_LEN, vocab_size=args.vocab_size
        ).values()
        found |= compared(seconds, suffix)
    return found


def compared(seconds: Mapping[str, np.ndarray], suffix: str) -> dict[str, Any]:
    """One setting's figures, of the seconds [rounds] of both teachers and of each seed's file."""
    import numpy as np

    from compression.intervals import intervals
    from compression.latency import percentile, resampled_percentiles

    p50 = {name: 1e3 * percentile(each.tolist(), 0.50) for name, each in seconds.items()}
    resampled = {name: resampled_percentiles(each)[:, 0] for name, each in seconds.items()}
    own = [name for name in seconds if name not in (FP32, INT8)]
    found: dict[str, Any] = {}
    for fmt, reference in ((FP32, "fp32"), (INT8, "int8")):
        by_seed = [p50[fmt] / p50[name] for name in own]
        means = np.mean([resampled[fmt] / resampled[name] for name in own], axis=0)
        within = next(each for each in intervals(means) if each.confidence == 0.95)
        key = f"speedup_vs_ort_{reference}{suffix}"
        found[key] = round(statistics.mean(by_seed), 2)
        found[f"{key}_by_seed"] = [round(each, 2) for each in by_seed]
        found[f"{key}_ci"] = [round(within.low, 2), round(within.high, 2)]
    p50["own"] = statistics.mean(p50.pop(name) for name in own)
    found[f"p50_ms{suffix}"] = {name: round(each, 3) for name, each in p50.items()}
    return found


def log(seed: int, text: str) -> None:
    print(f"[seed {seed}] {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs.add_arguments(parser)
    parser.add_argument("--work-dir", type=Path, default=inputs.ROOT / "build" / "bench-frontier")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", nargs="+", default=["1", "1/2", "1/4"])
    parser.add_argument("--depths", nargs="+", default=["1", "5/6", "2/3"])
    parser.add_argument("--depth-epochs", type=float, default=1)
    parser.add_argument("--depth-learning-rate", type=float, default=1e-4)
    parser.add_argument(
        "--refined", nargs="*", default=["w1_4", "w1_2-d5_6"], help="names of sub-networks"
    )
    parser.add_argument("--refine-epochs", type=float, default=6)
    parser.add_argument(
        "--per-layer-seeds", type=int, nargs="*", help="of --seeds; by default the first alone"
    )
    parser.add_argument("--per-layer-speedup", type=float, default=5.6, help="the search's budget")
    parser.add_argument("--latency-samples", type=int, default=24)
    parser.add_argument("--generations", type=int, default=5, help="of the search")
    parser.add_argument("--max-drop", type=float, default=1.0, help="points on dev")
    parser.add_argument("--teacher-epochs", type=int, default=5)
    parser.add_argument("--distil-epochs", type=float, default=2)
    parser.add_argument("--lambda-rep", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-steps", type=int, help="cuts all trainings short, to try it out")
    parser.add_argument("--rounds", type=int, default=20, help="of every candidate's latency")
    parser.add_argument("--final-rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    inputs.check(args)
    if args.per_layer_seeds is None:
        args.per_layer_seeds = args.seeds[:1]
    if strangers := set(args.per_layer_seeds) - set(args.seeds):
        parser.error(f"--per-layer-seeds {min(strangers)} is none of --seeds")
    inputs.require_environment("benchmarks.frontier")
    config, _ = inputs.read_model(args.model, seed=0)
    args.pad_token_id, args.vocab_size = config.pad_token_id, config.vocab_size
    inputs.keep_settings(args.work_dir, {name: getattr(args, name) for name in SETTING_NAMES})
    started = time.monotonic()
    reports = [run_job(seed, args) for seed in args.seeds]
    per_layer = {
        seed: report
        for seed, report in zip(args.seeds, reports, strict=True)
        if seed in args.per_layer_seeds
    }
    uniform, teacher = points(reports), baselines(reports)
    chosen = next((point for point in uniform if point.accuracy_drop <= args.max_drop), None)
    found = uniform + [
        dataclasses.replace(point, subnetwork=f"{point.subnetwork} of seed {seed}")
        for seed, report in per_layer.items()
        for point in points([report], uniform=False)
    ]
    found.sort(key=lambda point: point.share)
    (args.work_dir / "front.md").write_text(table(found, teacher))
    plot(found, teacher, chosen, args.work_dir / "front.svg")
    print(table(found, teacher), file=sys.stderr)
    result: dict[str, Any] = {
        "benchmark": "frontier",
        "reference": "the teacher in ONNX Runtime, fp32 and dynamic int8",
        "seeds": args.seeds,
        "teacher_accuracy": round(statistics.mean(r.teacher.accuracy for r in reports), 4),
        "teacher_accuracy_by_seed": [round(r.teacher.accuracy, 4) for r in reports],
        "teacher_holdout_by_epoch": [
            json.loads((args.work_dir / f"seed-{seed}" / TEACHER / EPOCHS).read_text())
            for seed in args.seeds
        ],
        "chosen": None,
        **dict.fromkeys(CHOSEN),
    }
    if chosen is not None:
        result |= {
            "chosen": f"{chosen.subnetwork} {chosen.format}",
            "drop_by_seed": [round(drop, 2) for drop in chosen.drops],
            **judged(chosen, args, reports),
            **timed(chosen, args),
            "size_ratio": round(chosen.size_mb / teacher[FP32][2], 3),
        }
    result |= searched(per_layer)
    result["reselection_ms"] = reselection_ms(
        args.work_dir / f"seed-{args.seeds[0]}" / JOB / "report.json", args.max_drop
    )
    result |= {"threads": args.threads, "wall_s": round(time.monotonic() - started, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
