"""Which machine measured: what a latency depends on beside the file that is served."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version

from compression.report import DeviceFingerprint, Gpu
from compression.runtime_env import (
    core_count,
    cpu_name,
    instruction_sets,
    memory_bytes,
    paddle_version,
)
from compression.spec import Spec

GPU_QUERY = "name,driver_version,memory.total"
QUERY_SECONDS = 20.0


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


def environment(spec: Spec, replicas: int, device: DeviceFingerprint) -> dict[str, str]:
    """The device, the libraries and the threads that the figures were measured with."""
    gpus = [f"{gpu.name} (driver {gpu.driver})" for gpu in device.gpus]
    return {
        "device": spec.device,
        "cpu": device.cpu,
        "cores": str(device.cores),
        "instruction_sets": " ".join(device.instruction_sets),
        **({"gpus": ", ".join(gpus)} if gpus else {}),
        "replicas": str(replicas),
        "processes": str(spec.processes),
        "precision": spec.precision,
        "kernel_threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "platform": device.platform,
        "python": device.python,
        **device.libraries,
    }


def libraries(spec: Spec) -> list[str]:
    """Distributions whose version a figure may depend on, beside paddle."""
    names = ["onnxruntime", "paddle2onnx", "numpy", "tokenizers", "safetensors"]
    return names + (["paddleslim", "paddlenlp"] if spec.engine == "paddleslim" else [])


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
