"""The fingerprint of the machine that measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from compression.fingerprint import fingerprint, gpus
from compression.report import DeviceFingerprint
from compression.runtime_env import instruction_sets, memory_bytes


def test_this_machine_is_described() -> None:
    found = fingerprint(["numpy"])
    assert found.cpu
    assert 1 <= found.cores <= found.threads == len(os.sched_getaffinity(0))
    assert found.memory_bytes is not None and found.memory_bytes > 2**28
    assert set(found.libraries) == {"numpy", "paddlepaddle"}
    assert DeviceFingerprint.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512f sse4_2 avx amx_int8 avx2 avx512_vnni", (
            "sse4_2", "avx", "avx2", "avx512f", "avx512_vnni", "amx_int8",
        )),
        ("Features\t: fp asimd evtstrm asimddp i8mm", ("asimd", "asimddp", "i8mm")),
        ("model name\t: flags : avx", ()),
    ],
)  # fmt: skip
def test_instruction_sets_are_whole_words_of_the_kernels_list(
    tmp_path: Path, line: str, expected: tuple[str, ...]
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert instruction_sets(cpuinfo) == expected


def test_what_the_kernel_does_not_say_is_left_open(tmp_path: Path) -> None:
    assert instruction_sets(tmp_path / "absent") == ()
    assert memory_bytes(tmp_path / "absent") is None
    (tmp_path / "meminfo").write_text("MemTotal:        2048 kB\nMemFree: 1 kB\n")
    assert memory_bytes(tmp_path / "meminfo") == 2 * 2**20


def test_gpus_are_read_with_their_driver() -> None:
    two = "NVIDIA H100, 80GB, 550.54.15, 81559\nTesla T4, 550.54.15, 15360\n\nNo answer, [N/A], x\n"
    found = gpus(lambda: two)
    assert [gpu.name for gpu in found] == ["NVIDIA H100, 80GB", "Tesla T4"]
    assert {gpu.driver for gpu in found} == {"550.54.15"}
    assert found[1].memory_bytes == 15360 * 2**20


@pytest.mark.parametrize(
    "error", [FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(9, "nvidia-smi")]
)
def test_a_machine_without_a_driver_has_no_gpu(error: Exception) -> None:
    def fails() -> str:
        raise error

    assert gpus(fails) == ()
