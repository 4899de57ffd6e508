"""Logits of an encoder or one of its sub-networks on a whole split."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle

from compression.batches import Encoded, make_batch, sorted_rows
from compression.encoder import Encoder
from compression.intervals import intervals, row_resamples
from compression.report import Intervals
from compression.supernet import Subnetwork
from compression.tasks.base import Task


def predict(
    encoder: Encoder,
    data: Encoded,
    *,
    subnetwork: Subnetwork | None = None,
    batch_size: int = 64,
    threads: int = 1,
) -> np.ndarray | list[np.ndarray]:
    """Logits in the rows' own order: [rows, labels]; of a token head [T_i, labels] a row.

    Without dropout. Threads take turns at the batches; their number changes no bit.
    """
    logits: list[np.ndarray] = [np.empty(0)] * len(data)

    @paddle.no_grad()
    def fill(rows: np.ndarray) -> None:
        batch = make_batch(data, rows, pad_id=encoder.config.pad_token_id)
        found = encoder(*batch.inputs, subnetwork=subnetwork).numpy()
        for row, own in zip(rows, found, strict=True):
            logits[row] = own[: len(data.input_ids[row])] if encoder.config.head == "token" else own

    batches = sorted_rows(data, batch_size=batch_size)
    if threads == 1:
        for rows in batches:
            fill(rows)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, batches))  # a list, so that an error is raised here
    return logits if encoder.config.head == "token" else np.stack(logits)


def resampled_metric(task: Task, outcomes: np.ndarray) -> np.ndarray:
    """The main metric on each resample of the rows, [RESAMPLES]; the same rows for all networks."""
    return np.array(
        [task.metrics_of(outcomes[rows])[task.main_metric] for rows in row_resamples(len(outcomes))]
    )


def drop_intervals(*, reference: np.ndarray, own: np.ndarray) -> Intervals:
    """Where the points lie that `own` loses against `reference`, both a `resampled_metric`.

    Paired: rows that both get right, or both wrong, add nothing to the width.
    """
    return intervals(100 * (reference - own))


def largest_difference(
    one: np.ndarray | Sequence[np.ndarray], other: np.ndarray | Sequence[np.ndarray]
) -> float:
    """Largest |difference| of two predictions of the same rows."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def padded_logits(predictions: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """One array: [rows, labels], or of a token head [rows, T, labels] with zeros at padding."""
    if isinstance(predictions, np.ndarray):
        return predictions
    shape = (len(predictions), max(map(len, predictions)), predictions[0].shape[-1])
    padded = np.zeros(shape, np.float32)
    for i, own in enumerate(predictions):
        padded[i, : len(own)] = own
    return padded
