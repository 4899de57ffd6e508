"""Latency of a sub-network as a sum over its layers, fitted to measured ones. Paddle-free.

A call takes a time of its own, and each layer what its heads and its neurons take, wherever it
stands. What runtimes gain or lose between layers is not in the sum: that is the error, which is
told of sub-networks that were measured and not fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compression.supernet import Subnetwork

HELD_OUT_SHARE = 4  # of the measured sub-networks, one in so many is not fitted


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds: of a call, of a layer's attention by its heads, of its FFN by its neurons."""

    call_ms: float
    heads_ms: Mapping[int, float]
    ffn_ms: Mapping[int, float]

    def predict(self, subnetwork: Subnetwork) -> float:
        """Milliseconds of a call. KeyError where a layer has a size that was not fitted."""
        heads = sum(self.heads_ms[count] for count in subnetwork.heads)
        return self.call_ms + heads + sum(self.ffn_ms[count] for count in subnetwork.ffn)


def fit(measured: Sequence[tuple[Subnetwork, float]]) -> LatencyModel:
    """The least relative squares of (sub-network, milliseconds).

    Where layers' parts cannot be told apart (every layer has both) the smallest coefficients are
    taken; what is predicted does not depend on that.
    """
    heads = sorted({count for subnetwork, _ in measured for count in subnetwork.heads})
    ffn = sorted({count for subnetwork, _ in measured for count in subnetwork.ffn})
    rows = np.array(
        [
            [
                1.0,
                *(subnetwork.heads.count(count) for count in heads),
                *(subnetwork.ffn.count(count) for count in ffn),
            ]
            for subnetwork, _ in measured
        ]
    )
    milliseconds = np.array([value for _, value in measured])
    # Divided by what was measured: a tenth of a millisecond matters more to a small network.
    found, *_ = np.linalg.lstsq(
        rows / milliseconds[:, None], np.ones(len(milliseconds)), rcond=None
    )
    call, *parts = found.tolist()
    return LatencyModel(
        call,
        dict(zip(heads, parts[: len(heads)], strict=True)),
        dict(zip(ffn, parts[len(heads) :], strict=True)),
    )


def relative_errors(
    model: LatencyModel, measured: Sequence[tuple[Subnetwork, float]]
) -> list[float]:
    """(predicted - measured) / measured of each."""
    return [model.predict(subnetwork) / value - 1 for subnetwork, value in measured]
