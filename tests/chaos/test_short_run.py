"""Every fault once, to six jobs: the short form of `make chaos`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.chaos.plan import Kind

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = 6
# Two cores of their own take two to three; a machine that others use is given time.
MINUTES = 9


def test_six_jobs_outlive_every_fault() -> None:
    asked = {"--seed": 1, "--jobs": JOBS, "--faults": len(Kind), "--minutes": MINUTES}
    arguments = [str(each) for pair in asked.items() for each in pair]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES + 30,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["violations"] == [], done.stdout
    assert found["faults_by_kind"] == dict.fromkeys(Kind, 1), done.stdout
    counts = {name: found[name] for name in ("jobs", "ended_once", "lost", "duplicated", "orphans")}
    assert counts == {"jobs": JOBS, "ended_once": JOBS, "lost": 0, "duplicated": 0, "orphans": 0}
    assert found["fitted"] is None, done.stdout
