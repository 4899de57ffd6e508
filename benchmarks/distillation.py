"""Seconds of one distillation step of ours against PaddleSlim's loop, round by round.

MiniLM-L6 with a random head, SST-2, batch 32, widths 1, 3/4, 1/2, 1/4. Every side is a process
of its own, loaded once, and only one runs at a time: a round gives each of them its turn of
`--steps` steps, batches made and optimizer included, after one that is not timed (the others'
turns last minutes, in which the caches go cold and an idle process's memory may be reclaimed).
Ours is `compression.distillation.distil` with the spec's defaults (so without dropout), which
computes the teacher at each step; the reference is PaddleSlim's loop with the mends that make it
run (`compression/reference`), and with the model's own dropout, as shipped. Both see the same
rows, once each.

- `step_s`, `reference_step_s`: medians over rounds of a step's mean seconds. The reference pads
  every batch to 64 tokens and its teacher records gradients, as shipped; `_no_grad`: the same
  with the teacher under no_grad; `_longest`: padded to the batch's longest row, as PaddleSlim's
  demo/ofa/bert/run_glue_ofa.py does; `_default_env`: with no variable set, as Paddle starts.
- `dropout_step_s`, `ratio_dropout`: ours with the model's own dropout too.
- `cached_step_s`: ours with the teacher's answers read from the file that
  `distillation.teacher_cache_mb` allows; writing it, once a job, is not in it.
- `ratio_same_env` = reference_step_s / step_s, both in the environment that the worker chooses
  (the reference's one process may use every core); `ratio_no_grad`, `ratio_longest`: likewise.
- `ratio_default_env` = reference_default_env_step_s / step_s.
- `roofline` = roofline_s / step_s; roofline_s: a fixed list of plain `paddle.matmul` products,
  one teacher forward and four student forward and backward of an average batch, real tokens
  alone, whatever ours manages to skip, on all cores.
- `peak_rss_mb`: peak of the summed PSS of our training process and its children without pages
  of files (Pss_Anon + Pss_Shmem), in an untimed run of its own that begins with a batch of 64
  tokens a row; `_base`: of a random 12-layer, 768-wide model at batch 8.

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compression.runtime_env import core_count, cpu_name, cpu_vendor, fastest, replica_count

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = ("1", "3/4", "1/2", "1/4")
PADDED = 64
BATCH, BASE_BATCH = 32, 8
MEMORY_STEPS = 4
REFERENCES = ("shipped", "no_grad", "longest")


# --- the sides: each runs in a process of its own -------------------------------------------


class Turns:
    """Holds this process still until the driver writes a line; answers when a turn is done."""

    def __init__(self) -> None:
        self.protocol = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries print as they like

    def wait(self) -> str:
        """The driver's next line. The process ends when there will be none."""
        self.say(None)
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        return line.strip()

    def start(self) -> None:
        """The untimed step is done."""
        self.started = time.perf_counter()

    def answer(self) -> None:
        self.say(time.perf_counter() - self.started)

    def say(self, seconds: float | None) -> None:
        """A turn's seconds; None: ready for one."""
        self.protocol.write(json.dumps(seconds) + "\n")
        self.protocol.flush()


def play_ours(args: argparse.Namespace) -> None:
    from compression.distillation import distil
    from compression.encoder import build_encoder
    from compression.learning import learning_config
    from compression.spec import DistillationSpec, TaskSpec
    from compression.supernet import subnetwork_of
    from compression.tasks import make_task
    from compression.teacher_states import KeptStates

    turns = Turns()
    inputs_of = {"memory": minilm, "base": random_base}
    config, weights, data = inputs_of.get(args.side, sst2)(args)
    spec = DistillationSpec(epochs=1, batch_size=BASE_BATCH if args.side == "base" else BATCH)
    if args.side == "dropout":
        spec = spec.model_copy(update={"dropout": None})
    teacher = build_encoder(config, weights)
    supernet = build_encoder(learning_config(config, spec), weights)
    del weights
    replicas = replica_count(os.environ, cores=core_count())
    kept = None
    folder = TemporaryDirectory(prefix="teacher-states-")  # gone with this process
    if args.side == "cached":
        kept = KeptStates.compute(teacher, data, Path(folder.name), threads=replicas)
    done = 0

    def on_step(_: object) -> None:
        nonlocal done
        done += 1
        if done % (1 + args.steps) == 1:
            turns.start()
        if done % (1 + args.steps) == 0:
            turns.answer()
            turns.wait()

    turns.wait()
    distil(
        supernet,
        teacher,
        data,
        [subnetwork_of(config, Fraction(width)) for width in WIDTHS],
        spec,
        make_task(TaskSpec(), ("0", "1")),
        seed=0,
        on_step=on_step,
        replicas=replicas,
        kept=kept,
    )


