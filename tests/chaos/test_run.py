"""How a run comes to its end: in time, and when a fault cannot be carried out."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos import __main__, run
from tests.chaos.evidence import Injected
from tests.chaos.plan import LANES, OF_JOBS, Fault, Kind, make_plan
from tests.chaos.site import Kept, Site
from tests.e2e import hosts
from tests.e2e.service import ROOT
from tests.services import wait_until


class _Site:
    api_url, key, folder = "http://api", "key", Path()

    def __init__(self, folder: Path) -> None:
        pass

    def __enter__(self) -> _Site:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def check(self) -> None:
        pass


class _User:
    """Wants a job for 300 looks after the first fault, however late that comes."""

    looks = succeeded = 0

    def __init__(self, *told: object, **more: object) -> None:
        _User.looks = 0

    @property
    def wants_more(self) -> bool:
        return _User.looks < 300

    has_all = True
    asked: tuple[str, ...] = ()

    def tick(self, *, most: int) -> None:
        _User.looks += _Injector.has_begun.is_set()


class _Injector:
    has_begun = threading.Event()

    def __init__(self, *told: object) -> None:
        _Injector.has_begun.clear()

    def inject(self, fault: object) -> None:
        _Injector.has_begun.set()
        raise AssertionError("redis-server answers: not within 30 seconds")


def test_a_fault_that_cannot_be_carried_out_ends_the_run_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, stand_in in (("Site", _Site), ("User", _User), ("Injector", _Injector)):
        monkeypatch.setattr(run, name, stand_in)
    monkeypatch.setattr(run, "TICK_SECONDS", 0.01)
    with pytest.raises(AssertionError, match="redis-server answers"):
        run.run(run.Options(1, 1, 9, 75), tmp_path, lambda words: None)
    assert _User.looks < 300


# --- the storm --------------------------------------------------------------------------------


class _Hits:
    """Hits at once, but for the kinds that find nothing."""

    misses: frozenset[Kind] = frozenset()

    def __init__(self, *told: object) -> None:
        pass

    def inject(self, fault: Fault) -> Injected | None:
        time.sleep(0.001)
        return None if fault.kind in self.misses else Injected(fault.kind, 0.0, 0.0)


def storm_of(
    monkeypatch: pytest.MonkeyPatch,
    faults: int,
    user: SimpleNamespace,
    misses: frozenset[Kind] = frozenset(),
) -> run._Storm:
    monkeypatch.setattr(run, "Injector", type("Hits", (_Hits,), {"misses": misses}))
    monkeypatch.setattr(
        run,
        "make_plan",
        lambda *told: (replace(fault, pause=0.001) for fault in make_plan(*told)),
    )
    options = run.Options(1, 5, faults, 75)
    return run._Storm(options, SimpleNamespace(), user, lambda words: None)  # type: ignore[arg-type]


def at_work() -> SimpleNamespace:
    return SimpleNamespace(succeeded=5, wants_more=True, has_all=True)


@pytest.mark.parametrize("faults", [1, len(Kind) - 1, len(Kind), 60])
def test_both_lanes_together_bring_as_many_faults_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, faults: int
) -> None:
    storm = storm_of(monkeypatch, faults, at_work())
    storm.start()
    try:
        wait_until(lambda: not storm.goes_on, "the storm is over", seconds=20)
    finally:
        storm.end()
    kinds = {each.kind for each in storm.injected}
    assert len(storm.injected) == faults
    assert faults < len(Kind) or kinds == set(Kind)


def test_a_lane_that_waits_does_not_keep_the_other_from_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many faults as kinds: each has its place from the beginning, and is drawn once."""
    messages, others = LANES
    comes = threading.Event()

    class Waits(_Hits):
        def inject(self, fault: Fault) -> Injected | None:
            return super().inject(fault) if fault.kind in others or comes.wait(20) else None

    storm = storm_of(monkeypatch, len(Kind), at_work())
    monkeypatch.setattr(run, "Injector", Waits)
    storm.start()
    try:
        wait_until(lambda: len(storm.injected) == len(others), "the others", seconds=20)
        comes.set()
        wait_until(lambda: not storm.goes_on, "the storm is over", seconds=20)
    finally:
        comes.set()
        storm.end()
    kinds = [each.kind for each in storm.injected]
    plan = [fault.kind for fault in islice(make_plan(1, others), len(others))]
    assert kinds[: len(others)] == plan
    assert set(kinds[len(others) :]) == messages


