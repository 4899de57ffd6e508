"""One run: jobs and faults side by side, then peace, then the reckoning."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.checker import Findings, Promises, check, orphans
from tests.chaos.evidence import Evidence, Injected, read_evidence
from tests.chaos.faults import Injector
from tests.chaos.plan import LANES, OF_JOBS, Fault, Kind, make_plan
from tests.chaos.site import CHECKPOINT_SECONDS, DISK, ORPHAN_GRACE_SECONDS, Site
from tests.chaos.user import AT_ONCE, STEPS, User

TICK_SECONDS = 0.7
LEAD = 6  # jobs that faults may be ahead of: little is lost of what has hardly begun
# In peace what was begun ends, and then what nobody will want is swept from the store.
PEACE_SECONDS = 180.0
SWEEP_SECONDS = ORPHAN_GRACE_SECONDS + 15.0
PROMISES = Promises(
    steps=STEPS,
    interval_seconds=CHECKPOINT_SECONDS,
    kept_seconds=ORPHAN_GRACE_SECONDS - 1,
)


@dataclass(frozen=True)
class Options:
    seed: int
    jobs: int
    faults: int
    minutes: float


@dataclass(frozen=True)
class Outcome:
    """`fitted`: in words, where not all that was asked for did."""

    options: Options
    findings: Findings
    injected: list[Injected]
    retries: int
    seconds: float
    fitted: str | None

    def as_json(self) -> dict[str, Any]:
        """The counts first, what else is worth knowing after them."""
        found = self.findings
        kinds = Counter(each.kind for each in self.injected)
        return {
            "jobs": found.jobs,
            "faults": len(self.injected),
            "ended_once": found.ended_once,
            "lost": found.lost,
            "duplicated": found.duplicated,
            "steps_repeated": found.steps_repeated,
            "orphans": found.orphans,
            "violations": list(found.violations),
            "faults_by_kind": {kind.value: kinds[kind] for kind in Kind},
            "runs": found.runs,
            "retries": self.retries,
            "asked": asdict(self.options),
            "minutes": round(self.seconds / 60, 1),
            "disk": DISK,
            "fitted": self.fitted,
        }


def run(options: Options, folder: Path, say: Callable[[str], None]) -> Outcome:
    """Ends within `options.minutes`, whether or not all was done by then; at once, with an error,
    where a fault could not be carried out or what dies is no longer started again."""
    began = time.monotonic()
    whole = 60 * options.minutes
    until = began + whole - PEACE_SECONDS
    with Site(folder) as site:
        user = User(
            site.api_url, site.key, seed=options.seed, jobs=options.jobs, folder=site.folder
        )
        storm = _Storm(options, site, user, say)
        storm.start()
        try:
            while (
                (user.wants_more or not user.has_all or storm.goes_on)
                and not storm.has_failed
                and time.monotonic() < until
            ):
                site.check()
                user.tick(most=storm.jobs_due)
                time.sleep(TICK_SECONDS)
        finally:
            storm.end()
        seconds = time.monotonic() - began
        say(f"{seconds / 60:.1f} min: the faults are over, {user.succeeded} jobs have succeeded")
        user.want_no_more()
        while not user.has_all and time.monotonic() < began + whole - SWEEP_SECONDS:
            user.tick(most=0)
            time.sleep(TICK_SECONDS)
        all_ended = user.has_all
        _await_sweep(site, user, storm)
        wrong = site.stop()
        evidence = _evidence(site, user, storm)
    findings = check(evidence, PROMISES)
    findings = Findings(**{**findings.__dict__, "violations": (*findings.violations, *wrong)})
    return Outcome(
        options=options,
        findings=findings,
        injected=storm.injected,
        retries=user.retries,
        seconds=time.monotonic() - began,
        fitted=what_fitted(options, findings.jobs, len(storm.injected), all_ended=all_ended),
    )


def what_fitted(options: Options, jobs: int, faults: int, *, all_ended: bool) -> str | None:
    """In words, unless all that was asked for did, and ended."""
    if jobs >= options.jobs and faults >= options.faults and all_ended:
        return None
    end = "was brought to its end" if all_ended else "had not all ended when the time was up"
    return (
        f"{jobs} of {options.jobs} jobs and {faults} of {options.faults} faults fitted into "
        f"{options.minutes:g} minutes; what was begun {end}"
    )


class _Storm:
    """Injects the plan's faults, each lane's from a thread of its own, in step with the jobs:
    neither the one nor the other is used up long before."""

    def __init__(
        self, options: Options, site: Site, user: User, say: Callable[[str], None]
    ) -> None:
        self.injected: list[Injected] = []
        self._options = options
        self._site = site
        self._user = user
        self._say = say
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._begun = Counter[Kind]()  # faults that are injected, or are about to be
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name="storm", daemon=True)
            for lane in LANES
        ]
        self._failure: BaseException | None = None

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """What it has broken is whole again afterwards. Raises what ended it, if something did."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    @property
    def goes_on(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    @property
    def jobs_due(self) -> int:
        """How many may be asked for by now. The last one waits for the last fault, as long as there
        are others."""
        jobs, faults = self._options.jobs, self._options.faults
        done = len(self.injected)
        idle = self._user.has_all
        if not self.goes_on or done >= faults - 1:
            return jobs
        due = AT_ONCE + done * jobs // faults
        return min(max(due, len(self._user.asked) + idle), jobs - (not idle))

    def _run(self, lane: frozenset[Kind]) -> None:
        try:
            injector = Injector(self._site, self._stopping)
            for fault in make_plan(self._options.seed, lane):
                if self._stopping.wait(fault.pause):
                    return
                while self._is_ahead():
                    if self._stopping.wait(TICK_SECONDS):
                        return
                if len(self.injected) >= self._options.faults:
                    return
                if self._begins(fault.kind):
                    self._tell(fault, injector.inject(fault))
        except BaseException as failure:
            self._failure = self._failure or failure  # the other lane's may follow from the first

    def _is_ahead(self) -> bool:
        """Enough has been done to the jobs so far: they would otherwise never get on."""
        share = self._options.faults / self._options.jobs
        return len(self.injected) >= (self._user.succeeded + LEAD) * share

    def _begins(self, kind: Kind) -> bool:
        """Not where all that may still come are left to those kinds of which there is none, nor
        where it can find nothing any more, for want of jobs. To such kinds nothing is left, nor to
        any where there are fewer faults than kinds."""
        is_over = self._user.has_all and not self._user.wants_more
        if is_over and kind in OF_JOBS:
            return False
        faults = self._options.faults
        with self._lock:
            left = {each for each in Kind if not self._begun[each]} - {kind}
            if is_over:
                left -= OF_JOBS
            may = self._begun.total() + (len(left) if faults >= len(Kind) else 0) < faults
            self._begun[kind] += may
            return may

    def _tell(self, fault: Fault, done: Injected | None) -> None:
        with self._lock:
            if done is None:
                self._begun[fault.kind] -= 1
                self._say(f"{fault.kind}: nothing to hit")
                return
            self.injected.append(done)
            number = len(self.injected)
        self._say(f"fault {number}, {fault.kind}; {self._user.succeeded} jobs have succeeded")


def _await_sweep(site: Site, user: User, storm: _Storm) -> None:
    """Until reconcilers have deleted what no record names, if they do."""
    deadline = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < deadline:
        found = _evidence(site, user, storm)
        if not (orphans(found) or found.pending or found.checkpoints or found.left):
            return
        time.sleep(1)


def _evidence(site: Site, user: User, storm: _Storm) -> Evidence:
    return read_evidence(
        site.address,
        site.disk.store,
        asked=user.asked,
        injected=list(storm.injected),
        answers=user.answers,
        deaths=site.deaths,
        left=site.left(),
    )
