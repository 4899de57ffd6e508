"""Latency of served files, measured so that ratios survive a noisy machine.

One fresh process a format (`python -m compression.latency`) holds that format's
candidates, the teacher's among them, each in its own loaded runtime as it will be
served. Rounds alternate: in each round every candidate of every format is timed
once, in a shuffled order, while all other processes wait. So a slow minute of the
machine is spread over all of them. Each timed call follows an untimed one of the
same model: without it the small models looked up to 12 % slower than they serve,
for want of the caches that a neighbour had filled. Measured on the CPU.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportFailed
from compression.export import EXPORTERS, INPUTS
from compression.export.fresh import (
    IMPORT_ROOT,
    fresh_command,
    fresh_environment,
    last_lines,
    runtime_libraries,
)
from compression.report import LatencyReport
from compression.spec import Format, LatencySpec

WARM_UP_CALLS = 5  # untimed; oneDNN and ONNX Runtime settle their buffers within the first two
TIMEOUT_S = 900.0  # for each answer: how long a whole measurement takes is the spec's choice
EXIT_S = 10.0
OnRound = Callable[[int, int], None]


@dataclass(frozen=True)
class Served:
    """One exported model: a format and the folder that holds its files."""

    format: Format
    folder: Path


def measure(
    served: Mapping[str, Served],
    spec: LatencySpec,
    *,
    seq_len: int,
    vocab_size: int,
    timeout_s: float = TIMEOUT_S,
    on_round: OnRound | None = None,
) -> dict[str, LatencyReport]:
    """Percentiles of `spec.rounds` timed calls of each candidate, in milliseconds.

    Every call gets the same random token ids, [batch_size, seq_len], under a full
    attention mask; copying them in and the logits out counts. Percentiles are
    nearest-rank: the smallest measured time that at least that share of calls kept.
    ExportFailed, with its process's last lines, when one cannot be loaded or run, or
    when a round (or the loading) of one format takes more than `timeout_s`.
    """
    formats = sorted({item.format for item in served.values()})
    seconds: dict[str, list[float]] = {name: [] for name in served}
    with ExitStack() as stack:
        drivers = [
            stack.enter_context(
                _Driver(
                    fmt,
                    {name: item.folder for name, item in served.items() if item.format == fmt},
                    spec,
                    seq_len=seq_len,
                    vocab_size=vocab_size,
                    timeout_s=timeout_s,
                )
            )
            for fmt in formats
        ]
        for driver in drivers:  # loaded one after the other: a load next to it slows nothing down
            driver.start()
        for number in range(spec.rounds):
            for driver in drivers:
                for name, value in driver.ask({"round": number}).items():
                    seconds[name].append(value)
            if on_round is not None:
                on_round(number + 1, spec.rounds)
    return {
        name: LatencyReport(
            p50_ms=percentile(values, 0.50) * 1e3,
            p95_ms=percentile(values, 0.95) * 1e3,
            p99_ms=percentile(values, 0.99) * 1e3,
            rounds=spec.rounds,
            batch_size=spec.batch_size,
            seq_len=seq_len,
            threads=spec.threads,
        )
        for name, values in seconds.items()
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank: the smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    rank = math.ceil(share * len(ordered) - 1e-9)  # 0.55 * 100 is a little more than 55
    return ordered[max(rank, 1) - 1]


def p95_length(lengths: Sequence[int]) -> int:
    """The length that 95 % of rows do not exceed: what `seq_len` is unless set."""
    return int(percentile(lengths, 0.95))


class _Driver:
    """The measuring process of one format, from this side."""

    def __init__(
        self,
        fmt: Format,
        folders: Mapping[str, Path],
        spec: LatencySpec,
        *,
        seq_len: int,
        vocab_size: int,
        timeout_s: float,
    ) -> None:
        self._format = fmt
        self._threads = spec.threads
        self._timeout_s = timeout_s
        self._timed_out = False
        self._request = {
            "format": fmt,
            "folders": {name: str(folder.resolve()) for name, folder in folders.items()},
            "batch_size": spec.batch_size,
            "seq_len": seq_len,
            "threads": spec.threads,
            "vocab_size": vocab_size,
        }

    def __enter__(self) -> _Driver:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            fresh_command("compression.latency"),
            cwd=IMPORT_ROOT,
            env=fresh_environment(
                {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Nothing in it is worth saving, and a runtime's shutdown may take seconds.
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def start(self) -> None:
        self.ask(self._request)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends one line, waits for one line."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(self._timeout_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:  # a broken pipe, or an empty line at its end
            raise ExportFailed(self._what_happened()) from error
        finally:
            timer.cancel()
        return answer

    def _expire(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _what_happened(self) -> str:
        if self._timed_out:
            return f"measuring {self._format} took longer than {self._timeout_s:g} seconds"
        try:  # it has closed its end, so it is about to end by itself, with a status that says why
            status = self._process.wait(timeout=EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace")
        return f"measuring {self._format} ended with status {status}: {last_lines(text)}"


def token_ids(*, batch_size: int, seq_len: int, vocab_size: int) -> dict[str, NDArray[np.int64]]:
    """The fixed input of every call: arrays [batch_size, seq_len] by input name."""
    shape = (batch_size, seq_len)
    ids = np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int64)
    values = (ids, np.zeros(shape, np.int64), np.ones(shape, np.int64))
    return dict(zip(INPUTS, values, strict=True))


def main() -> None:
    """The measuring process: one JSON line in, one out, until standard input ends."""
    # Runtimes print; what they print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    exporter = EXPORTERS[request["format"]]
    batch = token_ids(
        batch_size=request["batch_size"],
        seq_len=request["seq_len"],
        vocab_size=request["vocab_size"],
    )
    runs = {}
    for name, folder in request["folders"].items():
        runs[name] = exporter.load(Path(folder), threads=request["threads"])
        for _ in range(WARM_UP_CALLS):
            runs[name](batch)
    gc.collect()
    gc.disable()
    answer({"ready": sorted(runs), "libraries": runtime_libraries()})
    for line in sys.stdin:
        # A fixed order would give each candidate the same neighbour's caches every time.
        order = sorted(runs)
        random.Random(json.loads(line)["round"]).shuffle(order)
        seconds = {}
        for name in order:
            run = runs[name]
            run(batch)  # brings this model's weights back into the caches, as a server has them
            started = time.perf_counter()
            run(batch)
            seconds[name] = time.perf_counter() - started
        answer(seconds)


if __name__ == "__main__":
    main()
