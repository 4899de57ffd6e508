"""Token classification: a tag for every word. Letters: B rows, T tokens, C tags.

A word's tag is read and learnt at its first token (BERT, arXiv:1810.04805, section 5.3);
the word's other tokens and padding are in no loss.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from paddle import Tensor
from paddle.nn import functional as F
from tokenizers import Tokenizer

from compression.alignment import Words, encode_words
from compression.batches import Batch, Encoded
from compression.examples import TaggedExamples, mark_entities
from compression.regression import Judged
from compression.tasks.base import Count, Predictions, Task
from compression.tasks.scores import true_margins

OUTSIDE = "O"
Entity = tuple[str, int, int]  # type, first and last word


@dataclass(frozen=True)
class TaggedWords:
    """What one row is judged by: the numbers of its tags, and the words that have a token."""

    tags: np.ndarray
    words: Words


@dataclass(frozen=True)
class TokenClassification(Task):
    """One of C tags a word. Labels int64 [T_i] a row, counted where a word begins."""

    def count(self, batch: Batch) -> Count:
        return batch.label_mask.sum().clip(min=1.0)  # a batch may hold no word at all

    def decisions(self, predictions: Predictions, data: Encoded) -> Sequence[Hashable]:
        """Each word's tag, row after row."""
        assert data.references is not None
        return [
            tag
            for logits, row in zip(predictions, data.references, strict=True)
            for tag in predicted_tags(logits, row.words, self.labels, words=len(row.tags))
        ]

    def label_loss(self, logits: Tensor, batch: Batch, *, total: Count | None = None) -> Tensor:
        """Cross-entropy of logits [B, T, C] against labels [B, T]."""
        entropies = F.cross_entropy(logits, batch.labels, reduction="none")  # [B, T, 1]
        return self._mean(entropies.squeeze(-1), batch, total)

    def logit_loss(
        self, *, student: Tensor, teacher: Tensor, batch: Batch, total: Count | None = None
    ) -> Tensor:
        """Cross-entropy of the student's logits against the teacher's softmax, [B, T, C]."""
        entropies = -(F.softmax(teacher) * F.log_softmax(student)).sum(axis=-1)  # [B, T]
        return self._mean(entropies, batch, total)

    def _mean(self, entropies: Tensor, batch: Batch, total: Count | None) -> Tensor:
        divisor = self.count(batch) if total is None else total
        return (entropies * batch.label_mask).sum() / divisor

    def outcomes(self, predictions: Predictions, data: Encoded) -> np.ndarray:
        """The `tag_counts` of each row, [rows, 5]; a word that was cut off counts as tagged "O"."""
        assert data.references is not None
        return np.array(
            [
                tag_counts(
                    [self.labels[tag] for tag in row.tags],
                    predicted_tags(logits, row.words, self.labels, words=len(row.tags)),
                )
                for logits, row in zip(predictions, data.references, strict=True)
            ]
        )

    def metrics_of(self, outcomes: np.ndarray) -> dict[str, float]:
        """Over all words of the rows; entities are counted where the labels are tags of them."""
        figures = {"accuracy": word_accuracy(outcomes)}
        if mark_entities(self.labels):
            precision, recall, f1 = entity_scores(outcomes)
            figures |= {"entity_f1": f1, "entity_precision": precision, "entity_recall": recall}
        return figures

    def judged(self, predictions: Predictions, data: Encoded) -> Judged:
        """Of the words that have a token: what was cut off no model has answered."""
        assert data.references is not None
        places = [row.words.positions for row in data.references]
        logits = np.concatenate(
            [own[at] for own, at in zip(predictions, places, strict=True)]
        )  # [U, C]
        tags = np.concatenate([row.tags[row.words.seen] for row in data.references])
        best, truths = logits.argmax(axis=-1), [self.labels[tag] for tag in tags]
        return Judged(
            unit="word",
            rule="right: the word's likeliest tag is the true one; margin: the true tag's logit "
            "over the largest other",
            rows=np.repeat(np.arange(len(places)), [len(at) for at in places]),
            right=best == tags,
            margins=true_margins(logits, tags),
            answers=[self.labels[tag] for tag in best],
            truths=truths,
            labels=[(truth,) for truth in truths],
            words=np.concatenate([row.words.seen for row in data.references]) + 1,
        )

    def encode(self, tokenizer: Tokenizer, examples: TaggedExamples, max_seq_len: int) -> Encoded:
        rows = encode_words(tokenizer, examples.words, max_seq_len)
        masks = [np.zeros(len(row.input_ids), bool) for row in rows]
        for mask, row in zip(masks, rows, strict=True):
            mask[row.positions] = True
        labels = references = None
        if examples.tags is not None:
            labels = [np.zeros(len(row.input_ids), np.int64) for row in rows]
            for own, row, tags in zip(labels, rows, examples.tags, strict=True):
                own[row.positions] = tags[row.seen]
            references = [
                TaggedWords(tags, row) for tags, row in zip(examples.tags, rows, strict=True)
            ]
        return Encoded(
            [row.input_ids for row in rows],
            [row.token_type_ids for row in rows],
            labels,
            masks,
            references,
            sum(row.cut for row in rows),
        )


def predicted_tags(
    logits: np.ndarray, row: Words, labels: Sequence[str], *, words: int
) -> list[str]:
    """The best tag of each of the row's `words` words, from logits [T, C]."""
    tags = [OUTSIDE] * words
    for word, best in zip(row.seen, logits[row.positions].argmax(axis=-1), strict=True):
        tags[word] = labels[best]
    return tags


def entities(tags: Iterable[str]) -> Iterator[Entity]:
    """The entities of one row in IOB1, IOB2 or IOBES, read as conlleval and seqeval read them.

    Tolerant: a word goes on with the entity before it where their types agree, its own tag
    does not begin one (B, S) and the one before does not end one (E, S).
    """
    first, before, kind = 0, "", ""
    position = -1
    for position, tag in enumerate(tags):
        prefix, _, name = tag.partition("-")
        name = name or "_"
        inside = before not in ("", OUTSIDE)
        goes_on = (
            inside and name == kind and prefix not in ("B", "S", OUTSIDE) and before not in "ES"
        )
        if inside and not goes_on:
            yield kind, first, position - 1
        if not goes_on:
            first = position
        before, kind = prefix, name
    if before not in ("", OUTSIDE):
        yield kind, first, position


def tag_counts(gold: Sequence[str], found: Sequence[str]) -> tuple[int, int, int, int, int]:
    """Of one row: words with the right tag, words; entities hit, given and wanted.

    An entity is hit where type, first and last word agree.
    """
    wanted, given = set(entities(gold)), set(entities(found))
    right = sum(one == other for one, other in zip(gold, found, strict=True))
    return right, len(gold), len(wanted & given), len(given), len(wanted)


def entity_scores(counts: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 over the entities of all rows (micro average), 0..1.

    From the `tag_counts` of each row, [rows, 5]. 0 where nothing can be counted.
    """
    _, _, hit, given, wanted = counts.sum(axis=0).tolist()
    precision = hit / given if given else 0.0
    recall = hit / wanted if wanted else 0.0
    return precision, recall, 2 * hit / (wanted + given) if hit else 0.0


def word_accuracy(counts: np.ndarray) -> float:
    """Share of words with the right tag, 0..1, from the `tag_counts` of each row, [rows, 5]."""
    right, words, *_ = counts.sum(axis=0).tolist()
    return right / words
