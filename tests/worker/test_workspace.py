from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.workspace import remove_leftovers, workspace

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_folder_goes_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path / "work", "run_a") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "work").iterdir()) == []


def test_only_the_folders_of_the_dead_are_leftovers(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from worker.workspace import workspace\n"
        "with workspace(Path(sys.argv[1]), 'run_dead') as folder:\n"
        "    (folder / 'file').write_text('x'); os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert (tmp_path / "run_dead" / "file").exists()
    with workspace(tmp_path, "run_alive") as folder:
        assert remove_leftovers(tmp_path) == ["run_dead"]
        assert folder.is_dir()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run_alive", "run_alive.lock"]


def test_no_work_folder_is_no_leftover(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "absent") == []
