"""The teacher's answers about every row, computed once and kept in a file over epochs.

Letters: S states a token (the embedding output and each layer's), H hidden size.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from compression.batches import Batch, Encoded, make_batch, sorted_rows
from compression.encoder import Encoder, EncoderStates
from compression.layout import Layout
from compression.teachers.config import EncoderConfig

BATCH = 64
_FILE = "teacher-states.f32"


def states_bytes(config: EncoderConfig, data: Encoded) -> int:
    """What the file of these rows takes."""
    return 4 * int(data.lengths.sum()) * (config.layers + 1) * config.hidden


class KeptStates:
    """States of real tokens, float32 [S, tokens, H] of all rows one after the other, in a file.

    The file is mapped into memory, so what the machine has no room for is read again. Whatever
    batch asks, a row's answer is the same: it comes from batches of like lengths made here.
    """

    def __init__(
        self, data: Encoded, states: np.memmap, logits: list[np.ndarray], starts: np.ndarray
    ) -> None:
        numbers = data.numbers_of(range(len(data)))
        self._place = {int(number): place for place, number in enumerate(numbers)}
        self._states = states
        self._logits = logits  # a row's [C], or of a token head [T_i, C]
        self._starts = starts  # [rows + 1], in tokens

    @classmethod
    def compute(cls, teacher: Encoder, data: Encoded, folder: Path, *, threads: int) -> KeptStates:
        """Asks the teacher about every row. OSError where the disk has no room for the answers."""
        config = teacher.config
        starts = np.concatenate([[0], np.cumsum(data.lengths)])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _FILE
        with path.open("wb") as file:
            # A mapped file that finds the disk full ends the process; this is an error instead.
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, states_bytes(config, data)))
            except OSError:
                path.unlink()  # some file systems keep what there was room for
                raise
        shape = (config.layers + 1, int(starts[-1]), config.hidden)
        states = np.memmap(path, np.float32, "r+", shape=shape)
        logits: list[np.ndarray] = [np.empty(0)] * len(data)

        @paddle.no_grad()
        def fill(rows: np.ndarray) -> None:
            batch = make_batch(data, rows, pad_id=config.pad_token_id)
            found = teacher.encode(*batch.inputs)
            for number, state in enumerate(found.hidden):
                for row, own in zip(rows, state.numpy(), strict=True):
                    start, end = starts[row], starts[row + 1]
                    states[number, start:end] = own[: end - start]
            for row, own in zip(rows, found.logits.numpy(), strict=True):
                tokens = starts[row + 1] - starts[row]
                logits[row] = own[:tokens] if config.head == "token" else own

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, sorted_rows(data, batch_size=BATCH)))
        return cls(data, states, logits, starts)

    def __call__(self, share: Batch, layout: Layout) -> EncoderStates:
        """The answers about a batch of rows of `data`, the states in the layout."""
        places = [self._place[int(number)] for number in share.rows]
        rows, tokens = share.input_ids.shape
        count, _, hidden = self._states.shape
        padded = np.zeros((count, rows, tokens, hidden), np.float32)
        for i, place in enumerate(places):
            start, end = self._starts[place], self._starts[place + 1]
            padded[:, i, : end - start] = self._states[:, start:end]
        return EncoderStates(
            [layout.states(paddle.to_tensor(state)) for state in padded],
            _padded([self._logits[place] for place in places], tokens),
        )


def _padded(logits: list[np.ndarray], tokens: int) -> Tensor:
    """[B, C], or of a token head [B, T, C] with zeros at padding."""
    if logits[0].ndim == 1:
        return paddle.to_tensor(np.stack(logits))
    padded = np.zeros((len(logits), tokens, logits[0].shape[-1]), np.float32)
    for i, own in enumerate(logits):
        padded[i, : len(own)] = own
    return paddle.to_tensor(padded)
