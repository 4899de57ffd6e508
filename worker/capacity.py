"""What one worker may run at once: some jobs on its CPU, and one job a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.devices import Device, Need


@dataclass(frozen=True)
class Grant:
    """A job's share of its worker; `gpus` are places in the worker's list of them, and `numbered`
    says that the job's spec names the first one's."""

    device: Device
    gpus: tuple[int, ...] = ()
    numbered: bool = False


class Capacity:
    """Safe to use from any thread. `gpus` names each GPU as CUDA_VISIBLE_DEVICES does."""

    def __init__(self, slots: int, gpus: Sequence[str] = ()) -> None:
        self.slots = slots
        self.gpus = tuple(gpus)
        self._free_slots = slots
        self._free_gpus = set(range(len(self.gpus)))
        self._lock = threading.Lock()

    @property
    def devices(self) -> frozenset[Device]:
        """What this worker has at all."""
        has = {Device.CPU: self.slots > 0, Device.GPU: bool(self.gpus)}
        return frozenset(device for device, there in has.items() if there)

    def free(self) -> frozenset[Device]:
        """Of which devices there is something left."""
        with self._lock:
            has = {Device.CPU: self._free_slots > 0, Device.GPU: bool(self._free_gpus)}
        return frozenset(device for device, there in has.items() if there)

    def can_ever_hold(self, need: Need) -> bool:
        if need.device == Device.CPU:
            return self.slots > 0
        return (need.first or 0) + need.count <= len(self.gpus)

    def take(self, need: Need) -> Grant | None:
        """None where that much is not free now."""
        with self._lock:
            if need.device == Device.CPU:
                if self._free_slots == 0:
                    return None
                self._free_slots -= 1
                return Grant(Device.CPU)
            if need.first is None:
                wanted = sorted(self._free_gpus)[: need.count]
            else:
                wanted = list(range(need.first, need.first + need.count))
            if len(wanted) < need.count or not self._free_gpus.issuperset(wanted):
                return None
            self._free_gpus.difference_update(wanted)
            return Grant(Device.GPU, tuple(wanted), numbered=need.first is not None)

    def give_back(self, grant: Grant) -> None:
        with self._lock:
            if grant.device == Device.CPU:
                self._free_slots += 1
            self._free_gpus.update(grant.gpus)

    def variables(self, grant: Grant) -> dict[str, str]:
        """For the job's process: it sees its own GPUs alone, and numbers them from 0 on. One whose
        spec names numbers sees all of them, or the numbers would mean others."""
        if not grant.gpus or grant.numbered:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[place] for place in grant.gpus)}
