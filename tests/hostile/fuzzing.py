"""schemathesis over the whole OpenAPI document of a running API, with a key, along its links.

    make fuzz ARGS="--examples 300 --seed 7"

The last line is one JSON object: operations, cases, checks that failed. Whatever is in the document
is walked: a new route needs nothing here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from compression.report import (
    CompressionReport,
    DatasetReport,
    Selection,
    SubnetworkReport,
    TeacherReport,
)
from compression.spec import Spec
from jobs.logs import configure_logging
from jobs.roles import Role
from jobs.settings import Settings
from tests.api.conftest import Service, serving

HERE = Path(__file__).resolve().parent
CONFIGURATION = HERE / "schemathesis.toml"
PHASES = "examples,coverage,fuzzing,stateful"


@dataclass(frozen=True)
class Walk:
    """What a run came to. `failures`: by what failed, its title and where; `output`: in words."""

    seed: int
    operations: int
    operations_tested: int
    cases: int
    cases_with_failures: int
    failures: tuple[dict[str, Any], ...]
    errors: tuple[dict[str, Any], ...]
    seconds: float
    exit_code: int
    output: str


def fill(service: Service) -> None:
    """A record of every kind, so that links and ids lead somewhere."""
    subnetwork = SubnetworkReport(
        name="w1", width_mult=Fraction(1), heads=(4, 4), ffn=(64, 64), parameters=1, flops=1,
        accuracy=0.9, accuracy_drop=0.0, formats=(),
    )  # fmt: skip
    report = CompressionReport(
        spec=Spec(),
        dataset=DatasetReport(
            rows={"train": 2}, labels=("0", "1"), label_names=("0", "1"), text="text", label="label"
        ),
        teacher=TeacherReport(family="bert", fine_tuned_steps=0, parameters=1, accuracy=0.9),
        reorder_max_abs=0.0,
        subnetworks=(subnetwork,),
        selection=Selection(subnetwork=None, format=None, reason="Nothing was measured."),
        distillation_steps=1,
        step_seconds=0.1,
        stage_seconds={"distil": 0.1},
        environment={"device": "cpu"},
    )
    claim = service.claim(service.new_job())
    service.add_events(claim, ("progress", {"stage": "distil", "step": 1}))
    for path in ("w1/bundle.tar.gz", "w1/onnx/model.onnx"):
        service.publish(claim, path, b"content " * 1000)
    service.finish(claim, report=report.model_dump(mode="json"))
    service.new_job()  # and one that is queued
    for role in Role:
        service.new_key(role)


def walk(service: Service, folder: Path, *, examples: int, seed: int, phases: str = PHASES) -> Walk:
    """Runs schemathesis in a process of its own, which has the operator's key. `folder`: for its
    reports."""
    fill(service)
    told = folder / "report.json"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIGURATION),
        "run", f"{service.url}/openapi.json",
        "--seed", str(seed), "--max-examples", str(examples), "--phases", phases,
        "--report", "json", "--report-json-path", str(told), "--no-color",
    ]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(HERE.parents[1]),
            "WIDTHWISE_FUZZ_KEY": service.key,
            "WIDTHWISE_FUZZ_IDS": json.dumps(
                {"model": service.model_id, "dataset": service.dataset_id}
            ),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    if not told.exists():
        raise RuntimeError(done.stdout + done.stderr)
    found = json.loads(told.read_text())
    return Walk(
        seed=seed,
        operations=found["operations"]["total"],
        operations_tested=found["operations"]["tested"],
        cases=found["test_cases"]["generated"],
        cases_with_failures=found["test_cases"]["with_failures"],
        failures=tuple(found["failures"]),
        errors=tuple(found["errors"]),
        seconds=round(seconds, 1),
        exit_code=done.returncode,
        output=done.stdout + done.stderr,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=...", description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="of each operation and phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default=PHASES)
    parser.add_argument("--keep", type=Path, help="folder for the data and what schemathesis wrote")
    given = parser.parse_args(arguments)
    folder = (given.keep or Path(tempfile.mkdtemp(prefix="widthwise-fuzz-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    configure_logging(Settings(data_dir=folder / "data", log_level="error"))
    try:
        with serving(folder / "data", rate_limit_per_minute=10**9) as service:
            found = walk(
                service, folder, examples=given.examples, seed=given.seed, phases=given.phases
            )
        print(found.output)
        counts = {name: value for name, value in asdict(found).items() if name != "output"}
        print(json.dumps(counts))
        return found.exit_code
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