def test_a_lane_leaves_room_for_the_other_as_long_as_there_is_something_to_hit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No message comes once there are no more jobs: then all that is left is the other lane's."""
    user, messages = at_work(), LANES[0]
    storm = storm_of(monkeypatch, 12, user, misses=messages)
    storm.start()
    try:
        wait_until(lambda: len(storm.injected) == 10, "all but two", seconds=20)
        time.sleep(0.1)
        assert len(storm.injected) == 10 and storm.goes_on
        user.wants_more = False
        wait_until(lambda: not storm.goes_on, "the storm is over", seconds=20)
    finally:
        storm.end()
    assert len(storm.injected) == 12
    assert messages.isdisjoint(each.kind for each in storm.injected)


def test_without_jobs_each_kind_that_still_finds_something_has_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = SimpleNamespace(succeeded=5, wants_more=False, has_all=True)
    storm = storm_of(monkeypatch, len(Kind), over)
    storm.start()
    try:
        wait_until(lambda: not storm.goes_on, "the storm is over", seconds=20)
    finally:
        storm.end()
    assert len(storm.injected) == len(Kind)
    assert {each.kind for each in storm.injected} == set(Kind) - OF_JOBS


# --- the end ----------------------------------------------------------------------------------


def test_what_was_begun_has_time_for_its_end() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="from 5"):
        __main__.minutes("4.9")
    assert 60 * __main__.minutes("5") > run.PEACE_SECONDS > 2 * run.SWEEP_SECONDS


def test_what_did_not_end_in_time_is_not_said_to_have_ended() -> None:
    options = run.Options(1, 6, 9, 20)
    assert run.what_fitted(options, 6, 9, all_ended=True) is None
    words = run.what_fitted(options, 6, 8, all_ended=True)
    assert words is not None and words.startswith("6 of 6 jobs and 8 of 9 faults fitted into 20")
    assert words.endswith("what was begun was brought to its end")
    late = run.what_fitted(options, 6, 9, all_ended=False)
    assert late is not None and late.endswith("had not all ended when the time was up")


def test_what_runs_inside_ends_with_who_has_started_it() -> None:
    """A test whose time is up is ended by SIGKILL: nothing else tells the run."""
    program = (
        "import time; from tests.chaos.__main__ import end_with_standard_input as end; end(); "
        "print('runs', flush=True); time.sleep(60)"
    )
    inside = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert inside.stdin is not None and inside.stdout is not None
    assert inside.stdout.readline() == b"runs\n"
    assert inside.poll() is None
    inside.stdin.close()
    assert inside.wait(20) == 1
    inside.stdout.close()


# --- the site ---------------------------------------------------------------------------------


def site_of(*kept: Kept) -> Site:
    """Without servers, and with a keeper that has nothing to keep."""
    site = Site.__new__(Site)
    site.api, *site.workers = kept
    site._stopping = threading.Event()
    site._failure = None
    site._keeper = threading.Thread(target=lambda: None)
    site._keeper.start()
    return site


def kept(name: str, folder: Path, program: str) -> Kept:
    host = hosts.Host(folder / name)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    host._processes.append(process)
    return Kept(name, lambda: process, host)


def test_a_process_that_does_not_stop_or_has_ended_by_itself_is_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hosts, "STOP_SECONDS", 1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    site = site_of(
        kept("deaf", tmp_path, deaf + "print(flush=True); time.sleep(60)"),
        kept("dead", tmp_path, "print(flush=True); raise SystemExit(3)"),
        kept("sound", tmp_path, "import time; print(flush=True); time.sleep(60)"),
    )
    dead = site.workers[0]
    assert dead.process.wait() == 3
    try:
        deaf_words, dead_words = site.stop()
    finally:
        site.api.process.kill()
        site.api.process.wait()
    assert deaf_words.startswith("deaf did not stop: ") and "timed out" in deaf_words
    assert dead_words.startswith("dead ended by itself with 3: ")
    assert site.workers[1].process.returncode == -signal.SIGTERM
    for each in (site.api, *site.workers):
        assert each.process.stdout is not None
        each.process.stdout.close()


def test_a_keeper_that_ends_before_its_time_is_told_of() -> None:
    """Nothing that dies would be started again, and no death be noticed."""

    class Broken:
        def poll(self) -> Any:
            raise OSError("fork: no process left")

    site = Site.__new__(Site)
    site._stopping, site.lock, site._failure = threading.Event(), threading.Lock(), None
    site.api, site.workers = SimpleNamespace(process=Broken()), []  # type: ignore[assignment]
    site._keeper = threading.Thread(target=site._keep)
    site._keeper.start()
    site._keeper.join()
    with pytest.raises(OSError, match="no process left"):
        site.stop()
