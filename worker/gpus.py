"""The GPUs that this worker may give to jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from compression.fingerprint import gpus as listed_gpus
from jobs.settings import Settings


def offered_gpus(
    settings: Settings, *, listed: Callable[[], Sequence[object]] = listed_gpus
) -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them: those in that variable, or all; of these as many as
    `settings.worker_gpus` says. Without that setting none for a Paddle that is a CPU's build."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if settings.worker_gpus is not None:
        names = _split(named) if named else [str(n) for n in range(settings.worker_gpus)]
        return tuple(names[: settings.worker_gpus])
    if not _paddle_knows_gpus():
        return ()
    present = len(listed())
    if named is None:
        return tuple(str(number) for number in range(present))
    return tuple(_split(named)) if present else ()


def _split(named: str) -> list[str]:
    return [name.strip() for name in named.split(",") if name.strip()]


def _paddle_knows_gpus() -> bool:
    try:
        return bool(version("paddlepaddle-gpu"))
    except PackageNotFoundError:
        return False
