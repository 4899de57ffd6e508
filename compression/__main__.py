"""The same job without the service: python -m compression --model DIR --dataset DIR --out DIR.

`python -m compression schema` prints the JSON Schema of a bundle's manifest.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from pydantic import ValidationError
from tqdm import tqdm

from compression.checkpoint import FOLDER as CHECKPOINTS
from compression.checkpoint import resumed_variables
from compression.errors import CompressionError, Interrupted, InvalidDataset
from compression.manifest import schema_bytes
from compression.report import CompressionReport, Progress
from compression.runtime_env import cpu_vendor, training_environment
from compression.spec import Spec

INTERRUPTED = 3  # exit status


class ProgressBar:
    """One bar a stage on standard error."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.stage = ""

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self.stage:
            self.close()
            self.stage = progress.stage
            self.bar = tqdm(total=progress.total, desc=f"{progress.stage:>10}", file=sys.stderr)
        self.bar.total = progress.total
        self.bar.n = progress.step
        figures = {
            name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in progress.figures.items()
            if isinstance(value, (int, float, str))
        }
        self.bar.set_postfix(figures, refresh=False)
        self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def table(report: CompressionReport) -> str:
    """The sub-networks as text, a line for each served format."""
    lines = [
        f"{'width':>6} {'format':>7} {'params':>8} {'size MB':>8} {report.main_metric:>11} "
        f"{'drop':>6} {'p50 ms':>7} {'p95 ms':>7} {'speedup':>8}  pareto selected"
    ]
    for network in report.subnetworks:
        for fmt in network.formats:
            if fmt.latency is None:
                continue
            chosen = network.selected and fmt.format == report.selection.format
            lines.append(
                f"{network.width_mult!s:>6} {fmt.format:>7} {network.parameters / 1e6:>7.1f}M "
                f"{fmt.size_bytes / 1e6:>8.1f} {network.accuracy:>11.4f} "
                f"{network.accuracy_drop:>6.2f} {fmt.latency.p50_ms:>7.2f} "
                f"{fmt.latency.p95_ms:>7.2f} {fmt.speedup or float('nan'):>8.2f}  "
                f"{'yes' if network.pareto else 'no':>6} {'yes' if chosen else 'no':>8}"
            )
    return "\n".join(lines)


@contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the process at once."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def tell(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, tell)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_spec(path: Path | None) -> Spec:
    """The spec of a YAML or JSON file; the default one without a file."""
    return Spec.model_validate(yaml.safe_load(path.read_text()) or {}) if path else Spec()


def schema_command(arguments: list[str]) -> int:
    """Prints the JSON Schema of a bundle's manifest."""
    argparse.ArgumentParser(
        prog="python -m compression schema", description=schema_command.__doc__
    ).parse_args(arguments)
    print(schema_bytes().decode(), end="")
    return 0


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {"schema": schema_command}


def main(arguments: list[str] | None = None) -> int:
    """Runs a job, or the command that the first argument names; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    return compress_command(arguments)


def compress_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the fine-tuned model")
    parser.add_argument(
        "--dataset", type=Path, required=True, help="folder of train/dev/test files"
    )
    parser.add_argument("--spec", type=Path, help="YAML or JSON; by default every field's default")
    parser.add_argument(
        "--out", type=Path, required=True, help="new or empty folder for the result"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on in an --out whose job was interrupted, from its last checkpoint",
    )
    args = parser.parse_args(arguments)
    for name in ("model", "dataset"):
        if not getattr(args, name).is_dir():
            parser.error(f"--{name}: {getattr(args, name)} is not a folder")
    if args.resume:
        if not (args.out / CHECKPOINTS).is_dir():
            parser.error(f"--resume: {args.out} holds no interrupted job")
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out: {args.out} exists and is not an empty folder; see --resume")
    try:
        spec = read_spec(args.spec)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        parser.error(f"--spec: {error}")

    # Before paddle is imported; what the user has set stays.
    wanted = training_environment(cpu_count=len(os.sched_getaffinity(0)), vendor=cpu_vendor())
    wanted |= resumed_variables(args.out / CHECKPOINTS)
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    from compression.pipeline import compress

    bar = ProgressBar()
    try:
        with told_to_stop() as stop:
            report = compress(spec, args.model, args.dataset, args.out, bar, stop=stop.is_set)
    except Interrupted as interrupted:
        bar.close()
        print(f"{interrupted}; the same command with --resume goes on", file=sys.stderr)
        return INTERRUPTED
    except CompressionError as error:
        bar.close()
        where = f" ({error.pointer})" if error.pointer else ""
        print(f"{error.code}: {error.message}{where}", file=sys.stderr)
        for row in error.rows if isinstance(error, InvalidDataset) else ():
            print(f"  {row.file}, line {row.line}: {row.message}", file=sys.stderr)
        return 2
    bar.close()
    print(table(report))
    print(report.selection.reason)
    for warning in (*report.dataset.notes, *report.warnings):
        print(f"warning: {warning}")
    print(f"report: {args.out / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
