"""Which machine measured: what a latency depends on beside the file that is served."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from compression.report import DeviceFingerprint, Gpu
from compression.runtime_env import CPUINFO, core_count, cpu_name, paddle_version

MEMINFO = Path("/proc/meminfo")
GPU_QUERY = "name,driver_version,memory.total"
QUERY_SECONDS = 20.0
# Those that the kernels of ONNX Runtime and oneDNN choose by; /proc/cpuinfo's names.
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # ARM
)


def fingerprint(libraries: Sequence[str]) -> DeviceFingerprint:
    """Of this machine, with the versions of these installed distributions and paddle's."""
    return DeviceFingerprint(
        cpu=cpu_name() or platform.processor() or platform.machine(),
        cores=core_count(),
        threads=len(os.sched_getaffinity(0)),
        instruction_sets=instruction_sets(),
        memory_bytes=memory_bytes(),
        gpus=gpus(),
        platform=platform.platform(),
        python=platform.python_version(),
        libraries={"paddlepaddle": paddle_version(), **{name: version(name) for name in libraries}},
    )


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


def gpus(query: Callable[[], str] | None = None) -> tuple[Gpu, ...]:
    """NVIDIA's GPUs as nvidia-smi lists them; none where there is no such program."""
    try:
        lines = (query or _nvidia_smi)().splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in lines:
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) == 3 and parts[2].isdecimal():
            name, driver, mebibytes = parts
            found.append(Gpu(name=name, driver=driver, memory_bytes=int(mebibytes) << 20))
    return tuple(found)


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    return subprocess.run(
        [program, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=QUERY_SECONDS,
        check=True,
    ).stdout
