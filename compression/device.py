"""The device that a job computes on, and how many threads of it share a batch."""

from __future__ import annotations

import os

import paddle

from compression.errors import DeviceUnavailable
from compression.runtime_env import core_count, replica_count
from compression.spec import Spec


def use_device(device: str, *, processes: int = 1, rank: int = 0) -> None:
    """Makes paddle run on "cpu", or on the spec's GPU or the `rank`-th after it.

    DeviceUnavailable where there are not enough for all processes.
    """
    if device == "cpu":
        paddle.set_device("cpu")
        return
    if not paddle.device.is_compiled_with_cuda():
        raise DeviceUnavailable(
            f"the spec asks for device {device}, but this worker's paddle is built for the CPU "
            'alone; use device "cpu", or a worker with a GPU build of paddle',
            pointer="/device",
        )
    first, present = int(device.partition(":")[2] or 0), paddle.device.cuda.device_count()
    if first + processes > present:
        raise DeviceUnavailable(
            f"the spec asks for device {device} and {processes} process(es), but this worker sees "
            f"{present} GPU(s), counted from 0",
            pointer="/device",
        )
    paddle.set_device(f"gpu:{first + rank}")


def device_model(device: str) -> str:
    """ "cpu", or what the GPU in use calls itself."""
    return "cpu" if device == "cpu" else str(paddle.device.cuda.get_device_name())


def own_replicas(spec: Spec) -> int:
    """As many as keep the CPU's cores busy, in all processes; a GPU is kept busy by one."""
    if spec.device != "cpu":
        return 1
    return max(1, replica_count(os.environ, cores=core_count()) // spec.processes)