def play_reference(args: argparse.Namespace) -> None:
    from compression.reference.recipe import ReferenceLoop, TutorialOptimizer, reference_batch

    turns = Turns()
    config, weights, data = sst2(args)
    loops = {
        records: ReferenceLoop(
            config,
            weights,
            [Fraction(width) for width in WIDTHS],
            lambda_rep=0.1,
            lambda_logit=1.0,
            make_optimizer=lambda student: TutorialOptimizer(
                student, steps=1000, learning_rate=1e-4, warmup_steps=0, weight_decay=0.01
            ),
            dropouts=(config.hidden_dropout, config.attention_dropout),
            teacher_records=records,
        )
        for records in ((True,) if args.side == "default_env" else (True, False))
    }
    done = dict.fromkeys(REFERENCES, 0)
    while True:
        variant = turns.wait()
        for step in range(1 + args.steps):
            start = done[variant] * BATCH
            batch = reference_batch(
                data,
                range(start, start + BATCH),
                pad_id=config.pad_token_id,
                length=None if variant == "longest" else PADDED,
            )
            loops[variant != "no_grad"].step(batch)
            done[variant] += 1
            if step == 0:
                turns.start()
        turns.answer()


def play_roofline(args: argparse.Namespace) -> None:
    import paddle

    turns = Turns()
    config, _, data = sst2(args)
    tokens = round(sum(len(ids) for ids in data.input_ids) / len(data) * BATCH)
    products = [
        (paddle.randn(left), paddle.randn(right), count)
        for left, right, count in matrix_products(config, rows=BATCH, tokens=tokens)
    ]
    while True:
        turns.wait()
        for step in range(1 + args.steps):
            for left, right, count in products:
                for _ in range(count):
                    paddle.matmul(left, right)
            if step == 0:
                turns.start()
        turns.answer()


def matrix_products(
    config: Any, *, rows: int, tokens: int
) -> list[tuple[list[int], list[int], int]]:
    """(left shape, right shape, how often) of the products of one step of `tokens` real tokens.

    The teacher forward at width 1; each width forward, and backward: for each product one for
    each of its two sides.
    """
    products = []
    length = round(tokens / rows)
    for width in (None, *(Fraction(each) for each in WIDTHS)):
        kept = config.narrowed(width or Fraction(1))
        for heads, neurons in zip(kept.heads, kept.ffn, strict=True):
            units = heads * config.head_dim
            batched = [rows, heads]
            forward = [
                *[([tokens, config.hidden], [config.hidden, units])] * 3,
                ([*batched, length, config.head_dim], [*batched, config.head_dim, length]),
                ([*batched, length, length], [*batched, length, config.head_dim]),
                ([tokens, units], [units, config.hidden]),
                ([tokens, config.hidden], [config.hidden, neurons]),
                ([tokens, neurons], [neurons, config.hidden]),
            ]
            for left, right in forward:
                products.append((left, right, 1))
                if width is not None:
                    out = [*left[:-1], right[-1]]
                    products.append((out, [*right[:-2], right[-1], right[-2]], 1))  # to the left
                    products.append(([*left[:-2], left[-1], left[-2]], out, 1))  # to the right
    counts: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for left, right, count in products:
        key = (tuple(left), tuple(right))
        counts[key] = counts.get(key, 0) + count
    return [(list(left), list(right), count) for (left, right), count in counts.items()]


