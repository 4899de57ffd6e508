"""The devices that jobs need and workers have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Device(StrEnum):
    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True)
class Need:
    """What one job needs of a worker: a slot on the CPU, or `count` GPUs, from number `first` on
    where the spec names one."""

    device: Device
    count: int = 1
    first: int | None = None


def need_of(spec: Mapping[str, Any]) -> Need:
    """Of a stored spec (compression.spec.Spec: `device`, `processes`)."""
    device, _, number = str(spec.get("device", Device.CPU)).partition(":")
    if device != Device.GPU:
        return Need(Device.CPU)
    return Need(Device.GPU, int(spec.get("processes", 1)), int(number) if number else None)
