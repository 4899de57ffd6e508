"""The environment variables that paddle runs fastest with, chosen before paddle is imported.

Some help on every machine that was tried; how many threads a kernel should have, and
which of MKL's code paths to take, depend on the machine: `fastest` measures them once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
MEASURED = Path("training-environment.json")  # in the folder that keeps the choice
MKL_ON_AMD = "5"  # of MKL_DEBUG_CPU_TYPE
_MEASURE_SECONDS = 120  # longest for one candidate
_REPOSITORY = Path(__file__).resolve().parent.parent
# Those that the kernels of ONNX Runtime and oneDNN choose by; /proc/cpuinfo's names.
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # ARM
)

Variables = Mapping[str, str]


def cpu_vendor(cpuinfo: Path = CPUINFO) -> str:
    """ "AuthenticAMD", "GenuineIntel", ...; "" where the kernel does not say."""
    return _first(_cpuinfo("vendor_id", cpuinfo))


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's model name; "" where the kernel does not say.

    Of ARM it mostly does not: then the board's, or the numbers of the cores' designs.
    """
    for field in ("model name", "Model", "Hardware"):
        if name := _first(_cpuinfo(field, cpuinfo)):
            return name
    implementers, parts = (_cpuinfo(f"CPU {field}", cpuinfo) for field in ("implementer", "part"))
    designs = dict.fromkeys(zip(implementers, parts, strict=False))
    return ", ".join(f"implementer {who} part {what}" for who, what in designs)


def paddle_version() -> str:
    """Of the CPU's or the GPU's build, which are distributions of two names."""
    try:
        return version("paddlepaddle")
    except PackageNotFoundError:
        return version("paddlepaddle-gpu")


def core_count(cpuinfo: Path = CPUINFO, usable: set[int] | None = None) -> int:
    """Physical cores among the processors that this process may use, at least 1.

    Two threads of one core share its arithmetic: matrix products gain nothing from both.
    """
    usable = os.sched_getaffinity(0) if usable is None else usable
    numbers, sockets, cores = (
        _cpuinfo(field, cpuinfo) for field in ("processor", "physical id", "core id")
    )
    if not numbers or not len(numbers) == len(sockets) == len(cores):
        return max(1, len(usable))  # a kernel that does not tell them apart
    each = {
        (socket, core)
        for number, socket, core in zip(numbers, sockets, cores, strict=True)
        if int(number) in usable
    }
    return max(1, len(each))


def instruction_sets(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """Those of INSTRUCTION_SETS that the processor has; none where the kernel does not say."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return ()
    present = set(match[1].split()) if match else set()
    return tuple(name for name in INSTRUCTION_SETS if name in present)


def memory_bytes(meminfo: Path = MEMINFO) -> int | None:
    """The machine's memory; None where the kernel does not say."""
    try:
        match = re.search(r"^MemTotal:\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(match[1]) if match else None


def _cpuinfo(field: str, cpuinfo: Path) -> list[str]:
    """The field's value for each processor that states it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    parts = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in parts if name.strip() == field]


def _first(values: Sequence[str]) -> str:
    return values[0] if values else ""


def training_environment(*, cpu_count: int, vendor: str) -> dict[str, str]:
    """Variables to set before a process that trains imports paddle; unmeasured, see `fastest`.

    One thread a kernel: the cores are kept busy by replicas (`replica_count`). What each
    is worth stands in DECISIONS.md.
    """
    environment = _with_threads(1)
    if vendor == "AuthenticAMD":
        # The MKL in paddle's wheel takes its slow path on AMD unless told what there is.
        environment["MKL_DEBUG_CPU_TYPE"] = MKL_ON_AMD
    return environment


def _with_threads(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PIP_NO_INDEX": "1",  # paddle2onnx's optimizer would otherwise run pip install
        "GLOG_minloglevel": "2",
        **_FOR_TRAINING,
    }


_FOR_TRAINING = {
    # Transposes make copies with paddle's transpose kernel instead of views, which every
    # product would copy with a kernel that is twenty times slower.
    "FLAGS_use_stride_kernel": "0",
    # glibc gives large blocks back to the kernel at once and gets them again, zeroed,
    # page by page: half of the time of an element-wise operation.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_ARENA_MAX": "1",
}


def serving_environment(environment: Variables) -> dict[str, str]:
    """`environment` without what training set: nobody who serves a file has that.

    What was set to another value is the host's own and stays.
    """
    training = {**_FOR_TRAINING, "MKL_DEBUG_CPU_TYPE": MKL_ON_AMD}
    return {name: value for name, value in environment.items() if training.get(name) != value}


def replica_count(environment: Variables, *, cores: int) -> int:
    """Replicas that share a batch: as many as keep the cores busy with OMP_NUM_THREADS each."""
    threads = environment.get("OMP_NUM_THREADS", "")
    return max(1, cores // max(1, int(threads))) if threads.isdecimal() else 1


@dataclass(frozen=True)
class Choice:
    """What was measured: seconds of one training step by candidate, and the fastest's variables."""

    machine: str
    variables: dict[str, str]
    seconds: dict[str, float]


def candidates(*, cores: int, vendor: str) -> dict[str, dict[str, str]]:
    """Environments to choose from, the one that is expected to win first."""
    found = {"replicas": training_environment(cpu_count=cores, vendor=vendor)}
    if cores > 1:
        found["threads"] = found["replicas"] | {
            "OMP_NUM_THREADS": str(cores),
            "MKL_NUM_THREADS": str(cores),
        }
    if vendor == "AuthenticAMD":
        for name in tuple(found):
            plain = {k: v for k, v in found[name].items() if k != "MKL_DEBUG_CPU_TYPE"}
            found[f"{name}, MKL's own path"] = plain
    return found


def fastest(
    keep: Path,
    *,
    machine: str,
    cores: int,
    vendor: str,
    measure: Callable[[Variables], float] | None = None,
) -> Choice:
    """Measures each candidate once and keeps the answer in the folder `keep`.

    A kept answer holds for the same `machine`, whatever string tells it apart. A candidate
    that cannot be measured is passed over; where none can, the first one stands unmeasured.
    """
    path = keep / MEASURED
    if (known := _kept(path)) is not None and known.machine == machine:
        return known
    options = candidates(cores=cores, vendor=vendor)
    seconds: dict[str, float] = {}
    for name, variables in options.items() if len(options) > 1 else ():
        try:
            seconds[name] = (measure or measured_seconds)(variables)
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
    best = min(seconds, key=lambda name: seconds[name]) if seconds else next(iter(options))
    choice = Choice(machine, options[best], seconds)
    keep.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(choice)))
    unfinished.replace(path)
    return choice


def measured_seconds(variables: Variables) -> float:
    """Of one training step of a small supernet, in a fresh process with these variables."""
    done = subprocess.run(
        [sys.executable, "-m", "compression.calibration"],
        cwd=_REPOSITORY,
        env={"PATH": os.environ.get("PATH", ""), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=_MEASURE_SECONDS,
        check=True,
        text=True,
    )
    return float(done.stdout)


def _kept(path: Path) -> Choice | None:
    try:
        data = json.loads(path.read_text())
        return Choice(str(data["machine"]), dict(data["variables"]), dict(data["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
