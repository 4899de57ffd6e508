"""Latency of served files, measured so that ratios survive a noisy machine.

One fresh process a format (`python -m compression.latency`) holds that format's
candidates, the teacher's among them, each in its own loaded runtime as it will be
served, without the variables that training sets. Rounds alternate: in each round
every candidate of every format is timed once, in a shuffled order, while all other
processes wait. So a slow minute of the machine is spread over all of them. Each
timed call follows an untimed one of the same model: without it the small models
looked up to 12 % slower than they serve, for want of the caches that a neighbour
had filled. Measured on the CPU.

Settings are measured one after the other, and a number of threads has processes of
its own, because a runtime takes it when it starts: so what is loaded at once does
not grow with the settings.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportFailed
from compression.export import EXPORTERS, INPUTS
from compression.export.base import Run
from compression.export.fresh import (
    IMPORT_ROOT,
    fresh_command,
    fresh_environment,
    last_lines,
    runtime_libraries,
)
from compression.intervals import intervals, round_resamples
from compression.report import Intervals, LatencyReport
from compression.runtime_env import serving_environment
from compression.spec import Format, LatencySetting, LatencySpec

# Untimed, in each setting; oneDNN and ONNX Runtime settle their buffers within the first two.
WARM_UP_CALLS = 5
TIMEOUT_S = 900.0  # for each answer: how long a whole measurement takes is the spec's choice
EXIT_S = 10.0
SHARES = (0.50, 0.95, 0.99)  # the percentiles that are reported
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
    references: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
    on_round: OnRound | None = None,
) -> dict[str, tuple[LatencyReport, ...]]:
    """Percentiles of the calls that `timed_rounds` times, by candidate, a report for each setting.

    In milliseconds, the setting that stands for the latency first. `references` names for a
    candidate the one that its speed-up is against, both measured in the same rounds.
    Percentiles are nearest-rank: the smallest measured time that at least that share of calls
    kept.
    """
    seconds = timed_rounds(
        served,
        spec,
        seq_len=seq_len,
        vocab_size=vocab_size,
        timeout_s=timeout_s,
        on_round=on_round,
    )
    reports = [summaries(own, setting, references or {}) for setting, own in seconds.items()]
    return {name: tuple(each[name] for each in reports) for name in served}


def timed_rounds(
    served: Mapping[str, Served],
    spec: LatencySpec,
    *,
    seq_len: int,
    vocab_size: int,
    timeout_s: float = TIMEOUT_S,
    on_round: OnRound | None = None,
) -> dict[LatencySetting, dict[str, NDArray[np.float64]]]:
    """Seconds of each candidate's timed calls, [rounds], in each of the spec's settings.

    Every call gets the same random token ids, [batch_size, seq_len], under a full
    attention mask; copying them in and the logits out counts.
    ExportFailed, with its process's last lines, when one cannot be loaded or run, or
    when a round (or the loading) of one format takes more than `timeout_s`.
    """
    settings = spec.settings(seq_len)
    found = {}
    rounds_done = 0

    def on_timed() -> None:
        nonlocal rounds_done
        rounds_done += 1
        if on_round is not None:
            on_round(rounds_done, len(settings) * spec.rounds)

    for threads, own in groupby(settings, key=lambda setting: setting.threads):
        with _loaded(
            served, threads=threads, vocab_size=vocab_size, timeout_s=timeout_s
        ) as drivers:
            for setting in own:
                found[setting] = _timed(drivers, setting, spec.rounds, on_timed)
    return found


@contextmanager
def _loaded(
    served: Mapping[str, Served], *, threads: int, vocab_size: int, timeout_s: float
) -> Iterator[list[_Driver]]:
    """A process a format, each with all of its candidates loaded."""
    with ExitStack() as stack:
        drivers = [
            stack.enter_context(
                _Driver(
                    fmt,
                    {name: item.folder for name, item in served.items() if item.format == fmt},
                    threads=threads,
                    vocab_size=vocab_size,
                    timeout_s=timeout_s,
                )
            )
            for fmt in sorted({item.format for item in served.values()})
        ]
        for driver in drivers:  # loaded one after the other: a load next to it slows nothing down
            driver.start()
        yield drivers


def _timed(
    drivers: Sequence[_Driver], setting: LatencySetting, rounds: int, on_timed: Callable[[], None]
) -> dict[str, NDArray[np.float64]]:
    """Seconds of each candidate's timed call in each round, [rounds]."""
    for driver in drivers:
        driver.ask({"batch_size": setting.batch_size, "seq_len": setting.seq_len})
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        for driver in drivers:
            for name, value in driver.ask({"round": number}).items():
                seconds.setdefault(name, []).append(value)
        on_timed()
    return {name: np.array(values) for name, values in seconds.items()}


