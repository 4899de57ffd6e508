"""What the building blocks of an encoder cost on this device: python -m compression profile.

Needs onnxruntime and numpy alone, so that a device can be profiled that will never run a
job. `compression.prediction` makes the latency of any sub-network of it. How far off that is
is measured too: whole networks, none of which the prediction is made from, are timed by turns
with the blocks. `--bundle` adds exported files, `--report` what a job measured on this device.

A block is timed as it stands in a model: as many of its kind in a row as the model has
layers, each with weights of its own, so that caches hold no more of them than they would.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compression import blocks
from compression.blocks import ACTIVATIONS, MASK, TYPES, Shape
from compression.prediction import (
    AXES,
    LIMITS,
    MAX_COUNT,
    MAX_COUNTS,
    MAX_LAYERS,
    MAX_NETWORKS,
    MAX_TABLES,
    LatencyModel,
    OutsideProfile,
    Table,
    head_of,
)
from compression.runtime_env import core_count, cpu_name, instruction_sets, memory_bytes

VERSION = 3
FORMATS = ("onnx", "onnx-int8-dynamic")
WARM_UP_CALLS = 5
FLOPS_TOLERANCE = 0.1  # a projection of the embeddings is not counted
Setting = Mapping[str, int]  # by AXES
Model = bytes | str  # an ONNX file, or its path
Name = tuple[str, str, int]  # of what is timed: its format, its kind, its heads or neurons


@dataclass(frozen=True)
class Space:
    """What is measured: counts of a layer, and the layers of the deepest network."""

    shape: Shape
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    layers: int
    formats: tuple[str, ...] = FORMATS


@dataclass(frozen=True)
class Network:
    """A whole network to hold predictions against; `file`: where it is an exported one."""

    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    format: str
    file: Path | None = None
    head: str = "sequence"

    def model(self, shape: Shape, setting: Setting) -> Model:
        if self.file is not None:
            return str(self.file)
        int8, seq_len = self.format != "onnx", setting["seq_len"]
        return blocks.network(shape, seq_len, heads=self.heads, neurons=self.ffn, int8=int8)


def measure_setting(
    space: Space, setting: Setting, networks: Sequence[Network], *, rounds: int
) -> tuple[list[Table], list[float]]:
    """One setting's table for each format, and milliseconds of each of the networks, by turns."""
    shape, seq_len, layers = space.shape, setting["seq_len"], space.layers
    models: dict[Name, Callable[[], Model]] = {("call", "", 0): blocks.call}
    models |= _models(shape, setting, networks)
    for fmt in space.formats:
        int8 = fmt != "onnx"
        models |= {
            (fmt, "embeddings", 0): partial(blocks.embeddings, shape, seq_len, int8=int8),
            (fmt, "pooled_head", 0): partial(blocks.head, shape, int8=int8),
            (fmt, "token_head", 0): partial(blocks.token_head, shape),
            **{
                (fmt, "attention", count): partial(
                    blocks.attention, shape, heads=count, layers=layers, int8=int8
                )
                for count in space.heads
            },
            **{
                (fmt, "ffn", count): partial(
                    blocks.ffn, shape, neurons=count, layers=layers, int8=int8
                )
                for count in space.ffn
            },
        }
    taken = _timed(models, shape, setting, rounds=rounds)
    call = taken["call", "", 0]
    tables: list[Table] = []
    for fmt in space.formats:
        beside = {
            (kind, count): max(0.0, ms - call)
            for (own, kind, count), ms in taken.items()
            if own == fmt
        }
        tables.append(
            {
                **setting,
                "format": fmt,
                "call": call,
                **{kind: beside[kind, 0] for kind in ("embeddings", "pooled_head", "token_head")},
                "attention": {str(n): beside["attention", n] / layers for n in space.heads},
                "ffn": {str(n): beside["ffn", n] / layers for n in space.ffn},
            }
        )
    return tables, [taken["network", "", i] for i in range(len(networks))]


