"""One compression job from upload to download, on real input: `make demo`.

Starts the API and a worker in the embedded profile on a free port, speaks to them over REST
alone, and stops both whatever happens. Standard library only. The last line of standard output
is one JSON object.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools import demo_inputs
from tools.rest import ApiError, Client
from tools.serve import (
    ROOT,
    WORKER_PYTHON,
    Address,
    CannotStart,
    Interrupted,
    ServiceDied,
    Supervisor,
    free_port,
    stop_on_signals,
)

SENTENCES = (
    "A warm, witty and beautifully acted film that stays with you for days.",
    "Two hours of noise in search of a story, and it never finds one.",
    "The plot is thin, but the leads are so charming that you forgive it everything.",
)
# Run by the worker environment's interpreter, which has paddle: that it is not imported is
# therefore a fact about the bundle and not about the environment.
CLASSIFY = """
import contextlib, io, json, runpy, sys
output = io.StringIO()
sys.argv = [sys.argv[1], *sys.argv[2:]]
with contextlib.redirect_stdout(output):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
paddle = sorted(name for name in sys.modules if name.split(".")[0].startswith("paddle"))
print(json.dumps({"output": output.getvalue(), "paddle": paddle, "modules": len(sys.modules)}))
"""


CONFIDENCE = 0.95  # of the intervals that the table shows


class DemoFailed(Exception):
    """The demo found something that is not as it should be."""


def job_spec(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "task": {"kind": "classification", "text": "text", "label": "label", "max_seq_len": 64},
        "teacher": {"when": "always", "max_steps": options.teacher_steps},
        "importance": {"split": "train", "rows": 512},
        "supernet": {"width_mults": ["1", "3/4", "1/2", "1/4"]},
        # So few steps learn more from the hidden states than the paper's weight of 0.1 lets them.
        "distillation": {"max_steps": options.distil_steps, "lambda_rep": 1.0},
        "constraints": {"max_accuracy_drop": options.max_drop},
        "seed": 0,
    }


class ProgressView:
    """One line, redrawn, on a terminal; elsewhere one as a stage ends and one now and then."""

    SILENCE_SECONDS = 15.0

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._stage = ""
        self._stage_started = self._last_line = time.monotonic()
        self._open = False  # a redrawn line is on the screen, without a newline

    def show(self, event: dict[str, Any]) -> None:
        kind, data = event["kind"], event["data"]
        if kind != "progress":
            self.note(f"job {kind}")
            return
        stage, step, total = data["stage"], data["step"], data["total"]
        now = time.monotonic()
        last = step >= total
        if stage != self._stage:
            self._stage, self._stage_started = stage, now
        line = self._line(data, now - self._stage_started)
        if self._terminal:
            print(f"\r\x1b[2K{line}", end="" if not last else "\n", flush=True)
            self._open = not last
        elif last or now - self._last_line > self.SILENCE_SECONDS:
            print(line, flush=True)
            self._last_line = now

    def note(self, line: str) -> None:
        self.close()
        print(line, flush=True)
        self._last_line = time.monotonic()

    def close(self) -> None:
        if self._open:
            print()
            self._open = False

    @staticmethod
    def _line(data: dict[str, Any], seconds: float) -> str:
        step, total = data["step"], data["total"]
        bar = ""
        if total > 1:
            filled = round(20 * step / total)
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] {step}/{total} "
        figures = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in (data.get("figures") or {}).items()
            if isinstance(value, int | float | str)
        )
        line = f"  {data['stage']:<10} {bar}{seconds:5.0f} s  {data.get('message', '')} {figures}"
        return line[: shutil.get_terminal_size((200, 24)).columns - 1].rstrip()


def table(report: dict[str, Any]) -> str:
    """The report's measurements: one line for each served format of each network.

    The teacher's are the baselines, what one would do instead. In brackets: where the figure lies
    with 95 % confidence.
    """
    head = (
        *("width", "format", "parameters", "MB", "dev acc", "drop", "p50 ms", "p95 ms"),
        *("speed-up", "Pareto", "selected"),
    )
    teacher = report["teacher"]
    rows = [head, *_rows("teacher", {**teacher, "accuracy_drop": 0.0}, None)]
    for network in report["subnetworks"]:
        chosen = report["selection"]["format"] if network["selected"] else None
        rows += _rows(network["width_mult"], network, chosen)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _rows(name: str, network: dict[str, Any], chosen: str | None) -> Iterator[tuple[str, ...]]:
    for built in network["formats"]:
        if not (latency := built["latency"]):
            continue
        yield (
            name,
            built["format"],
            f"{network['parameters']:,}",
            f"{built['size_bytes'] / 1e6:.1f}" if built["size_bytes"] else "",
            *_on_dev(network, built),
            f"{latency['p50_ms']:.2f}" + _within(latency["p50_intervals"], ".2f"),
            f"{latency['p95_ms']:.2f}",
            f"{built['speedup']:.2f}x" + _within(latency["speedup_intervals"], ".2f")
            if built["speedup"]
            else "",
            "yes" if network.get("pareto") else "",
            "<--" if chosen == built["format"] else "",
        )


def _judged(network: dict[str, Any], built: dict[str, Any]) -> dict[str, Any]:
    """What holds the file's accuracy: itself where it rounds, else its network."""
    return network if built["accuracy"] is None else built


