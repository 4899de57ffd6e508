"""`make demo` with real MiniLM-L6 weights and real reviews, cut down to very few steps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.service import ROOT, WAIT_SECONDS, processes_of
from tools.demo import table
from tools.demo_inputs import Row, distinct_reviews, split

SHORT = (
    *("--train-rows", "320", "--dev-rows", "96", "--test-rows", "64"),
    *("--teacher-steps", "4", "--distil-steps", "2", "--max-drop", "100"),
)


@pytest.mark.timeout(900)
def test_the_demo_goes_from_upload_to_download_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--folder", str(tmp_path / "demo"), *SHORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] == {"train": 320, "dev": 96, "test": 64}
    assert result["widths"] == ["1", "3/4", "1/2", "1/4"]
    assert result["selected"] in result["widths"]
    assert result["accuracy_drop"] <= 100
    assert result["speedup"] > 0
    assert result["parity"] <= 1e-4
    assert result["wall_s"] > 0
    assert result["sha256"] in done.stdout.replace(done.stdout.splitlines()[-1], "")
    assert "none is paddle" in done.stdout
    assert processes_of(tmp_path / "demo/data") == {}


def test_an_interrupted_demo_stops_everything(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.demo", "--folder", str(tmp_path / "demo"), *SHORT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(processes_of(tmp_path / "demo/data")) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "SIGINT" in errors
    assert processes_of(tmp_path / "demo/data") == {}


def test_no_text_of_the_demo_stands_in_two_splits() -> None:
    rows = [
        Row("A fine film.", "fresh"),
        Row("a  FINE film.", "fresh"),
        Row("Both ways.", "fresh"),
        Row("both ways.", "rotten"),
        *(Row(f"review {number}", "rotten") for number in range(40)),
    ]
    distinct = distinct_reviews(rows)
    assert [row.text for row in distinct[:2]] == ["A fine film.", "review 0"]
    splits = split(distinct, sizes={"train": 25, "dev": 10, "test": 6})
    texts = [row.text for part in splits.values() for row in part]
    assert len(texts) == len(set(texts)) == 41
    assert splits == split(distinct, sizes={"train": 25, "dev": 10, "test": 6})
    with pytest.raises(ValueError, match="rows are wanted"):
        split(distinct, sizes={"train": 42})


def test_the_table_gives_a_file_that_rounds_its_own_accuracy() -> None:
    within = [{"confidence": 0.95, "low": 1.0, "high": 3.0}]
    latency = {"p50_ms": 2.0, "p95_ms": 3.0, "p50_intervals": [], "speedup_intervals": []}

    def built(fmt: str, **own: object) -> dict[str, object]:
        figures = {"accuracy": None, "speedup": None, "size_bytes": 0, "latency": latency}
        return {"format": fmt, **figures, **own}

    judged = {"accuracy": 0.7, "accuracy_drop": 2.0, "accuracy_drop_intervals": within}
    report = {
        "teacher": {
            "parameters": 9,
            "accuracy": 0.72,
            "formats": [built("onnx"), built("onnx-int8-static", speedup=2.5)],
        },
        "subnetworks": [
            {
                "width_mult": "1/2",
                "parameters": 5,
                "accuracy": 0.71,
                "accuracy_drop": 1.0,
                "selected": False,
                "formats": [built("onnx"), built("onnx-int8-static", **judged)],
            }
        ],
        "selection": {"format": None},
    }
    _, teacher, rounded_teacher, half, rounded = (
        line.split() for line in table(report).split("\n")
    )
    assert teacher[3:5] == ["0.7200", "+0.00"]
    assert rounded_teacher[2:] == ["9", "2.00", "3.00", "2.50x"]
    assert half[3:5] == ["0.7100", "+1.00"]
    assert rounded[3:7] == ["0.7000", "+2.00", "[+1.0,", "+3.0]"]
