"""Where words and answers stand among tokens, on cases made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from compression.alignment import (
    Window,
    answer_tokens,
    encode_questions,
    encode_words,
    longest_overlap,
)
from compression.tokenization import load_tokenizer
from tests.builders import tiny_bert

WORDS = ("good", "play", "##ing", "中", "国", "人", "the", ".", "film")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tiny_bert(tmp_path_factory.mktemp("words") / "m", num_labels=None, words=WORDS)
    return load_tokenizer(folder)


def tokens(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.id_to_token(number) or "" for number in ids]


def test_a_split_word_is_read_at_its_first_token(tokenizer: Tokenizer) -> None:
    (row,) = encode_words(tokenizer, [["Playing", "the", "film."]], 16)
    assert tokens(tokenizer, row.input_ids) == [
        "[CLS]", "play", "##ing", "the", "film", ".", "[SEP]",
    ]  # fmt: skip
    assert row.seen.tolist() == [0, 1, 2]
    assert row.positions.tolist() == [1, 3, 4]


def test_chinese_words_are_split_into_their_characters(tokenizer: Tokenizer) -> None:
    (row,) = encode_words(tokenizer, [["中国", "人", "."]], 16)
    assert tokens(tokenizer, row.input_ids)[1:-1] == ["中", "国", "人", "."]
    assert row.positions.tolist() == [1, 3, 4]


def test_words_that_are_cut_off_or_leave_no_token_are_not_seen(tokenizer: Tokenizer) -> None:
    exact, cut, blank = encode_words(
        tokenizer, [["good"] * 6, ["good"] * 5 + ["playing", "film"], ["\u200b", "good", " "]], 8
    )
    assert len(exact.input_ids) == len(cut.input_ids) == 8
    assert [row.cut for row in (exact, cut, blank)] == [False, True, False]
    assert exact.seen.tolist() == [0, 1, 2, 3, 4, 5]  # all of it: six words and two special tokens
    assert cut.seen.tolist() == [0, 1, 2, 3, 4, 5]  # "playing" lost its second token only
    assert tokens(tokenizer, cut.input_ids)[6:] == ["play", "[SEP]"]
    assert (blank.seen.tolist(), blank.positions.tolist()) == ([1], [1])


def test_a_context_that_fits_is_one_window(tokenizer: Tokenizer) -> None:
    found = encode_questions(
        tokenizer, ["the film"], ["Playing  good 中国."], max_seq_len=32, overlap=4
    )
    (window,) = found.windows
    assert found.cut_questions == 0
    assert tokens(tokenizer, window.input_ids) == [
        "[CLS]", "the", "film", "[SEP]", "play", "##ing", "good", "中", "国", ".", "[SEP]",
    ]  # fmt: skip
    assert window.token_type_ids == [0] * 4 + [1] * 7
    assert window.first == 4
    assert window.offsets.tolist() == [[0, 4], [4, 7], [9, 13], [14, 15], [15, 16], [16, 17]]


def test_windows_share_their_overlap_and_leave_nothing_out(tokenizer: Tokenizer) -> None:
    context = " ".join(["good", "film", "the"] * 20)  # 60 tokens
    found = encode_questions(
        tokenizer, ["good film", "the"], [context, "good"], max_seq_len=24, overlap=3
    )
    own = [window for window in found.windows if window.row == 0]
    assert [window.row for window in found.windows] == [0] * len(own) + [1]
    assert {len(window.input_ids) for window in own[:-1]} == {24}
    room = 24 - 3 - 2  # without the special tokens and the question
    starts = [int(window.offsets[0, 0]) for window in own]
    every = encode_questions(tokenizer, ["x"], [context], max_seq_len=512, overlap=0)
    characters = every.windows[0].offsets[:, 0].tolist()
    assert starts == [characters[i] for i in range(0, 60 - 3, room - 3)]
    assert own[-1].offsets[-1, 1] == len(context)


def test_a_question_longer_than_half_a_window_is_cut_and_counted(tokenizer: Tokenizer) -> None:
    found = encode_questions(
        tokenizer, ["good " * 40, "good " * 16], ["the film."] * 2, max_seq_len=32, overlap=7
    )
    assert found.cut_questions == 1
    assert found.windows[0].input_ids == found.windows[1].input_ids
    with pytest.raises(ValueError, match="cannot share"):
        encode_questions(tokenizer, ["a"], ["b"], max_seq_len=32, overlap=longest_overlap(32) + 1)


def window(*offsets: tuple[int, int]) -> Window:
    return Window(0, [0] * 9, [0] * 9, 3, np.array(offsets, np.int64).reshape(-1, 2))


@pytest.mark.parametrize(
    ("characters", "expected"),
    [
        ((0, 4), (3, 3)),
        ((5, 12), (4, 5)),  # both tokens of one word
        ((6, 11), (4, 5)),  # begins and ends within a token
        ((13, 15), (6, 7)),
        ((0, 15), (3, 7)),
        ((14, 16), None),  # ends outside the window
        ((4, 5), None),  # a blank alone
    ],
)
def test_an_answer_is_found_by_its_characters(
    characters: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    own = window((0, 4), (5, 8), (8, 12), (13, 14), (14, 15))
    assert answer_tokens(own, *characters) == expected


def test_an_answer_across_a_windows_edge_is_not_in_it() -> None:
    assert answer_tokens(window((20, 24), (25, 30)), 15, 24) is None
    assert answer_tokens(window((20, 24), (25, 30)), 20, 24) == (3, 3)
    assert answer_tokens(window(), 0, 4) is None
