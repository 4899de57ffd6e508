"""The variables that a job's process trains with: measured once for this machine, then kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version

import structlog

from compression.runtime_env import core_count, cpu_name, cpu_vendor, fastest, training_environment
from jobs.settings import Settings

Variables = Mapping[str, str]
log = structlog.get_logger(__name__)


def expected() -> Variables:
    """What is expected to be fastest, unmeasured; what this process was given stays."""
    chosen = training_environment(cpu_count=core_count(), vendor=cpu_vendor())
    return chosen | own(chosen)


def measured(settings: Settings) -> Callable[[], Variables]:
    """The same, but measured when it is first asked for (some seconds a candidate).

    The answer is kept in the data folder, and in `settings.measure_training` it can be
    switched off.
    """
    lock = threading.Lock()

    def variables() -> Variables:
        if not settings.measure_training:
            return expected()
        with lock:  # the slots of one worker ask at once
            choice = fastest(
                settings.data_dir,
                machine=f"{cpu_name()}, {core_count()} cores, paddle {version('paddlepaddle')}",
                cores=core_count(),
                vendor=cpu_vendor(),
            )
        mine = own(choice.variables)
        log.info("trains with", **choice.variables | mine, seconds=choice.seconds, own=sorted(mine))
        return choice.variables | mine

    return variables


def own(chosen: Variables) -> dict[str, str]:
    """Those of the variables that the user has set: they win."""
    return {name: os.environ[name] for name in chosen if name in os.environ}