def summaries(
    seconds: Mapping[str, NDArray[np.float64]],
    setting: LatencySetting,
    references: Mapping[str, str],
) -> dict[str, LatencyReport]:
    """One setting's reports, from the seconds [rounds] of each candidate.

    All are resampled by the same rounds, so the interval of a speed-up is that of a ratio of
    neighbours in time.
    """
    resampled = {name: resampled_percentiles(own) for name, own in seconds.items()}
    found = {}
    for name, own in seconds.items():
        p50, p95, p99 = (percentile(own.tolist(), share) * 1e3 for share in SHARES)
        within = [intervals(column * 1e3) for column in resampled[name].T]
        reference = references.get(name)
        speedup: float | None = None
        speedup_within: Intervals = ()
        if reference is not None and reference in seconds:
            speedup = percentile(seconds[reference].tolist(), 0.50) * 1e3 / p50
            speedup_within = intervals(resampled[reference][:, 0] / resampled[name][:, 0])
        found[name] = LatencyReport(
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            rounds=len(own),
            batch_size=setting.batch_size,
            seq_len=setting.seq_len,
            threads=setting.threads,
            p50_intervals=within[0],
            p95_intervals=within[1],
            p99_intervals=within[2],
            speedup=speedup,
            speedup_intervals=speedup_within,
        )
    return found


def resampled_percentiles(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The percentiles of SHARES on each resample of the rounds, [resamples, 3]."""
    ranks = [nearest_rank(share, len(seconds)) - 1 for share in SHARES]
    return np.array([np.sort(seconds[rounds])[ranks] for rounds in round_resamples(len(seconds))])


def nearest_rank(share: float, count: int) -> int:
    """From 1: how many of `count` values, in order, are at least `share` of them."""
    return max(math.ceil(share * count - 1e-9), 1)  # 0.55 * 100 is a little more than 55


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank: the smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[nearest_rank(share, len(values)) - 1]


def p95_length(lengths: Sequence[int]) -> int:
    """The length that 95 % of rows do not exceed: what `seq_len` is unless set."""
    return int(percentile(lengths, 0.95))


class _Driver:
    """The measuring process of one format, from this side."""

    def __init__(
        self,
        fmt: Format,
        folders: Mapping[str, Path],
        *,
        threads: int,
        vocab_size: int,
        timeout_s: float,
    ) -> None:
        self._format = fmt
        self._threads = threads
        self._timeout_s = timeout_s
        self._timed_out = False
        self._request = {
            "format": fmt,
            "folders": {name: str(folder.resolve()) for name, folder in folders.items()},
            "threads": threads,
            "vocab_size": vocab_size,
        }

    def __enter__(self) -> _Driver:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            fresh_command("compression.latency"),
            cwd=IMPORT_ROOT,
            env=serving_environment(
                fresh_environment(
                    {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
                )
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
    """The measuring process: one JSON line in, one out, until standard input ends.

    The first says what to load and with how many threads; then either a setting to prepare
    for, or a round to time in it.
    """
    # Runtimes print; what they print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    exporter = EXPORTERS[request["format"]]
    runs = {
        name: exporter.load(Path(folder), threads=request["threads"])
        for name, folder in request["folders"].items()
    }
    gc.disable()
    answer({"ready": sorted(runs), "libraries": runtime_libraries()})
    batch: dict[str, NDArray[np.int64]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "round" in asked:
            answer(_round(runs, batch, number=asked["round"]))
            continue
        batch = token_ids(**asked, vocab_size=request["vocab_size"])
        for run in runs.values():
            for _ in range(WARM_UP_CALLS):
                run(batch)
        gc.collect()
        answer({"warm": sorted(runs)})


def _round(
    runs: Mapping[str, Run], batch: Mapping[str, NDArray[np.int64]], *, number: int
) -> dict[str, float]:
    """Seconds of one call of each."""
    # A fixed order would give each candidate the same neighbour's caches every time.
    order = sorted(runs)
    random.Random(number).shuffle(order)
    seconds = {}
    for name in order:
        run = runs[name]
        run(batch)  # brings this model's weights back into the caches, as a server has them
        started = time.perf_counter()
        run(batch)
        seconds[name] = time.perf_counter() - started
    return seconds


if __name__ == "__main__":
    main()
