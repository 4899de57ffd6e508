from __future__ import annotations

from jobs.devices import Device, Need, need_of
from worker.capacity import Capacity, Grant

CPU, ONE = Need(Device.CPU), Need(Device.GPU)


def test_what_a_spec_needs() -> None:
    assert need_of({}) == need_of({"device": "cpu", "processes": 4}) == CPU
    assert need_of({"device": "gpu"}) == ONE
    assert need_of({"device": "gpu:0"}) == Need(Device.GPU, first=0)
    assert need_of({"device": "gpu:12", "processes": 2}) == Need(Device.GPU, count=2, first=12)


def test_slots_and_gpus_are_given_out_and_come_back() -> None:
    capacity = Capacity(2, ["0", "1"])
    assert capacity.devices == capacity.free() == {Device.CPU, Device.GPU}
    slots = [capacity.take(CPU) for _ in range(3)]
    assert slots == [Grant(Device.CPU), Grant(Device.CPU), None]
    assert capacity.free() == {Device.GPU}
    first, second = capacity.take(ONE), capacity.take(ONE)
    assert (first, second) == (Grant(Device.GPU, (0,)), Grant(Device.GPU, (1,)))
    assert capacity.take(ONE) is None
    assert capacity.free() == set()
    assert first is not None
    capacity.give_back(first)
    assert capacity.take(Need(Device.GPU, count=2)) is None
    assert capacity.take(Need(Device.GPU, first=1)) is None
    assert capacity.take(Need(Device.GPU, first=0)) == Grant(Device.GPU, (0,), numbered=True)
    capacity.give_back(Grant(Device.CPU))
    assert capacity.free() == {Device.CPU}


def test_several_gpus_are_had_together_or_not_at_all() -> None:
    capacity = Capacity(0, ["a", "b", "c"])
    assert capacity.devices == {Device.GPU}
    assert capacity.take(CPU) is None
    pair = capacity.take(Need(Device.GPU, count=2))
    assert pair == Grant(Device.GPU, (0, 1))
    assert capacity.take(Need(Device.GPU, count=2)) is None
    assert capacity.take(ONE) == Grant(Device.GPU, (2,))


def test_what_will_never_fit_is_told_from_what_must_wait() -> None:
    capacity = Capacity(1, ["0", "1"])
    assert capacity.take(ONE) is not None
    assert capacity.can_ever_hold(Need(Device.GPU, count=2))
    assert capacity.can_ever_hold(Need(Device.GPU, first=1))
    assert not capacity.can_ever_hold(Need(Device.GPU, count=3))
    assert not capacity.can_ever_hold(Need(Device.GPU, count=2, first=1))
    assert not Capacity(0, ["0"]).can_ever_hold(CPU)


def test_a_job_sees_its_own_gpus_alone() -> None:
    capacity = Capacity(1, ["GPU-aa", "GPU-bb", "5"])
    assert capacity.variables(Grant(Device.CPU)) == {}
    assert capacity.variables(Grant(Device.GPU, (0, 2))) == {"CUDA_VISIBLE_DEVICES": "GPU-aa,5"}
    assert capacity.variables(Grant(Device.GPU, (1,), numbered=True)) == {}
