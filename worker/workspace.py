"""Folders of runs on this host: one for each run, locked while its worker lives."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def workspace(work_dir: Path, run_id: str) -> Iterator[Path]:
    """An empty folder of the run's own, gone at the end.

    Its lock falls when this process ends in whatever way, so `remove_leftovers` never
    takes a living run's folder and always gets a dead one's.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = work_dir / f"{run_id}.lock"
    folder = work_dir / run_id
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def remove_leftovers(work_dir: Path) -> list[str]:
    """Deletes the folders of runs whose worker died on this host; their run ids."""
    removed = []
    for lock in sorted(work_dir.glob("*.lock")):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work_dir / lock.stem, ignore_errors=True)
            lock.unlink(missing_ok=True)
            removed.append(lock.stem)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
    return removed