def measure_networks(
    shape: Shape, setting: Setting, networks: Sequence[Network], *, rounds: int
) -> list[float]:
    """Milliseconds of each of the networks."""
    taken = _timed(_models(shape, setting, networks), shape, setting, rounds=rounds)
    return [taken["network", "", i] for i in range(len(networks))]


def whole_networks(space: Space, seed: int) -> list[Network]:
    """In each format the widest, the narrowest, one of drawn counts, and one of half the layers."""
    draw = random.Random(seed)

    def drawn(layers: int) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(draw.randint(min(counts), max(counts)) for _ in range(layers))
            for counts in (space.heads, space.ffn)
        )

    widest, narrowest = (
        tuple((end(counts),) * space.layers for counts in (space.heads, space.ffn))
        for end in (max, min)
    )
    layered = dict.fromkeys(
        [widest, narrowest, drawn(space.layers), drawn((space.layers + 1) // 2)]
    )
    return [Network(heads, ffn, fmt) for fmt in space.formats for heads, ffn in layered]


def settings_of(values: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Every combination, once."""
    each_axis = (dict.fromkeys(values[axis]) for axis in AXES)
    return [dict(zip(AXES, each, strict=True)) for each in itertools.product(*each_axis)]


def settings_between(values: Mapping[str, Sequence[int]]) -> Iterator[Setting]:
    """The middle of each two neighbours on each axis, the others at their first value."""
    first = {axis: values[axis][0] for axis in AXES}
    for axis in AXES:
        for low, high in itertools.pairwise(sorted(set(values[axis]))):
            if high - low > 1:
                yield {**first, axis: (low + high) // 2}


def measure(
    space: Space,
    values: Mapping[str, Sequence[int]],
    *,
    rounds: int,
    exported: Sequence[Network] = (),
    on_setting: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Table], list[dict[str, Any]]]:
    """Tables for every combination of `values`, and the whole networks that were timed.

    Whole networks are also timed in settings between, where predictions are interpolated.
    """
    settings, between = settings_of(values), list(settings_between(values))
    total = len(settings) + len(between)
    tables: list[Table] = []
    found: list[dict[str, Any]] = []

    def keep(setting: Setting, networks: Sequence[Network], taken: Sequence[float]) -> None:
        for network, ms in zip(networks, taken, strict=True):
            found.append(
                {
                    **setting,
                    "format": network.format,
                    "heads": list(network.heads),
                    "ffn": list(network.ffn),
                    "head": network.head,
                    "measured_ms": ms,
                    "served": network.file is not None,
                }
            )

    for i, setting in enumerate([*settings, *between]):
        on_setting(i, total)
        networks = [*whole_networks(space, seed=i), *exported]
        if i < len(settings):
            own, taken = measure_setting(space, setting, networks, rounds=rounds)
            tables += own
        else:
            taken = measure_networks(space.shape, setting, networks, rounds=rounds)
        keep(setting, networks, taken)
    return tables, found


def misfit(network: Mapping[str, Any], space: Space) -> str | None:
    """Why a profile of this says nothing of a report's sub-network; None where it does."""
    if len(network["heads"]) > space.layers:
        return f"it has {len(network['heads'])} layers, and the profile {space.layers}"
    for field, counts in (("heads", space.heads), ("ffn", space.ffn)):
        for count in network[field]:
            if not min(counts) <= count <= max(counts):
                return str(OutsideProfile(field, count, sorted(counts)))
    lengths = [each["seq_len"] for fmt in network["formats"] for each in fmt.get("latencies", ())]
    if lengths:
        least, most = _flops(network, seq_len=lengths[0], shape=space.shape)
        if not least * (1 - FLOPS_TOLERANCE) <= network["flops"] <= most * (1 + FLOPS_TOLERANCE):
            return f"its FLOPs are not those of the profile's hidden size, {space.shape.hidden}"
    return None


def models_of(tables: Sequence[Table]) -> dict[str, LatencyModel]:
    """By format."""
    formats = dict.fromkeys(table["format"] for table in tables)
    return {
        fmt: LatencyModel([table for table in tables if table["format"] == fmt]) for fmt in formats
    }


def files_of_a_job(
    networks: Iterable[Mapping[str, Any]], formats: Container[str], *, head: str
) -> list[dict[str, Any]]:
    """Whole networks of a profile: the files of a job's report, in each of its settings."""
    return [
        {
            **{axis: int(latency[axis]) for axis in AXES},
            "format": fmt["format"],
            "heads": [int(count) for count in network["heads"]],
            "ffn": [int(count) for count in network["ffn"]],
            "head": head,
            "measured_ms": float(latency["p50_ms"]),
            "served": True,
        }
        for network in networks
        for fmt in network["formats"]
        if _is_predicted(fmt, formats)
        for latency in fmt.get("latencies", ())
    ]


def is_within(network: Mapping[str, Any], models: Mapping[str, LatencyModel]) -> bool:
    """Whether the profile says anything of it."""
    try:
        models[network["format"]].predict(network, heads=network["heads"], ffn=network["ffn"])
    except OutsideProfile:
        return False
    return True


def _is_predicted(fmt: Mapping[str, Any], formats: Container[str]) -> bool:
    """Whether all of the file is of blocks that were measured."""
    return fmt["format"] in formats and not fmt.get("fp32_parts")


def device_facts() -> dict[str, Any]:
    """The fields of report.DeviceFingerprint, without what a device of this kind may lack."""
    return {
        "cpu": cpu_name() or platform.processor() or platform.machine(),
        "cores": core_count(),
        "threads": len(os.sched_getaffinity(0)),
        "instruction_sets": list(instruction_sets()),
        "memory_bytes": memory_bytes(),
        "gpus": [],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in ("onnxruntime", "numpy")},
    }


def _flops(network: Mapping[str, Any], *, seq_len: int, shape: Shape) -> tuple[int, int]:
    """Of one row in the profile's shape, without its head and with it; as `cost.flops` counts.

    A report does not name the hidden size: this is what tells it.
    """
    units, neurons = sum(network["heads"]) * shape.head_dim, sum(network["ffn"])
    layers = seq_len * (shape.hidden * (4 * units + 2 * neurons) + 2 * seq_len * units)
    head = shape.hidden * (shape.hidden + seq_len * shape.labels)
    return 2 * layers, 2 * (layers + head)


def _models(
    shape: Shape, setting: Setting, networks: Sequence[Network]
) -> dict[Name, Callable[[], Model]]:
    return {
        ("network", "", i): partial(network.model, shape, setting)
        for i, network in enumerate(networks)
    }


def _timed(
    models: Mapping[Name, Callable[[], Model]],
    shape: Shape,
    setting: Setting,
    *,
    rounds: int,
) -> dict[Name, float]:
    """Median milliseconds of each, by turns, in shuffled order, each after an untimed call, as
    jobs measure latency."""
    # One file after the other: only what the runtime made of it stays in the memory.
    runs = {name: _loaded(make(), shape, setting) for name, make in models.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    order = sorted(runs)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            runs[name]()
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _loaded(model: Model, shape: Shape, setting: Setting) -> Callable[[], Any]:
    """The model, warmed up, with random ids or small random states under a full mask."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting["threads"]
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    sizes = (setting["batch_size"], setting["seq_len"])  # which every file leaves open
    feed: dict[str, npt.NDArray[Any]] = {}
    for each in session.get_inputs():
        if each.type != "tensor(int64)":
            own = (sizes[0], 1, 1, sizes[1]) if each.name == MASK else (*sizes, shape.hidden)
            feed[each.name] = generator.normal(size=own).astype(np.float32)
            continue
        highest = 1 if each.name in (TYPES, "token_type_ids") else shape.vocab_size
        feed[each.name] = generator.integers(0, highest, sizes, dtype=np.int64)
        if each.name in (MASK, "attention_mask"):
            feed[each.name] = np.ones(sizes, np.int64)

    def run() -> Any:
        return session.run(None, feed)

    for _ in range(WARM_UP_CALLS):
        run()
    return run


class _Unusable(Exception):
    """A file that predictions were to be held against is not what it should be."""


@contextmanager
def _reading(path: Path, what: str) -> Iterator[Any]:
    """The file's JSON; _Unusable where there is none, or what is looked for is not in it."""
    try:
        yield json.loads(path.read_text("utf-8"))
    except KeyError as error:
        raise _Unusable(f"{path} is no {what}: it lacks {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _Unusable(f"{path} is no {what}: {error}") from None


def read_bundle(folder: Path, space: Space) -> list[Network]:
    """The files of an unpacked bundle, by what its manifest says of them."""
    with _reading(folder / "manifest.json", "bundle's manifest") as manifest:
        own, formats = manifest["subnetwork"], list(manifest["formats"].values())
        facts = {
            "heads": own["heads"],
            "ffn": own["ffn"],
            "flops": manifest["metrics"]["flops"],
            "formats": formats,
        }
        why = misfit(facts, space)
        head = head_of(manifest["spec"]["task"]["kind"])
        heads, ffn = tuple(own["heads"]), tuple(own["ffn"])
        networks = [
            Network(heads, ffn, fmt["format"], folder / file["path"], head)
            for fmt in formats
            if _is_predicted(fmt, space.formats)
            for file in fmt["files"]
            if file["path"].endswith(".onnx")
        ]
    if why is not None:
        raise _Unusable(f"{folder} cannot be predicted: {why}")
    for file in (network.file for network in networks if network.file is not None):
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise _Unusable(f"{folder} has no file {os.path.relpath(file, folder)}")
    return networks


def read_report(path: Path, space: Space) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Whole networks of a job's report; of those that do not fit the space, name and why."""
    with _reading(path, "job's report") as report:
        reasons = [(network, misfit(network, space)) for network in report["subnetworks"]]
        fitting = [network for network, why in reasons if why is None]
        left_out = [(str(network["name"]), why) for network, why in reasons if why is not None]
        head = head_of(report["spec"]["task"]["kind"])
        return files_of_a_job(fitting, space.formats, head=head), left_out


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m compression profile",
        description=(__doc__ or "").partition("\n")[0],
        epilog="The defaults are MiniLM-L6's.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--hidden", type=_positive, default=384)
    parser.add_argument("--head-dim", type=_positive, default=32)
    parser.add_argument("--vocab-size", type=_positive, default=30522)
    parser.add_argument("--labels", type=_positive, default=2)
    parser.add_argument(
        "--embedding-size", type=_positive, help="where it is not the hidden size (ELECTRA)"
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu")
    parser.add_argument("--layers", type=_positive, default=6)
    parser.add_argument("--heads", type=_positive, nargs="+", default=[3, 6, 9, 12])
    parser.add_argument("--ffn", type=_positive, nargs="+", default=[384, 768, 1152, 1536])
    for name, default in (("--batch-size", 1), ("--seq-len", 64), ("--threads", 1)):
        parser.add_argument(name, type=_positive, nargs="+", default=[default])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--rounds", type=_positive, default=50)
    parser.add_argument(
        "--bundle",
        type=Path,
        nargs="+",
        default=[],
        help="unpacked bundles whose ONNX files are timed and predicted too",
    )
    parser.add_argument("--report", type=Path, help="the report.json of a job on this device")
    options = parser.parse_args(arguments)
    # Now, and not when all is measured.
    _check_limits(parser, options)
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.absolute().parent}")
    if options.out.is_dir() or not os.access(options.out.absolute().parent, os.W_OK):
        parser.error(f"--out: {options.out} cannot be written")
    if options.report is not None and not options.report.is_file():
        parser.error(f"--report: there is no file {options.report}")
    for folder in options.bundle:
        if not (folder / "manifest.json").is_file():
            parser.error(f"--bundle: {folder} is no unpacked bundle: it has no manifest.json")
    return options


def _check_limits(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends where the service would not read what is measured."""
    for axis, (lowest, highest) in LIMITS.items():
        for value in getattr(options, axis):
            if not lowest <= value <= highest:
                parser.error(f"--{axis.replace('_', '-')}: {value} is not {lowest} to {highest}")
    if options.layers > MAX_LAYERS:
        parser.error(f"--layers: {options.layers} is more than {MAX_LAYERS}")
    for name in ("heads", "ffn"):
        if len(getattr(options, name)) > MAX_COUNTS:
            parser.error(f"--{name}: more than {MAX_COUNTS} counts")
    values = {axis: getattr(options, axis) for axis in AXES}
    settings, formats = settings_of(values), len({"onnx", *options.formats})
    tables = formats * len(settings)
    # Four of each format at most, beside the bundles' files.
    networks = (4 * formats + len(FORMATS) * len(options.bundle)) * (
        len(settings) + len(list(settings_between(values)))
    )
    if tables > MAX_TABLES or networks > MAX_NETWORKS:
        parser.error(
            f"these are {len(settings)} combinations of --batch-size, --seq-len and --threads, "
            f"{tables} tables and up to {networks} whole networks, and a profile has at most "
            f"{MAX_TABLES} and {MAX_NETWORKS}: name fewer, or fewer --formats"
        )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to {MAX_COUNT}")
    if not 1 <= (value := int(text)) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{value} is not 1 to {MAX_COUNT}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    shape = Shape(
        options.hidden,
        options.head_dim,
        options.vocab_size,
        options.labels,
        options.embedding_size,
        options.activation,
    )
    formats = tuple(fmt for fmt in FORMATS if fmt in {"onnx", *options.formats})
    space = Space(shape, tuple(options.heads), tuple(options.ffn), options.layers, formats)
    values = {axis: getattr(options, axis) for axis in AXES}
    try:
        exported = [each for folder in options.bundle for each in read_bundle(folder, space)]
        by_a_job, left_out = read_report(options.report, space) if options.report else ([], [])
    except _Unusable as error:
        print(error, file=sys.stderr)
        return 2

    def tell(done: int, total: int) -> None:
        print(f"measuring setting {done + 1} of {total}", file=sys.stderr)

    try:
        tables, networks = measure(
            space,
            values,
            rounds=options.rounds,
            exported=exported,
            on_setting=tell,
        )
    except MemoryError:
        print(
            "the memory is too small for models of this shape: a smaller --batch-size, --layers or "
            "--vocab-size takes less, and so do fewer --heads and --ffn",
            file=sys.stderr,
        )
        return 2
    profile = {
        "widthwise_profile": VERSION,
        "device": device_facts(),
        "shape": vars(shape),
        "layers": space.layers,
        "rounds": options.rounds,
        "tables": tables,
        "networks": networks,
    }
    models = models_of(tables)
    for name, why in left_out:
        print(f"{name:>6} is left out: {why}")
    within = [network for network in by_a_job if is_within(network, models)]
    room = MAX_NETWORKS - len(networks)
    if len(within) > room:
        print(f"of the report's {len(within)} timed files {room} are taken: a profile has no more")
    networks += within[:room]
    options.out.write_text(json.dumps(profile, indent=2) + "\n")
    for fmt, model in models.items():
        own = [each for each in networks if each["format"] == fmt]
        _show(fmt, own, model.errors(own))
    return 0


def _show(fmt: str, networks: Sequence[Mapping[str, Any]], off: Sequence[float]) -> None:
    for network, error in zip(networks, off, strict=True):
        measured = network["measured_ms"]
        heads, ffn = (_each(network[name]) for name in ("heads", "ffn"))
        print(
            f"{fmt}, batch {network['batch_size']}, {network['seq_len']} tokens, "
            f"{network['threads']} thread(s), {len(network['heads'])} layers, heads {heads}, "
            f"neurons {ffn}"
            f"{', exported' if network['served'] else ''}: predicted {measured * (1 + error):.2f} "
            f"ms, measured {measured:.2f} ms ({100 * error:+.0f} %)"
        )
    print(
        f"{fmt}: of {len(off)} whole networks, predictions are {100 * min(off):+.0f} to "
        f"{100 * max(off):+.0f} % off, {100 * statistics.mean(map(abs, off)):.0f} % on average"
    )


def _each(counts: Sequence[int]) -> str:
    """The one count of all layers, or one a layer."""
    return ",".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


if __name__ == "__main__":
    sys.exit(main())
