"""Metrics of predictions against labels, each 1 at best. Letters: N rows, C labels."""

from __future__ import annotations

import numpy as np


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    """Share of the N rows whose label was found, 0..1."""
    return float((found == labels).mean())


def f1(hits: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """2 hits / (found + wanted), the harmonic mean of precision and recall; 0 of nothing at all.

    Counts of any shape, of that shape.
    """
    total = np.asarray(found + wanted, np.float64)
    return np.divide(2.0 * hits, total, out=np.zeros_like(total), where=total > 0)


def marked_counts(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, ...]:
    """Hits, found and wanted of each label, [C] each, from marks (True or False) [N, C]."""
    return (found & wanted).sum(axis=0), found.sum(axis=0), wanted.sum(axis=0)


def matthews(found: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Matthews correlation of label numbers [N], -1..1 (Gorodkin 2004 for several classes).

    0 where all rows have, or are given, one label: nothing is told apart then.
    """
    table = np.bincount(labels * classes + found, minlength=classes**2).reshape(classes, classes)
    wanted, given, n = table.sum(axis=1), table.sum(axis=0), table.sum()
    covariance = n * np.trace(table) - float(wanted @ given)
    spread = (float(n) ** 2 - float(given @ given)) * (float(n) ** 2 - float(wanted @ wanted))
    return float(covariance / spread**0.5) if spread > 0 else 0.0


def true_margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The true label's logit less the largest other one [N], of logits [N, C], labels [N].

    0 where there is no other label.
    """
    everyone = np.arange(len(labels))
    others = logits.astype(np.float64)
    true = others[everyone, labels].copy()
    others[everyone, labels] = -np.inf
    return true - others.max(axis=1) if logits.shape[1] > 1 else np.zeros(len(labels))


def pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Linear correlation of two [N], -1..1; 0 where one of them does not vary."""
    one, other = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (one, other))
    spread = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / spread if spread > 0 else 0.0


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson correlation of the ranks, equal values having the mean of theirs."""
    return pearson(ranks(one), ranks(other))


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest of [N]; equal values share the mean of the ranks that they take."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
