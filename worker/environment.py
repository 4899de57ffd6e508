"""The variables that a job's process trains with: measured once for this machine, then kept."""

from __future__ import annotations

import os
from collections.abc import Mapping

import structlog

from compression.runtime_env import (
    core_count,
    cpu_name,
    cpu_vendor,
    fastest,
    paddle_version,
    training_environment,
)
from jobs.settings import Settings

# Not KMP_: libraries set some of those themselves when they are imported.
_KINDS = ("OMP_", "MKL_", "MALLOC_")

Variables = Mapping[str, str]
log = structlog.get_logger(__name__)


def expected() -> Variables:
    """What is expected to be fastest, unmeasured; what this process was given stays."""
    chosen = training_environment(cpu_count=core_count(), vendor=cpu_vendor())
    return chosen | own(chosen)


def measured(settings: Settings) -> Variables:
    """The same, but measured (some seconds a candidate) and kept in the data folder.

    `settings.measure_training` switches the measurement off. A worker asks before it takes a
    job: a job that trained meanwhile would be measured too.
    """
    if not settings.measure_training:
        return expected()
    choice = fastest(
        settings.data_dir,
        machine=f"{cpu_name()}, {core_count()} cores, paddle {paddle_version()}",
        cores=core_count(),
        vendor=cpu_vendor(),
    )
    mine = own(choice.variables)
    log.info("trains with", **choice.variables | mine, seconds=choice.seconds, own=sorted(mine))
    return choice.variables | mine


def own(chosen: Variables) -> dict[str, str]:
    """What the user has set, of these variables and of their kinds: it wins."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in chosen or name.startswith(_KINDS)
    }
