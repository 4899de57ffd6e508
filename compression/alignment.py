"""Where words and answers stand among a tokenizer's tokens. Paddle-free.

A row of words becomes one sequence; a question with a long context becomes several
windows of it that share some tokens. What a sequence has no room for is cut off and told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

Ints = npt.NDArray[np.int64]
QUESTION_SHARE = 2  # a question takes at most one half of a window
SPECIAL_TOKENS = 8  # room for those around a question and its context, generously


@dataclass(frozen=True)
class Words:
    """One row of words as token ids.

    `positions[k]` is the token that word `seen[k]` begins with. A word without a token (cut
    off, or made of nothing that the tokenizer keeps) is not among `seen`. `cut` says whether
    anything was cut off.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    seen: Ints
    positions: Ints
    cut: bool


@dataclass(frozen=True)
class Window:
    """Question `row` with as much of its context as one sequence holds.

    The context's tokens are `first`, `first + 1`, ...; `offsets` [tokens, 2] are the
    characters of the context that each stands for, end excluded.
    """

    row: int
    input_ids: list[int]
    token_type_ids: list[int]
    first: int
    offsets: Ints


class Windows(NamedTuple):
    """All windows, row by row, and how many questions were cut."""

    windows: list[Window]
    cut_questions: int


def encode_words(
    tokenizer: Tokenizer, rows: Sequence[Sequence[str]], max_seq_len: int
) -> list[Words]:
    """Every row of words as one sequence of at most `max_seq_len` tokens, its end cut off.

    A word that is split keeps its tag on its first token, as BERT (arXiv:1810.04805) does it.
    """
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_padding()
    own.enable_truncation(max_length=max_seq_len)
    done = []
    for row in own.encode_batch([list(words) for words in rows], is_pretokenized=True):
        first: dict[int, int] = {}
        for position, word in enumerate(row.word_ids):
            if word is not None:
                first.setdefault(word, position)
        done.append(
            Words(
                row.ids,
                row.type_ids,
                seen=np.fromiter(first.keys(), np.int64, len(first)),
                positions=np.fromiter(first.values(), np.int64, len(first)),
                cut=bool(row.overflowing),
            )
        )
    return done


def longest_overlap(max_seq_len: int) -> int:
    """The most tokens that two windows can share, so that each still moves on."""
    return max_seq_len - max_seq_len // QUESTION_SHARE - SPECIAL_TOKENS - 1


def encode_questions(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    max_seq_len: int,
    overlap: int,
) -> Windows:
    """Every question with its context in windows of at most `max_seq_len` tokens.

    Neighbouring windows share `overlap` tokens of the context. A question that takes more
    than half of a window is cut. ValueError where `overlap` leaves a window no room.
    """
    if not 0 <= overlap <= longest_overlap(max_seq_len):
        raise ValueError(f"windows of {max_seq_len} tokens cannot share {overlap}")
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_padding()
    own.no_truncation()
    limit = max_seq_len // QUESTION_SHARE
    asked = list(questions)
    cut = 0
    for i, alone in enumerate(own.encode_batch(asked, add_special_tokens=False)):
        if len(alone) > limit:
            asked[i] = asked[i][: alone.offsets[limit - 1][1]]
            cut += 1
    own.enable_truncation(max_length=max_seq_len, stride=overlap, strategy="only_second")
    windows = []
    for row, whole in enumerate(own.encode_batch(list(zip(asked, contexts, strict=True)))):
        windows += [_window(row, part) for part in (whole, *whole.overflowing)]
    return Windows(windows, cut)


def _window(row: int, part: Encoding) -> Window:
    of_context = [i for i, sequence in enumerate(part.sequence_ids) if sequence == 1]
    first = of_context[0] if of_context else len(part.ids)
    offsets = np.array([part.offsets[i] for i in of_context], np.int64).reshape(-1, 2)
    return Window(row, part.ids, part.type_ids, first, offsets)


def answer_tokens(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """The first and last token of the context's characters start..end (end excluded).

    None where this window does not hold all of them.
    """
    starts, ends = window.offsets[:, 0], window.offsets[:, 1]
    if not len(starts) or start < starts[0] or end > ends[-1]:
        return None
    first = int(np.searchsorted(ends, start, side="right"))  # the first that ends after start
    last = int(np.searchsorted(starts, end, side="left")) - 1  # the last that starts before end
    return (window.first + first, window.first + last) if first <= last else None