def sst2(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Config, weights, and as many random rows of train as the rounds take."""
    import numpy as np

    from benchmarks import inputs

    config, weights = inputs.read_model(args.model, seed=0)
    train = inputs.read_rows(args.model, args.data, max_seq_len=PADDED)["train"]
    count = (args.rounds + 1) * (1 + args.steps) * BATCH
    return config, weights, train.take(np.random.default_rng(0).permutation(len(train))[:count])


def minilm(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """MiniLM-L6 and random rows, to measure memory with."""
    from benchmarks import inputs

    config, weights = inputs.read_model(args.model, seed=0)
    return config, weights, random_rows(config.vocab_size, BATCH)


def random_base(_: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A BERT-base of random weights and random rows, to measure memory with."""
    import numpy as np

    from compression.teachers import EncoderConfig, parameter_shapes

    config = EncoderConfig(
        family="bert",
        vocab_size=30522,
        hidden=768,
        layers=12,
        heads=(12,) * 12,
        head_dim=64,
        ffn=(3072,) * 12,
        max_positions=512,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        activation="gelu",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        pad_token_id=0,
        num_labels=2,
    )
    generator = np.random.default_rng(0)
    weights = {
        name: generator.standard_normal(shape, np.float32) * np.float32(0.02)
        for name, shape in parameter_shapes(config).items()
    }
    return config, weights, random_rows(config.vocab_size, BASE_BATCH)


def random_rows(vocabulary: int, batch_size: int) -> Any:
    """MEMORY_STEPS batches of 8 to 64 tokens a row; a whole batch's worth has 64."""
    import numpy as np

    from compression.batches import Encoded

    generator = np.random.default_rng(0)
    lengths = generator.integers(8, PADDED + 1, MEMORY_STEPS * batch_size)
    lengths[:batch_size] = PADDED
    ids = [generator.integers(1, vocabulary, length).tolist() for length in lengths]
    return Encoded(ids, [[0] * len(row) for row in ids], np.zeros(len(ids), np.int64))


SIDES: dict[str, Callable[[argparse.Namespace], None]] = {
    "ours": play_ours,
    "cached": play_ours,
    "dropout": play_ours,
    "memory": play_ours,
    "base": play_ours,
    "reference": play_reference,
    "default_env": play_reference,
    "roofline": play_roofline,
}


# --- the driver -----------------------------------------------------------------------------


class Side:
    """One side's process, as the driver sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.hear()

    def hear(self) -> float | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with status {self.process.wait()}")
        return json.loads(line)  # type: ignore[no-any-return]

    def turn(self, command: str = "go") -> float:
        """Seconds of one turn, after which the process waits again."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        seconds = self.hear()
        assert seconds is not None
        self.hear()
        time.sleep(0.3)  # the math library's threads spin on for a while
        return seconds


@contextmanager
def side(name: str, args: argparse.Namespace, environment: dict[str, str]) -> Iterator[Side]:
    command = [sys.executable, "-m", "benchmarks.distillation", "--side", name]
    for option in ("model", "data", "rounds", "steps"):
        command += [f"--{option}", str(getattr(args, option))]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Side(process)
            assert process.stdin is not None
            process.stdin.close()
        finally:
            process.kill()


class PeakMemory:
    """Samples a process and its children, in a thread; `peak_mb` is the largest sum."""

    def __init__(self, pid: int) -> None:
        self.peak_mb = 0.0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak_mb = max(self.peak_mb, sum(map(own_kb, family(self._pid))) / 1024)


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def own_kb(pid: int) -> int:
    """Proportional kB of a process that no file backs; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(x.split()[1]) for x in lines if x.startswith(("Pss_Anon:", "Pss_Shmem:")))


def main() -> None:
    from benchmarks import inputs

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=6, help="measured; one more warms up")
    parser.add_argument("--steps", type=int, default=3, help="of each side in each round")
    parser.add_argument(
        "--keep",
        type=Path,
        default=ROOT / "build" / "bench-distillation",
        help="folder that keeps which environment was measured to be the fastest",
    )
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](args)
        return
    inputs.check(args)
    args.model, args.data = args.model.resolve(), args.data.resolve()

    cores = core_count()
    chosen = fastest(args.keep, machine=cpu_name(), cores=cores, vendor=cpu_vendor()).variables
    bare = {name: value for name, value in os.environ.items() if name not in chosen}
    ours_env = {**bare, **chosen}
    every_core = {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    steps = args.steps
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(side(name, args, environment))
            for name, environment in (
                ("ours", ours_env),
                ("cached", ours_env),
                ("dropout", ours_env),
                ("reference", {**ours_env, **every_core}),
                ("default_env", bare),
                ("roofline", {**ours_env, **every_core}),
            )
        }
        turns = [
            ("ours", "ours", "go"),
            ("ours cached", "cached", "go"),
            ("ours dropout", "dropout", "go"),
            *((f"reference {variant}", "reference", variant) for variant in REFERENCES),
            ("reference default_env", "default_env", "shipped"),
            ("roofline", "roofline", "go"),
        ]
        for number in range(args.rounds + 1):
            for label, name, command in turns:
                step_s = sides[name].turn(command) / steps
                print(f"round {number}: {label} {step_s:.3f} s a step", file=sys.stderr)
                if number > 0:  # the first one warms up
                    seconds.setdefault(label, []).append(step_s)
    peaks = {}
    args.steps = MEMORY_STEPS - 1  # and the untimed one
    for name in ("memory", "base"):
        with side(name, args, ours_env) as measured, PeakMemory(measured.process.pid) as memory:
            measured.turn()
        peaks[name] = round(memory.peak_mb)

    median = {label: statistics.median(values) for label, values in seconds.items()}
    step_s = median["ours"]

    def ratio(label: str) -> float:
        return round(median[label] / step_s, 2)

    print(
        json.dumps(
            {
                "benchmark": "distillation",
                "ratio_same_env": ratio("reference shipped"),
                "ratio_default_env": ratio("reference default_env"),
                "ratio_no_grad": ratio("reference no_grad"),
                "ratio_longest": ratio("reference longest"),
                "ratio_dropout": round(median["reference shipped"] / median["ours dropout"], 2),
                "roofline": round(median["roofline"] / step_s, 3),
                "step_s": round(step_s, 3),
                "cached_step_s": round(median["ours cached"], 3),
                "dropout_step_s": round(median["ours dropout"], 3),
                "reference_step_s": round(median["reference shipped"], 3),
                "reference_no_grad_step_s": round(median["reference no_grad"], 3),
                "reference_longest_step_s": round(median["reference longest"], 3),
                "reference_default_env_step_s": round(median["reference default_env"], 3),
                "roofline_s": round(median["roofline"], 3),
                "peak_rss_mb": peaks["memory"],
                "peak_rss_mb_base": peaks["base"],
                "rounds": args.rounds,
                "steps_a_round": steps,
                "cores": cores,
                "cpu": cpu_name(),
                "environment": chosen,
            }
        )
    )


if __name__ == "__main__":
    main()
