"""What a job needs to go on after a crash, in files that are whole or not there.

A checkpoint is one safetensors file: the job's figures as JSON in its metadata, the tensors of
the stages so far, and its own SHA-256 in its name, so that a damaged one is known without
another file. It is written beside, flushed to the disk and renamed; the newest two are kept.
Never a pickle. Paddle-free: the parent of a training process reads one too, to start the
process with the variables that the job began with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from compression.errors import CheckpointRefused
from compression.runtime_env import cpu_name, paddle_version

KEPT = 2
# benchmarks/host_change.py; see DECISIONS.md, "A resumed job on another kind of host".
HOST_BOUND = (
    "its weights end within rounding, not with the same bits (with another code path of the math "
    "library no weight differed by more than a tenth of the learning rate after 50 steps)"
)
FOLDER = "checkpoints"
_NAME = re.compile(r"(\d{6})\.([0-9a-f]{64})\.safetensors")
_PARTIAL = "partial"
FORMAT = 2  # 1 had the whole word embedding in an unfinished training
_METADATA = "job"
_DTYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64", "<i4": "I32", "|b1": "BOOL"}
# Variables that may change the last bits of a result: threads and which kernels are taken.
_VARIABLES = ("OMP_", "MKL_", "KMP_", "OPENBLAS_", "FLAGS_")

Arrays = Mapping[str, Any]  # numpy arrays, or what numpy.asarray takes (paddle's tensors)


@dataclass(frozen=True)
class StageState:
    """How far one stage has come: `step` of its own steps, and all that it needs to go on.

    Of a finished stage (`done`): what the stages after it need of it.
    """

    step: int = 0
    done: bool = True
    figures: Mapping[str, Any] = field(default_factory=dict)  # what JSON holds
    tensors: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A job between two steps. `stages` in the order in which they were saved last; only the last,
    and a sub-network's own training before a search that is done again, may be unfinished.

    `identity` says of which job: digests of its spec, model and dataset. `host` is where it
    ran (see `host_facts`), `seconds` how long, in all its runs together.
    """

    identity: Mapping[str, str]
    host: Mapping[str, Any]
    seconds: float
    stages: dict[str, StageState]


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk; `stage` and `step` are the newest that it holds."""

    path: Path
    sha256: str
    stage: str
    step: int


def digest(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_snapshot(folder: Path, number: int, snapshot: Snapshot) -> Saved:
    """One file of the format huggingface.co/docs/safetensors, tensor after tensor.

    The library would hold a second copy of all tensors; this one holds a copy of the largest.
    """
    partial = folder / f"{number:06d}.{_PARTIAL}"
    sha256 = hashlib.sha256()
    with partial.open("wb") as file:
        for piece in _pieces(snapshot):
            sha256.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    path = folder / f"{number:06d}.{sha256.hexdigest()}.safetensors"
    partial.rename(path)
    _sync_folder(folder)
    stage = next(reversed(snapshot.stages))
    return Saved(path, sha256.hexdigest(), stage, snapshot.stages[stage].step)


def _pieces(snapshot: Snapshot) -> Iterator[bytes]:
    facts = {
        "format": FORMAT,
        "identity": dict(snapshot.identity),
        "host": dict(snapshot.host),
        "seconds": snapshot.seconds,
        "stages": {
            name: {"step": state.step, "done": state.done, "figures": dict(state.figures)}
            for name, state in snapshot.stages.items()
        },
    }
    header: dict[str, Any] = {"__metadata__": {_METADATA: json.dumps(facts)}}
    tensors = {
        f"{name}/{key}": value
        for name, state in snapshot.stages.items()
        for key, value in state.tensors.items()
    }
    end = 0
    for name, value in tensors.items():
        array = np.asarray(value)
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for value in tensors.values():
        yield np.ascontiguousarray(value).tobytes()


def read_snapshot(path: Path, *, with_tensors: bool = True) -> Snapshot:
    """ValueError, in words, where the file is not what its name says."""
    named = _NAME.fullmatch(path.name)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if named is None or found != named[2]:
        raise ValueError("its digest differs from the one in its name")
    with safe_open(path, framework="np") as file:
        facts = json.loads(file.metadata()[_METADATA])
        if facts.get("format") != FORMAT:
            raise ValueError("another version of the program has written it")
        tensors: dict[str, dict[str, npt.NDArray[Any]]] = {name: {} for name in facts["stages"]}
        for key in file.keys() if with_tensors else ():
            stage, _, name = key.partition("/")
            tensors[stage][name] = file.get_tensor(key)
    stages = {
        name: StageState(**state, tensors=tensors[name]) for name, state in facts["stages"].items()
    }
    return Snapshot(facts["identity"], facts["host"], facts["seconds"], stages)


def newest_snapshot(
    folder: Path, *, with_tensors: bool = True
) -> tuple[Path | None, Snapshot | None, tuple[str, ...]]:
    """The newest good checkpoint of a folder, and a sentence for each damaged newer one."""
    damaged: list[str] = []
    for path in reversed(_files(folder)):
        try:
            return path, read_snapshot(path, with_tensors=with_tensors), tuple(damaged)
        except (ValueError, OSError) as error:
            damaged.append(
                f"checkpoint {path.name[:6]} cannot be used and was passed over: {error}"
            )
    return None, None, tuple(damaged)


def _files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("*.safetensors") if _NAME.fullmatch(path.name))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- where it ran ---------------------------------------------------------------------------


def host_facts(
    environment: Mapping[str, str], *, replicas: int = 1, device: str = "cpu"
) -> dict[str, Any]:
    """What the last bits of a result depend on beside the job itself.

    `environment`: the variables that the training process was started with; `replicas`: into
    how many parts each batch's gradients are cut; `device`: "cpu" or the GPU's model.
    """
    return {
        "cpu": cpu_name(),
        "device": device,
        "replicas": replicas,
        "libraries": {"paddlepaddle": paddle_version(), "numpy": version("numpy")},
        "variables": {
            name: value
            for name, value in sorted(environment.items())
            if name.startswith(_VARIABLES)
        },
    }


def host_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """In words; empty where a job goes on as if it had never stopped."""
    found = [
        f"{name} was {then[name]}, is {now[name]}"
        for name in ("cpu", "device")
        if then[name] != now[name]
    ]
    for kind in ("libraries", "variables"):
        for name in sorted(then[kind].keys() | now[kind].keys()):
            before, after = then[kind].get(name, "unset"), now[kind].get(name, "unset")
            if before != after:
                found.append(f"{name} was {before}, is {after}")
    return tuple(found)


def resumed_variables(folder: Path) -> dict[str, str]:
    """Variables that a job must go on with, to end with the same bits: its checkpoint's.

    Empty without a good checkpoint, or where it comes from another kind of host, whose
    choice need not be good here (another processor, other libraries).
    """
    _, snapshot, _ = newest_snapshot(folder, with_tensors=False)
    if snapshot is None:
        return {}
    here = host_facts({})
    if any(snapshot.host[name] != here[name] for name in ("cpu", "libraries")):
        return {}
    return dict(snapshot.host["variables"])


def resumed_replicas(folder: Path) -> int | None:
    """Into how many parts a job that goes on must cut its batches; None without a checkpoint.

    On any kind of host: each part draws dropout masks of its own, so another number is
    another training and not a matter of rounding.
    """
    _, snapshot, _ = newest_snapshot(folder, with_tensors=False)
    return None if snapshot is None else int(snapshot.host["replicas"])


# --- one job's checkpoints ------------------------------------------------------------------


class Checkpoints:
    """The folder of one job's checkpoints, and the state of its stages so far.

    `every_seconds` is the pause between two checkpoints in mid-stage; `on_saved` hears of
    each. CheckpointRefused where the folder's newest good one is of another job.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, str],
        host: Mapping[str, Any],
        every_seconds: float,
        on_saved: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"*.{_PARTIAL}"):
            leftover.unlink()
        path, snapshot, damaged = newest_snapshot(folder)
        if snapshot is not None:
            _refuse_another_job(snapshot.identity, identity, folder)
        files = _files(folder)
        self._folder = folder
        self._identity = dict(identity)
        self._host = dict(host)
        self._every_seconds = every_seconds
        self._on_saved = on_saved
        self._number = int(files[-1].name[:6]) if files else 0
        self._stages = dict(snapshot.stages) if snapshot else {}
        self._earlier_seconds = snapshot.seconds if snapshot else 0.0
        self._started = self._written = time.monotonic()
        self.newest = path
        self.resumed = next(reversed(self._stages), None)
        self.warnings = damaged
        differences = host_differences(snapshot.host, host) if snapshot else ()
        if differences:
            self.warnings += (
                f"an earlier run of the job was on another kind of host ({'; '.join(differences)})"
                f": {HOST_BOUND}",
            )

    def __getitem__(self, stage: str) -> StageState | None:
        """None where no checkpoint knows of the stage."""
        return self._stages.get(stage)

    def forget(self, stages: Iterable[str]) -> None:
        """The next checkpoint does not have these: stages that the job turned out not to run."""
        for stage in stages:
            self._stages.pop(stage, None)

    @property
    def known(self) -> tuple[str, ...]:
        """The stages that it has a state of, the newest last."""
        return tuple(self._stages)

    @property
    def seconds(self) -> float:
        """How long the job has run, earlier runs up to their last checkpoint included."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._written >= self._every_seconds

    def save(self, stage: str, state: StageState) -> None:
        """Writes a checkpoint with the stage in this state, and removes the third newest.

        Tensors are read now and again at each later checkpoint: a finished stage's must not
        change afterwards.
        """
        self._stages.pop(stage, None)  # it is the newest now, whatever was saved since
        self._stages[stage] = state
        self._number += 1
        snapshot = Snapshot(self._identity, self._host, self.seconds, self._stages)
        saved = write_snapshot(self._folder, self._number, snapshot)
        for path in _files(self._folder)[:-KEPT]:
            path.unlink()
        self.newest = saved.path
        self._written = time.monotonic()
        self._on_saved(saved)


def resumption(checkpoints: Checkpoints) -> str:
    """One sentence: where the job goes on, and what is not as it was; empty at its start."""
    found = [*checkpoints.warnings]
    if checkpoints.resumed is not None:
        state = checkpoints[checkpoints.resumed]
        assert state is not None
        where = (
            f"the end of {checkpoints.resumed}"
            if state.done
            else (f"step {state.step} of {checkpoints.resumed}")
        )
        found.insert(0, f"goes on from {where}")
    return "; ".join(found)


def _refuse_another_job(then: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    differing = [name for name in now if then.get(name) != now[name]]
    if differing:
        raise CheckpointRefused(
            f"the checkpoint in {folder.name} is of another job (not the same: "
            f"{', '.join(differing)}); go on with what it was started with, or start anew in an "
            "empty folder"
        )