def _on_dev(network: dict[str, Any], built: dict[str, Any]) -> tuple[str, str]:
    """Accuracy and points lost of one file; empty where it rounds and was not judged."""
    judged = _judged(network, built)
    if judged is network and "int8" in built["format"]:
        return "", ""
    drop = f"{judged['accuracy_drop']:+.2f}"
    return (
        f"{judged['accuracy']:.4f}",
        drop + _within(judged.get("accuracy_drop_intervals", ()), "+.1f"),
    )


def _within(intervals: Sequence[dict[str, float]], digits: str) -> str:
    """ " [3.91, 4.10]": the interval of CONFIDENCE, if there is one."""
    return "".join(
        f" [{each['low']:{digits}}, {each['high']:{digits}}]"
        for each in intervals
        if each["confidence"] == CONFIDENCE
    )


def held_on_test(network: dict[str, Any], metric: str) -> str:
    """How the selected sub-network did on rows that chose nothing."""
    test = network["test"]
    return (
        f"on test: {metric} {test['accuracy']:.4f}, {test['accuracy_drop']:+.2f} points lost"
        f"{_within(test['accuracy_drop_intervals'], '+.1f')} against {test['reference']} "
        f"({test['reference_accuracy']:.4f})"
    )


def unpack(archive: Path, folder: Path) -> None:
    """Extracts a bundle and holds each file against the SHA-256 in its manifest."""
    folder.mkdir(parents=True)
    with tarfile.open(archive, "r:gz") as tar:
        tar.extractall(folder, filter="data")
    (manifest,) = folder.rglob("manifest.json")
    for entry in json.loads(manifest.read_text(encoding="utf-8"))["files"]:
        found = hashlib.sha256((manifest.parent / entry["path"]).read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise DemoFailed(f"{entry['path']} in the bundle is not the file of the manifest")


def classify(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Runs the bundle's predict.py on the sentences: its answers, and how many modules it loaded.

    DemoFailed when paddle is among them, or a file is not as its manifest says.
    """
    (program,) = folder.rglob("predict.py")
    arguments = ["--check", "--json", "--format", "onnx", *SENTENCES]
    done = subprocess.run(
        [WORKER_PYTHON, "-I", "-c", CLASSIFY, str(program), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise DemoFailed(f"predict.py failed:\n{done.stderr.strip()}")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    if told["paddle"]:
        raise DemoFailed(f"predict.py imported {', '.join(told['paddle'][:3])}")
    answers = [json.loads(line) for line in told["output"].splitlines()]
    if len(answers) != len(SENTENCES):
        raise DemoFailed(f"predict.py gave {len(answers)} answers to {len(SENTENCES)} sentences")
    return answers, told["modules"]


def say(line: str) -> None:
    print(line, flush=True)


def run(options: argparse.Namespace, supervisor: Supervisor, folder: Path) -> dict[str, Any]:
    """The demo after its input is there: the final line as an object."""
    inputs = demo_inputs.prepare(
        train=options.train_rows, dev=options.dev_rows, test=options.test_rows, say=say
    )
    rows = {name: len(split) for name, split in inputs.splits.items()}
    say(f"rows: {', '.join(f'{count} {name}' for name, count in rows.items())}, no text in two")
    demo_inputs.pack_model(inputs.model, folder / "minilm-l6.tar.gz")
    demo_inputs.pack_dataset(inputs.splits, folder / "reviews.zip")

    supervisor.start()
    say(f"API and worker run at {supervisor.address.url}; logs in {folder}")
    client = Client(supervisor.address.url, (folder / "data/api_key").read_text().strip())

    model = client.upload("/v1/models", folder / "minilm-l6.tar.gz", name="MiniLM-L6")
    info = model["info"]
    say(
        f"model {model['id']}: {info['family']}, {info['layers']} layers, {info['heads']} heads, "
        f"{info['parameters']:,} parameters; legal widths {', '.join(info['legal_widths'])}"
    )
    dataset = client.upload("/v1/datasets", folder / "reviews.zip", name="Rotten Tomatoes")
    say(f"dataset {dataset['id']}: {dataset['size_bytes']:,} bytes")

    request = {"model": model["id"], "dataset": dataset["id"], "spec": job_spec(options)}
    plan = client.post("/v1/jobs?dry_run=true", request)["plan"]
    say(
        f"dry run: {len(plan['subnetworks'])} sub-networks, "
        f"labels {', '.join(plan['labels'])}; on this budget {options.teacher_steps} steps for the "
        f"teacher and {options.distil_steps} of distillation"
    )
    job = client.post("/v1/jobs", request)
    say(f"job {job['id']}")
    view = ProgressView()
    try:
        for event in client.follow(job["id"], alive=supervisor.check):
            view.show(event)
    finally:
        view.close()
    job = client.get(f"/v1/jobs/{job['id']}")
    if job["state"] != "succeeded":
        raise DemoFailed(f"the job {job['state']}: {json.dumps(job.get('error'))}")

    report = job["report"]
    selection = report["selection"]
    say("\n" + table(report) + "\n")
    say(
        f"real steps: {report['teacher']['fine_tuned_steps']} of fine-tuning, "
        f"{report['distillation_steps']} of distillation at {report['step_seconds']:.2f} s"
    )
    say(selection["reason"])
    for effect in (selection["explanation"] or {"effects": ()})["effects"]:
        say(f"  {effect['words']}")
    name = selection["subnetwork"] or selection["nearest"][0]["subnetwork"]
    network = next(n for n in report["subnetworks"] if n["name"] == name)
    if network["test"]:
        say(held_on_test(network, report["main_metric"]))
    onnx = next(built for built in network["formats"] if built["format"] == "onnx")
    if not onnx["published"]:
        raise DemoFailed(f"the ONNX file was not published: {onnx['error']}")

    artifacts = client.get(f"/v1/jobs/{job['id']}/artifacts")["items"]
    bundle = next(a for a in artifacts if a["path"] == f"{name}/bundle.tar.gz")
    download = client.download(f"/v1/artifacts/{bundle['id']}/content", folder / "bundle.tar.gz")
    if download.sha256 != bundle["sha256"]:
        raise DemoFailed("the artifact's record and its content have different digests")
    say(f"\ndownloaded {name}: {download.size_bytes:,} bytes, sha256 {download.sha256}")
    say("the digest agrees with ETag, Repr-Digest and the artifact's record")
    unpack(download.path, folder / "bundle")
    answers, modules = classify(folder / "bundle")
    say(f"classified with the downloaded ONNX file; of {modules} modules loaded, none is paddle:")
    for answer in answers:
        say(f"  {answer['label']:<7} {answer['probability']:.3f}  {answer['text']}")

    served = selection["format"] or "onnx"
    chosen = next(built for built in network["formats"] if built["format"] == served)
    return {
        "rows": rows,
        "widths": [n["width_mult"] for n in report["subnetworks"]],
        "selected": selection["subnetwork"] and network["width_mult"],
        "accuracy_drop": _judged(network, chosen)["accuracy_drop"],
        "speedup": chosen["speedup"],
        "sha256": download.sha256,
        "parity": max(
            built["parity_max_abs"] for built in network["formats"] if built["published"]
        ),
    }


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """The folder, emptied, and held against a second demo. CannotStart when one is in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CannotStart(f"another demo is running in {folder}") from error
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train-rows", type=int, default=6400)
    parser.add_argument("--dev-rows", type=int, default=800)
    parser.add_argument("--test-rows", type=int, default=800)
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--distil-steps", type=int, default=90)
    parser.add_argument("--max-drop", type=float, default=1.5, help="points, the job's constraint")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "demo", help="is emptied")
    options = parser.parse_args(arguments)

    started = time.monotonic()
    folder: Path = options.folder.resolve()
    # The embedded profile, whatever this shell is set to.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WIDTHWISE_")}
    try:
        with emptied(folder):
            environment["WIDTHWISE_DATA_DIR"] = str(folder / "data")
            address = Address("127.0.0.1", free_port())
            supervisor = Supervisor(address=address, environment=environment, log_dir=folder)
            stop_on_signals(supervisor)
            with supervisor:
                result = run(options, supervisor, folder)
    except Interrupted as stop:
        print(f"\n{stop}: the API and the worker were stopped", file=sys.stderr)
        return 130
    except (
        *(ApiError, CannotStart, DemoFailed, OSError, RuntimeError, ServiceDied, ValueError),
    ) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    result["wall_s"] = round(time.monotonic() - started, 1)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
