"""The same job without the service: python -m compression --model DIR --dataset DIR --out DIR.

Other commands, each with its own --help:
  python -m compression profile         measure this device (compression/profile.py)
  python -m compression select REPORT   choose again under other constraints, from what was measured
  python -m compression verify BUNDLE   compare a bundle with its manifest and its signature
  python -m compression keygen FILE     make a key to sign bundles with
  python -m compression schema          print the JSON Schema of a bundle's manifest
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
from compression.device_profile import ON as LATENCY_ON
from compression.device_profile import DeviceProfile, read_profile, report_predictor
from compression.errors import (
    CompressionError,
    Interrupted,
    InvalidDataset,
    InvalidSpec,
    SigningKeyRefused,
    without_consequences,
)
from compression.manifest import schema_bytes
from compression.report import (
    CompressionReport,
    FormatReport,
    Intervals,
    Progress,
    SearchReport,
    Selection,
    SubnetworkReport,
    TeacherReport,
    VocabularyReport,
)
from compression.runtime_env import cpu_vendor, training_environment
from compression.selection import SHOWN_CONFIDENCE, reselect
from compression.signing import key_id, new_key, read_private_key, read_public_key
from compression.spec import ROUNDED_FORMATS, ConstraintSpec, Spec
from compression.verify import NoBundle, verify_bundle

INTERRUPTED = 3  # exit status
SHOWN_FAULTS = 20
PROFILE_HELP = "of a device that latency is predicted for, from `python -m compression profile`"


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
    """The teacher (the baselines) and the sub-networks as text, a line for each served format."""
    networks = [
        ("teacher", report.teacher),
        *(
            (str(each.width_mult) if each.width_mult and each.depth_mult == 1 else each.name, each)
            for each in report.subnetworks
        ),
    ]
    room = max(len(name) for name, _ in networks)
    lines = [
        f"{'width':>{room}} {'format':>17} {'params':>8} {'size MB':>8} {report.main_metric:>11} "
        f"{'drop':>6} {'p50 ms':>7} {'95 %':>15} {'p95 ms':>7} {'p99 ms':>7} "
        f"{'speedup':>8} {'95 %':>12}  "
        "pareto selected"
    ]
    for name, network in networks:
        for fmt in network.formats:
            if (latency := fmt.latency) is None:
                continue
            candidate = isinstance(network, SubnetworkReport)
            on_front = candidate and network.pareto
            chosen = candidate and network.selected and fmt.format == report.selection.format
            accuracy, drop = on_dev(network, fmt)
            speedup = fmt.speedup
            if speedup is None and fmt.format not in ROUNDED_FORMATS:  # the teacher against itself
                speedup = 1.0
            lines.append(
                f"{name:>{room}} {fmt.format:>17} {network.parameters / 1e6:>7.1f}M "
                f"{fmt.size_bytes / 1e6:>8.1f} {shown(accuracy, 4):>11} "
                f"{shown(drop, 2):>6} {latency.p50_ms:>7.2f} "
                f"{within(latency.p50_intervals):>15} {latency.p95_ms:>7.2f} "
                f"{latency.p99_ms:>7.2f} "
                f"{shown(speedup, 2):>8} {within(latency.speedup_intervals):>12}  "
                f"{'yes' if on_front else 'no':>6} {'yes' if chosen else 'no':>8}"
            )
    return "\n".join(lines)


def on_dev(
    network: TeacherReport | SubnetworkReport, fmt: FormatReport
) -> tuple[float | None, float | None]:
    """Accuracy and points lost of one file: its own where it rounds, else its network's.

    None twice of the teacher in int8 in reports that predate its being judged.
    """
    if fmt.accuracy is not None:
        return fmt.accuracy, fmt.accuracy_drop
    if isinstance(network, TeacherReport):
        return (None, None) if fmt.format in ROUNDED_FORMATS else (network.accuracy, 0.0)
    return network.accuracy, network.accuracy_drop


def shown(value: float | None, digits: int) -> str:
    """A cell of the table; empty where there is no figure."""
    return "" if value is None else f"{value:.{digits}f}"


def within(intervals: Intervals, between: str = "-") -> str:
    """ "3.91-4.10", with 95 % confidence; nothing where no interval was kept."""
    return "".join(
        f"{each.low:.2f}{between}{each.high:.2f}"
        for each in intervals
        if each.confidence == SHOWN_CONFIDENCE
    )


def vocabulary_words(vocabulary: VocabularyReport) -> str:
    """What was removed and what that does, in one line."""
    return (
        f"vocabulary: {vocabulary.tokens_after:,} of {vocabulary.tokens_before:,} tokens are left; "
        f"on {vocabulary.split} {vocabulary.changed_texts:.1%} of the texts have a removed one, "
        f"[UNK] is {vocabulary.unk_after:.2%} of the tokens ({vocabulary.unk_before:.2%} before)"
    )


def search_words(search: SearchReport) -> Iterator[str]:
    """What the search for a width for each layer did, how it predicted, and what it gained."""
    yield (
        f"search: {search.scored} candidates within {' and '.join(search.budget)}, in "
        f"{search.format}, scored on {search.holdout_rows} rows of train"
    )
    for model in search.latency_models:
        yield (
            f"search: latency (p{model.percentile}) was predicted {model.mean_error:.1%} off on "
            f"average, {model.max_error:.1%} at most, on {model.held_out} sub-networks that were "
            "measured and not fitted"
        )
    if (gain := search.gain) is not None:
        interval = within(gain.intervals, " to ")
        yield (
            f"search: {gain.subnetwork} gains {gain.points:+.2f} points on dev over "
            f"{gain.reference}, the best of one width"
            + (f" (95 %: {interval})" if interval else "")
        )
    elif search.note:
        yield f"search: {search.note}"


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
    """The spec of a YAML or JSON file; the default one without a file. OSError, ValueError."""
    if path is None:
        return Spec()
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as YAML or JSON: {error}") from None
    try:
        return Spec.model_validate({} if document is None else document)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(faults(error))}") from None


def faults(error: ValidationError) -> list[str]:
    """A sentence each, with a JSON pointer; never what was read."""
    return [
        f"/{'/'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in without_consequences(error.errors())
    ]


def with_profile(spec: Spec, path: Path | None) -> tuple[Spec, DeviceProfile | None]:
    """The spec with latency_on being the file's name, and what is in the file.

    Without `path` the file is the one that the spec's own latency_on names, if it does.
    """
    if path is None and spec.constraints.latency_on is not None:
        path = Path(spec.constraints.latency_on)
        if not path.is_file():
            raise InvalidSpec(
                f"the spec's latency_on names {str(path)!r}, which is no file here; name the "
                "device's profile with --profile",
                pointer=LATENCY_ON,
            )
    if path is None:
        return spec, None
    profile = read_profile(path)
    constraints = spec.constraints.model_copy(update={"latency_on": path.name})
    return spec.model_copy(update={"constraints": constraints}), profile


def select_command(arguments: list[str]) -> int:
    """Chooses again under a spec's constraints, from what a job measured; nothing is changed.

    Exit status 0: one was chosen; 1: none holds the constraints.
    """
    parser = argparse.ArgumentParser(
        prog="python -m compression select", description=select_command.__doc__
    )
    parser.add_argument("report", type=Path, metavar="REPORT", help="a job's report.json")
    parser.add_argument(
        "--spec",
        type=Path,
        help="YAML or JSON, of which constraints are read; without it the job's own hold",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help=PROFILE_HELP)
    args = parser.parse_args(arguments)
    try:
        asked = with_profile(read_spec(args.spec), args.profile) if args.spec else None
        report = read_report(args.report)
        spec, profile = asked or with_profile(report.spec, args.profile)
        selection = reselected(report, spec.constraints, profile)
    except CompressionError as error:
        parser.error(f"{error.message} ({error.pointer})")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    show_selection(selection)
    return 0 if selection.subnetwork is not None else 1


def read_report(path: Path) -> CompressionReport:
    """OSError, or ValueError in one sentence."""
    try:
        return CompressionReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is no report.json of a job: {faults(error)[0]}") from None


def reselected(
    report: CompressionReport, constraints: ConstraintSpec, profile: DeviceProfile | None
) -> Selection:
    """InvalidSpec for what the report or the profile cannot answer."""
    predictor = None
    if profile is not None:
        encoder = report.teacher.encoder
        predictor = report_predictor(profile, constraints, report.subnetworks, encoder)
    return reselect(
        report.subnetworks, constraints, main_metric=report.main_metric, predictor=predictor
    )


def show_predictions(report: CompressionReport) -> None:
    for network in report.subnetworks:
        for fmt in network.formats:
            if (found := fmt.predicted) is not None:
                print(
                    f"{network.name} in {fmt.format}: {found.p50_ms:.2f} ms predicted for "
                    f"{found.on.device.cpu}, {found.speedup:.2f} times as fast as the teacher"
                )


def show_selection(selection: Selection) -> None:
    print(selection.reason)
    if selection.explanation is not None:
        for effect in selection.explanation.effects:
            print(effect.words)
    for each in selection.nearest:
        print(f"near: {each.subnetwork} in {each.format} {', '.join(each.misses)}")


def schema_command(arguments: list[str]) -> int:
    """Prints the JSON Schema of a bundle's manifest."""
    argparse.ArgumentParser(
        prog="python -m compression schema", description=schema_command.__doc__
    ).parse_args(arguments)
    print(schema_bytes().decode(), end="")
    return 0


