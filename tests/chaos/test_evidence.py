"""What is read of a store while it changes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.evidence import Stored, read_store


def test_a_folder_that_is_swept_while_the_store_is_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jobs/1/1/report.json", "jobs/2/1/report.json", ".draft#1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    scandir: Callable[[Any], Any] = os.scandir

    def swept(folder: Any) -> Any:
        """The store removes folders that have become empty."""
        if str(folder) == str(tmp_path / "jobs/1"):
            shutil.rmtree(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", swept)
    one = Stored(1, hashlib.sha256(b"x").hexdigest())
    assert read_store(tmp_path) == {"jobs/2/1/report.json": one, ".draft#1": one}
