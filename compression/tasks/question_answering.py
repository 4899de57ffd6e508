"""Extractive question answering as in BERT (arXiv:1810.04805, section 4.2), by windows.

The head gives each token two logits: that the answer starts there, that it ends there.
A token is a candidate where it belongs to the context, and so is [CLS], which stands for
"not in this window": without it the windows of one context could not be compared.
Letters: B windows, T tokens. Left out: questions without an answer.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import functional as F
from tokenizers import Tokenizer

from compression.alignment import Window, answer_tokens, encode_questions
from compression.batches import Batch, Encoded
from compression.examples import AskedExamples
from compression.regression import Judged
from compression.spec import TaskSpec
from compression.tasks.base import Count, Predictions, Task

EXCLUDED = -1e9  # the logit of tokens that cannot be answers


@dataclass(frozen=True)
class Asked:
    """What one window is judged by: where it lies, and what its question's answers are."""

    window: Window
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Labels int8 [T_i, 2] a window: 1 where the answer starts, 1 where it ends, else 0.

    Both are at [CLS] in a window that does not hold the whole answer. Of several answers
    the first is learnt, and each is right.
    """

    too_long: ClassVar[str] = "a question longer than half of"
    overlap: int
    max_answer_length: int

    @classmethod
    def of(cls, spec: TaskSpec, labels: Sequence[str]) -> QuestionAnswering:
        return cls(tuple(labels), spec.main_metric, spec.overlap, spec.max_answer_length)

    def decisions(self, predictions: Predictions, data: Encoded) -> Sequence[Hashable]:
        """Each question's answer, in the order of the dataset."""
        return [text for text, _ in self._answers(predictions, data).values()]

    def label_loss(self, logits: Tensor, batch: Batch, *, total: Count | None = None) -> Tensor:
        """Cross-entropy of logits [B, T, 2] against labels [B, T, 2]: mean of start and end."""
        return self._mean(batch.labels.astype("float32"), logits, batch, total)

    def logit_loss(
        self, *, student: Tensor, teacher: Tensor, batch: Batch, total: Count | None = None
    ) -> Tensor:
        """Cross-entropy of the student against the teacher over tokens, mean of start and end."""
        return self._mean(paddle.exp(_log_softmax(teacher, batch)), student, batch, total)

    def _mean(self, targets: Tensor, logits: Tensor, batch: Batch, total: Count | None) -> Tensor:
        entropies = -(targets * _log_softmax(logits, batch)).sum(axis=1)  # [B, T, 2] -> [B, 2]
        return entropies.sum() / 2 / (self.count(batch) if total is None else total)

    def outcomes(self, predictions: Predictions, data: Encoded) -> np.ndarray:
        """F1 and exact match of each question, by its windows' best answer, [questions, 2]."""
        found = list(self._answers(predictions, data).values())
        exact = [max(exact_match(text, gold) for gold in golds) for text, golds in found]
        overlap = [max(token_f1(text, gold) for gold in golds) for text, golds in found]
        return np.stack([overlap, exact], axis=1)

    def metrics_of(self, outcomes: np.ndarray) -> dict[str, float]:
        """Means over the questions."""
        f1, exact = outcomes.mean(axis=0).tolist()
        return {"f1": f1, "exact_match": exact}

    def _answers(
        self, predictions: Predictions, data: Encoded
    ) -> dict[int, tuple[str, tuple[str, ...]]]:
        """By row: the best answer of all its windows, and the right ones."""
        assert data.references is not None
        best: dict[int, tuple[float, str]] = {}
        golds: dict[int, tuple[str, ...]] = {}
        for logits, asked in zip(predictions, data.references, strict=True):
            row = asked.window.row
            found = best_answer(logits, asked.window, asked.context, self.max_answer_length)
            best[row] = max(best.get(row, (-np.inf, "")), found, key=lambda pair: pair[0])
            golds[row] = asked.answers
        return {row: (text, golds[row]) for row, (_, text) in best.items()}

    def judged(self, predictions: Predictions, data: Encoded) -> Judged:
        answers = self._answers(predictions, data)
        found = list(answers.values())
        overlap = [max(token_f1(text, gold) for gold in golds) for text, golds in found]
        return Judged(
            unit="question",
            rule="right: the same words as one of the answers; margin: F1 of the words that it "
            "shares with the nearest of them",
            rows=np.fromiter(answers, np.int64, len(answers)),
            right=np.array(
                [any(exact_match(text, gold) for gold in golds) for text, golds in found]
            ),
            margins=np.array(overlap),
            answers=[text for text, _ in found],
            truths=[golds[0] for _, golds in found],
            labels=[()] * len(found),
            are_texts=True,
        )

    def row_lengths(self, data: Encoded) -> np.ndarray:
        """Of each question's longest window."""
        assert data.references is not None
        longest: dict[int, int] = {}
        for length, asked in zip(data.lengths, data.references, strict=True):
            longest[asked.window.row] = max(longest.get(asked.window.row, 0), int(length))
        return np.array([longest[row] for row in sorted(longest)])

    def encode(self, tokenizer: Tokenizer, examples: AskedExamples, max_seq_len: int) -> Encoded:
        """Every window of every question is a row."""
        windows, cut = encode_questions(
            tokenizer,
            examples.questions,
            examples.contexts,
            max_seq_len=max_seq_len,
            overlap=self.overlap,
        )
        masks = [np.zeros(len(window.input_ids), bool) for window in windows]
        for mask, window in zip(masks, windows, strict=True):
            mask[[0, *range(window.first, window.first + len(window.offsets))]] = True
        labels = references = None
        if examples.answers is not None:
            labels = [np.zeros((len(window.input_ids), 2), np.int8) for window in windows]
            for own, window in zip(labels, windows, strict=True):
                text, start = examples.answers[window.row][0]
                start += len(text) - len(text.lstrip())
                tokens = answer_tokens(window, start, start + len(text.strip())) or (0, 0)
                own[tokens, (0, 1)] = 1
            references = [
                Asked(
                    window,
                    examples.contexts[window.row],
                    tuple(answer.text for answer in examples.answers[window.row]),
                )
                for window in windows
            ]
        return Encoded(
            [window.input_ids for window in windows],
            [window.token_type_ids for window in windows],
            labels,
            masks,
            references,
            cut,
        )


