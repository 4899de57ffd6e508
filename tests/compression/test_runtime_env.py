"""What the environment of a training is chosen from, how, and that the choice is kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from compression.runtime_env import (
    MEASURED,
    Variables,
    candidates,
    core_count,
    cpu_name,
    cpu_vendor,
    fastest,
    measured_seconds,
    replica_count,
    training_environment,
)

TWO_CORES_FOUR_THREADS = "".join(
    f"processor : {n}\nvendor_id : GenuineIntel\nphysical id : 0\ncore id : {n % 2}\n\n"
    for n in range(4)
)


def choose(folder: Path, seconds: dict[str, float], *, machine: str = "one") -> dict[str, str]:
    """`seconds` by OMP_NUM_THREADS; a missing one cannot be measured."""

    def measure(variables: Variables) -> float:
        try:
            return seconds[variables["OMP_NUM_THREADS"]]
        except KeyError:
            raise subprocess.TimeoutExpired("calibration", 1) from None

    return fastest(
        folder, machine=machine, cores=4, vendor="GenuineIntel", measure=measure
    ).variables


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(TWO_CORES_FOUR_THREADS)
    assert cpu_vendor(cpuinfo) == "GenuineIntel"
    assert core_count(cpuinfo, usable={0, 1, 2, 3}) == 2
    assert core_count(cpuinfo, usable={1, 3}) == 1
    cpuinfo.write_text("processor : 0\nprocessor : 1\n")  # as many virtual machines say it
    assert core_count(cpuinfo, usable={0, 1}) == 2
    assert core_count(tmp_path / "absent", usable={0, 1, 2}) == 3


@pytest.mark.parametrize(
    ("tail", "name"),
    [
        ("", "implementer 0x41 part 0xd03, implementer 0x41 part 0xd09"),
        ("Hardware\t: Kirin970\n", "Kirin970"),
        ("Hardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B\n", "Raspberry Pi 4 Model B"),
        ("model name\t: ARMv7 Processor rev 3 (v7l)\n", "ARMv7 Processor rev 3 (v7l)"),
    ],
)
def test_boards_are_told_apart_where_the_kernel_names_no_processor(
    tmp_path: Path, tail: str, name: str
) -> None:
    cores = [
        f"processor\t: {n}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n"
        for n, part in enumerate(("0xd03", "0xd03", "0xd09"))
    ]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(cores) + tail)
    assert cpu_name(cpuinfo) == name
    assert cpu_name(tmp_path / "absent") == ""


def test_replicas_keep_the_cores_busy() -> None:
    assert replica_count({"OMP_NUM_THREADS": "1"}, cores=4) == 4
    assert replica_count({"OMP_NUM_THREADS": "2"}, cores=4) == 2
    assert replica_count({"OMP_NUM_THREADS": "9"}, cores=4) == 1
    assert replica_count({}, cores=4) == 1
    assert replica_count({"OMP_NUM_THREADS": "many"}, cores=4) == 1


def test_the_fastest_candidate_is_chosen_and_kept_for_its_machine(tmp_path: Path) -> None:
    assert choose(tmp_path, {"1": 2.0, "4": 1.0})["OMP_NUM_THREADS"] == "4"
    assert choose(tmp_path, {"1": 1.0, "4": 2.0})["OMP_NUM_THREADS"] == "4"  # not measured again
    other = choose(tmp_path, {"1": 1.0, "4": 2.0}, machine="two")
    assert other["OMP_NUM_THREADS"] == "1"
    (tmp_path / MEASURED).write_text('{"machine": "two", "variables": 3')  # cut short
    assert choose(tmp_path, {"1": 9.0, "4": 2.0}, machine="two")["OMP_NUM_THREADS"] == "4"


def test_what_cannot_be_measured_is_passed_over(tmp_path: Path) -> None:
    assert choose(tmp_path / "a", {"4": 1.0})["OMP_NUM_THREADS"] == "4"
    assert choose(tmp_path / "b", {})["OMP_NUM_THREADS"] == "1"


def test_amd_is_offered_both_of_mkls_paths_and_one_core_no_threads() -> None:
    offered = candidates(cores=2, vendor="AuthenticAMD")
    assert [each.get("MKL_DEBUG_CPU_TYPE") for each in offered.values()] == ["5", "5", None, None]
    assert [each["OMP_NUM_THREADS"] for each in offered.values()] == ["1", "2", "1", "2"]
    assert len(candidates(cores=1, vendor="GenuineIntel")) == 1


def test_a_candidate_is_measured_in_a_process_of_its_own() -> None:
    assert 0 < measured_seconds(training_environment(cpu_count=1, vendor=cpu_vendor())) < 60
    with pytest.raises(subprocess.CalledProcessError):
        measured_seconds({"PYTHONHOME": "/nowhere"})
