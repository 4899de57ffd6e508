"""Several processes that train one model: each has a share of every batch.

One is the job's process (rank 0) and decides all that depends on time, on files and on the
user; the others (`compression.rank`) hold the same weights and do the same steps. Gradients
are added up with paddle.distributed: gloo on the CPU, NCCL between GPUs. Everything that is
drawn at random comes from the seed, the step and the rows, so all end with one model's weights.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import distributed

from compression.encoder import Encoder
from compression.errors import RankFailed
from compression.export.fresh import IMPORT_ROOT, fresh_command, last_lines

HOST = "127.0.0.1"
_END_SECONDS = 30.0  # for a process that has nothing left to do, or has lost its peers
_POLL_SECONDS = 0.5
_FAIL_SECONDS = 5.0
LINGER_SECONDS = 20.0  # longer than it takes to find the one that failed


@dataclass(frozen=True)
class Group:
    """The processes of a training as one of them sees it. Alone, every method is the identity.

    `meet` returns once rank 0 has come to the same place, however long that takes: a
    collective operation itself waits for 30 seconds at most with gloo, and rank 0 has
    stages and files of its own in between. The others are never that late.
    """

    rank: int = 0
    count: int = 1
    meet: Callable[[], None] = lambda: None

    @property
    def leads(self) -> bool:
        """Whether this is the job's process."""
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows of a batch: none where there are fewer rows than processes."""
        return rows if self.count == 1 else rows[self.rank :: self.count]

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, in which the sequences are of one length."""
        if self.count == 1:
            return list(values)
        total = paddle.to_tensor(np.array(values, np.float64))
        distributed.all_reduce(total)
        return [float(value) for value in total.numpy()]

    def of_the_first(self, values: Sequence[float]) -> list[float]:
        """The job's process's values, in every process."""
        return self.add_up([value if self.leads else 0.0 for value in values])

    @paddle.no_grad()  # or the gradients, leaves themselves, could not be changed in place
    def add_up_gradients(self, model: Encoder) -> None:
        """Every gradient becomes its sum over all processes; where no process has one, none."""
        if self.count == 1:
            return
        self.meet()
        parameters = model.parameters()
        present = self.add_up([float(each.grad is not None) for each in parameters])
        for parameter, anywhere in zip(parameters, present, strict=True):
            if not anywhere:
                continue
            if parameter.grad is None:
                parameter.grad = paddle.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    @paddle.no_grad()
    def take_from_the_first(self, *models: Encoder) -> None:
        """Every process's weights become those of the job's process."""
        if self.count == 1:
            return
        self.meet()
        for model in models:
            for parameter in model.parameters():
                distributed.broadcast(parameter, src=0)


ALONE = Group()


def join(rank: int, endpoints: Sequence[str], meet: Callable[[], None]) -> Group:
    """Waits for the other processes; once a process, and after its device is chosen.

    `endpoints` are host:port: the first is where all meet, then one for each process.
    """
    book, *own = endpoints
    os.environ.update(
        {
            "PADDLE_MASTER": book,
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(len(own)),
            "PADDLE_CURRENT_ENDPOINT": own[rank],
            "PADDLE_TRAINER_ENDPOINTS": ",".join(own),
        }
    )
    kind, _, number = paddle.get_device().partition(":")
    if kind == "cpu":
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    else:
        os.environ |= {"FLAGS_selected_gpus": number}  # paddle spells it so
    distributed.init_parallel_env()
    return Group(rank, len(own), meet)


class Started:
    """The other processes, as the job's process sees them."""

    def __init__(self, request: Mapping[str, Any], count: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.endpoints = free_endpoints(count + 1)
        self._logs = [folder / f"rank-{rank}.log" for rank in range(1, count)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = threading.Event()
        for rank, log in enumerate(self._logs, start=1):
            with log.open("wb") as errors:
                process = subprocess.Popen(
                    fresh_command("compression.rank", []),
                    cwd=IMPORT_ROOT,
                    env={**os.environ, "WIDTHWISE_RANK_OF": str(os.getpid())},
                    stdin=subprocess.PIPE,
                    stdout=errors,
                    stderr=errors,
                )
            assert process.stdin is not None
            told = {**request, "rank": rank, "endpoints": self.endpoints}
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()
            self._processes.append(process)
        self._watch = threading.Thread(target=self._watch_them, daemon=True)
        self._watch.start()

    def meet(self) -> None:
        """Rank 0's half of `Group.meet`: a line to each of the others."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

    def failure(self) -> RankFailed | None:
        """What a process that failed said; waits a little for one to fail.

        One that only lost its peers ends later (`compression.rank`), so it is not this one.
        """
        deadline = time.monotonic() + _FAIL_SECONDS
        while time.monotonic() < deadline:
            for process, log in zip(self._processes, self._logs, strict=True):
                if process.poll():
                    said = last_lines(log.read_text(errors="replace"))
                    return RankFailed(
                        f"{log.stem.replace('-', ' ')} of the {len(self._logs) + 1} processes "
                        f"that train ended with status {process.returncode}: {said}"
                    )
            time.sleep(0.05)
        return None

    def end(self) -> None:
        """They have nothing left to do; whoever does not end is killed."""
        self._ended.set()
        for process in self._processes:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._close()

    def kill(self) -> None:
        self._ended.set()
        for process in self._processes:
            process.kill()
            process.wait()
        self._close()

    def _close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()

    def _watch_them(self) -> None:
        """gloo tells at once that a peer is gone, NCCL never: then this process ends too."""
        while not self._ended.wait(_POLL_SECONDS):
            if any(process.poll() for process in self._processes):
                if not self._ended.wait(_END_SECONDS):
                    sys.stderr.write(f"{self.failure()}\n")
                    sys.stderr.flush()
                    os._exit(1)
                return


@contextmanager
def started(request: Mapping[str, Any], count: int, folder: Path) -> Iterator[Started | None]:
    """The `count` - 1 other processes of a job, each told `request`; None where it has none.

    On leaving they have ended. RankFailed says what one that failed has said.
    """
    if count == 1:
        yield None
        return
    others = Started(request, count, folder)
    try:
        yield others
    except (RuntimeError, BrokenPipeError) as error:  # a peer is gone
        failure = others.failure()
        if failure is None:
            raise
        raise failure from error
    finally:
        if sys.exception() is None:
            others.end()
        else:
            others.kill()


def free_endpoints(count: int) -> list[str]:
    """Addresses on this host whose ports nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [f"{HOST}:{each.getsockname()[1]}" for each in sockets]