def _log_softmax(logits: Tensor, batch: Batch) -> Tensor:
    """Over the candidates among the T tokens of each window; logits [B, T, 2]."""
    mask = batch.label_mask.unsqueeze(-1)  # [B, T, 1]
    return F.log_softmax(logits * mask + (1.0 - mask) * EXCLUDED, axis=1)


def best_answer(
    logits: np.ndarray, window: Window, context: str, max_answer_length: int
) -> tuple[float, str]:
    """(log probability, text) of the best answer in one window, from its logits [T, 2].

    Every first and last token at most `max_answer_length` tokens apart is tried. The
    probabilities are those that the losses see: over the context's tokens and [CLS].
    """
    tokens = len(window.offsets)
    scores = logits[np.r_[0, window.first : window.first + tokens]].astype(np.float64)
    scores = (scores - np.logaddexp.reduce(scores, axis=0))[1:]  # [tokens, 2]
    best, first, last = -np.inf, 0, 0
    for length in range(min(max_answer_length, tokens)):
        both = scores[: tokens - length, 0] + scores[length:, 1]
        start = int(both.argmax())
        if both[start] > best:
            best, first, last = float(both[start]), start, start + length
    if not tokens:
        return best, ""
    return best, context[window.offsets[first, 0] : window.offsets[last, 1]]


# --- metrics --------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def answer_words(text: str) -> list[str]:
    """The words of an answer as SQuAD 1.1 compares them: no case, punctuation or articles.

    In a text with Chinese characters each of them is a word, and punctuation of any
    script is removed, as CMRC 2018 does it.
    """
    text = text.lower()
    if _CHINESE.search(text):
        text = "".join(c for c in text if unicodedata.category(c)[0] not in "PS")
        text = _CHINESE.sub(lambda match: f" {match[0]} ", text)
    else:
        text = "".join(c for c in text if c not in string.punctuation)
    return _ARTICLES.sub(" ", text).split()


def exact_match(found: str, gold: str) -> float:
    """1 where both answers have the same words, else 0."""
    return float(answer_words(found) == answer_words(gold))


def token_f1(found: str, gold: str) -> float:
    """F1 of the words that two answers share, 0..1; two answers without words are equal."""
    one, other = answer_words(found), answer_words(gold)
    if not one or not other:
        return float(one == other)
    return 2 * sum((Counter(one) & Counter(other)).values()) / (len(one) + len(other))