def keygen_command(arguments: list[str]) -> int:
    """Makes an Ed25519 key to sign bundles with: FILE is the private key, FILE.pub the public one.

    Set WIDTHWISE_SIGNING_KEY to FILE for the worker; give FILE.pub to those who verify.
    """
    parser = argparse.ArgumentParser(
        prog="python -m compression keygen", description=keygen_command.__doc__
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="must not exist yet")
    file = parser.parse_args(arguments).file
    try:
        public = new_key(file)
    except OSError as error:
        print(f"no key was made: {error}", file=sys.stderr)
        return 1
    print(f"private key: {file} (keep it; nobody else may read it)")
    print(f"public key:  {public}")
    print(f"key id:      {key_id(read_public_key(public.read_bytes()))}")
    return 0


def verify_command(arguments: list[str]) -> int:
    """Compares a bundle with its manifest, file by file, and checks its signature.

    Nothing of the bundle is unpacked or run. Exit status 0: all holds; 1: something does not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m compression verify", description=verify_command.__doc__
    )
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="a bundle.tar.gz, or its unpacked folder",
    )
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="of the installation it should come from: it must then be signed with that key",
    )
    args = parser.parse_args(arguments)
    try:
        trusted = read_public_key(args.public_key.read_bytes()) if args.public_key else None
        verdict = verify_bundle(args.bundle, trusted)
    except (OSError, SigningKeyRefused, NoBundle) as error:
        print(f"cannot be verified: {error}", file=sys.stderr)
        return 1
    for fault in verdict.faults[:SHOWN_FAULTS]:
        print(fault, file=sys.stderr)
    if not verdict.holds:
        print(f"does not hold: {len(verdict.faults)} fault(s)", file=sys.stderr)
        return 1
    print(f"all {verdict.files} files are as published")
    if verdict.signed_by is None:
        print("not signed: this shows that nothing changed since, and not who made it")
    elif trusted is None:
        print(f"signed with the key {verdict.signed_by}; --public-key would show whose that is")
    else:
        print(f"signed with the key {verdict.signed_by}, the one that was given")
    return 0


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {
    "keygen": keygen_command,
    "schema": schema_command,
    "select": select_command,
    "verify": verify_command,
}


def main(arguments: list[str]) -> int:
    """Runs a job, or the command that the first argument names; the exit status."""
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
        "--signing-key", type=Path, metavar="FILE", help="private key that bundles are signed with"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help=PROFILE_HELP)
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
    except (OSError, ValueError) as error:
        parser.error(f"--spec: {error}")
    try:
        spec, profile = with_profile(spec, args.profile)
    except (OSError, InvalidSpec) as error:
        parser.error(f"--profile: {error}")

    try:
        key = read_private_key(args.signing_key.read_bytes()) if args.signing_key else None
    except (OSError, SigningKeyRefused) as error:
        parser.error(f"--signing-key: {error}")

    # Before paddle is imported; what the user has set stays.
    wanted = training_environment(cpu_count=len(os.sched_getaffinity(0)), vendor=cpu_vendor())
    wanted |= resumed_variables(args.out / CHECKPOINTS)
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    from compression.pipeline import compress

    bar = ProgressBar()
    try:
        with told_to_stop() as stop:
            report = compress(
                spec,
                args.model,
                args.dataset,
                args.out,
                bar,
                stop=stop.is_set,
                signing_key=key,
                profile=profile,
            )
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
    show_predictions(report)
    show_selection(report.selection)
    if report.search is not None:
        print(*search_words(report.search), sep="\n")
    if report.vocabulary is not None:
        print(vocabulary_words(report.vocabulary))
    for warning in (*report.dataset.notes, *report.warnings):
        print(f"warning: {warning}")
    print(f"report: {args.out / 'report.json'}")
    return 0
