from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from compression.errors import InvalidModel
from compression.tokenization import encode, load_tokenizer, save_tokenizer
from tests.builders import (
    SPECIAL_TOKENS,
    WORDS,
    byte_tokens,
    tiny_bert,
    tiny_family,
    write_json,
)

VOCABULARY = (*SPECIAL_TOKENS, *WORDS)


def _ids(*tokens: str) -> list[int]:
    return [VOCABULARY.index(token) for token in tokens]


def test_a_sentence_is_wordpieces_between_cls_and_sep(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert(tmp_path))
    ((ids, types),) = encode(tokenizer, ["The GOODS, unknownword"], None, 32)
    assert ids == _ids("[CLS]", "the", "good", "##s", ",", "[UNK]", "[SEP]")
    assert types == [0] * 7


def test_a_pair_has_two_types(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert(tmp_path))
    ((ids, types),) = encode(tokenizer, ["good film"], ["bad"], 32)
    assert ids == _ids("[CLS]", "good", "film", "[SEP]", "bad", "[SEP]")
    assert types == [0, 0, 0, 0, 1, 1]


def test_the_longer_sentence_is_cut_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert(tmp_path))
    ((ids, _),) = encode(tokenizer, ["good film music scene"], ["bad"], 6)
    assert ids == _ids("[CLS]", "good", "film", "[SEP]", "bad", "[SEP]")
    ((ids, _),) = encode(tokenizer, ["good " * 50], None, 8)
    assert len(ids) == 8
    assert ids[-1:] == _ids("[SEP]")


def test_encoding_leaves_the_tokenizer_as_it_was(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert(tmp_path))
    before = tokenizer.to_str()
    encode(tokenizer, ["good " * 50], None, 8)
    assert tokenizer.to_str() == before
    assert len(tokenizer.encode("good " * 50).ids) == 52


def test_padding_and_truncation_of_the_file_are_taken_off(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(max_length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("good").ids) == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, _ids("[CLS]", "good", "cold", "[SEP]")),
        ({"do_lower_case": True}, _ids("[CLS]", "good", "cold", "[SEP]")),
        ({"do_lower_case": False}, _ids("[CLS]", "[UNK]", "[UNK]", "[SEP]")),
        (
            {"do_lower_case": True, "strip_accents": False},
            _ids("[CLS]", "good", "[UNK]", "[SEP]"),
        ),
    ],
)
def test_case_and_accents_follow_the_settings(
    tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    folder = tiny_bert(tmp_path)
    write_json(folder / "tokenizer_config.json", settings)
    ((ids, _),) = encode(load_tokenizer(folder), ["Good cöld"], None, 16)
    assert ids == expected


def test_what_is_saved_tokenizes_alike(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "in")
    written = save_tokenizer(folder, tmp_path / "out")
    assert {path.name for path in written} == {
        "tokenizer.json",
        "vocab.txt",
        "tokenizer_config.json",
    }
    saved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    texts = ["the good film.", "[SEP] slowed, badly!", "", "ünknown 你好"]
    loaded = load_tokenizer(folder)
    assert encode(saved, texts, texts[::-1], 9) == encode(loaded, texts, texts[::-1], 9)


def test_added_tokens_follow_the_vocabulary(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "vocab_size": len(VOCABULARY) + 1})
    write_json(folder / "added_tokens.json", {"<user>": len(VOCABULARY)})
    ((ids, _),) = encode(load_tokenizer(folder), ["good <user>"], None, 16)
    assert ids[2] == len(VOCABULARY)
    write_json(folder / "added_tokens.json", {"<user>": 7})
    with pytest.raises(InvalidModel, match=r"added_tokens\.json"):
        load_tokenizer(folder)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    with (folder / "vocab.txt").open("a") as file:
        file.write("onemore\n")
    with pytest.raises(InvalidModel, match=f"ids up to {len(VOCABULARY)}"):
        load_tokenizer(folder)


def test_a_vocabulary_without_its_special_tokens_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\ngood\n")
    with pytest.raises(InvalidModel, match=r"lacks \[CLS\]"):
        load_tokenizer(folder)


def test_a_vocabulary_in_latin1_is_refused_with_its_line(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "vocab.txt").write_bytes("[PAD]\n[UNK]\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(InvalidModel, match="line 3: not UTF-8"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "not json", '{"version": "1.0", "model": {"type": "Nonsense"}}', "[" * 100_000],
)
def test_a_tokenizer_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(InvalidModel, match=r"tokenizer\.json"):
        load_tokenizer(folder)


def test_a_tokenizer_that_adds_no_special_tokens_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    load_tokenizer(folder).save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text())
    write_json(folder / "tokenizer.json", {**data, "post_processor": None})
    with pytest.raises(InvalidModel, match=r"adds no \[CLS\]"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "vocab.txt").unlink()
    with pytest.raises(InvalidModel, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(folder)


# --- byte-level BPE, as RoBERTa's -----------------------------------------------------------


def _bytes(*tokens: str) -> list[int]:
    return [byte_tokens(WORDS).index(token) for token in tokens]


def test_bpe_puts_robertas_marks_around_a_sentence_and_a_pair(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_family(tmp_path, "roberta"))
    ((ids, types),) = encode(tokenizer, ["a good film"], None, 32)
    assert ids == _bytes("<s>", "a", "Ġgood", "Ġfilm", "</s>")
    assert types == [0] * 5
    ((ids, types),) = encode(tokenizer, [" good"], [" bad é"], 32)
    assert ids == _bytes("<s>", "Ġgood", "</s>", "</s>", "Ġbad", "Ġ", "Ã", "©", "</s>")
    assert types == [0] * 9
    ((ids, _),) = encode(tokenizer, [" good film music"], [" bad"], 7)
    assert ids == _bytes("<s>", "Ġgood", "Ġfilm", "</s>", "</s>", "Ġbad", "</s>")


def test_a_mask_takes_the_space_before_it_and_settings_are_kept(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "roberta")
    ((ids, _),) = encode(load_tokenizer(folder), ["a <mask> good"], None, 32)
    assert ids == _bytes("<s>", "a", "<mask>", "Ġgood", "</s>")
    write_json(folder / "tokenizer_config.json", {"add_prefix_space": True})
    ((ids, _),) = encode(load_tokenizer(folder), ["good"], None, 32)
    assert ids == _bytes("<s>", "Ġgood", "</s>")
    write_json(folder / "special_tokens_map.json", {"cls_token": {"content": "</s>"}})
    ((ids, _),) = encode(load_tokenizer(folder), ["good"], None, 32)
    assert ids == _bytes("</s>", "Ġgood", "</s>")


def test_what_is_saved_of_a_roberta_tokenizes_alike_without_its_other_files(
    tmp_path: Path,
) -> None:
    folder = tiny_family(tmp_path / "in", "roberta")
    names = {path.name for path in save_tokenizer(folder, tmp_path / "out")}
    assert names == {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    saved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    texts = ["the good film.", "<s> slowed, badly!", "", "ünknown 你好 <mask>", "a\tb  c"]
    loaded = load_tokenizer(folder)
    assert encode(saved, texts, texts[::-1], 20) == encode(loaded, texts, texts[::-1], 20)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", '{"<s>": 0}', r"vocab\.json lacks </s>, <pad>, <unk>, <mask>"),
        ("vocab.json", '{"<s>": -1}', r"vocab\.json does not map tokens to ids"),
        ("vocab.json", '{"<s>": "0"}', r"vocab\.json does not map tokens to ids"),
        ("vocab.json", "[]", r"vocab\.json does not hold a JSON object"),
        ("merges.txt", "#version: 0.2\na b c\n", r"merges\.txt, line 2: not two tokens"),
        ("merges.txt", "ab\n", r"merges\.txt, line 1: not two tokens"),
        ("merges.txt", "a strange\n", r"merges\.txt does not fit vocab\.json"),
        ("merges.txt", None, r"lacks merges\.txt"),
    ],
)
def test_a_byte_level_vocabulary_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    folder = tiny_family(tmp_path, "roberta")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InvalidModel, match=message) as caught:
        load_tokenizer(folder)
    assert caught.value.pointer == name


def test_ids_are_those_of_paddlenlps_own_tokenizers(tmp_path: Path) -> None:
    words = (*WORDS, "你", "好", "电", "影", "。")
    texts = ["The GOODS, unknownword", "你好, good 电影。", "cöld  film\n was slow", "a <b> it's"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paddlenlp 2.8.1 uses what its dependencies deprecate
        from paddlenlp.transformers import (
            DistilBertTokenizer,
            ElectraTokenizer,
            ErnieTokenizer,
            RobertaBPETokenizer,
        )

        for family, theirs in (
            ("distilbert", DistilBertTokenizer),
            ("electra", ElectraTokenizer),
            ("ernie", ErnieTokenizer),
            ("roberta", RobertaBPETokenizer),
        ):
            folder = tiny_family(tmp_path / family, family, words=words)
            files = [folder / "vocab.txt"]
            if family == "roberta":
                files = [folder / "vocab.json", folder / "merges.txt"]
            own, other = load_tokenizer(folder), theirs(*map(str, files))
            expected = [other(text)["input_ids"] for text in texts]
            assert [ids for ids, _ in encode(own, texts, None, 64)] == expected, family
            pairs = [other(text, text_pair="good")["input_ids"] for text in texts]
            assert [ids for ids, _ in encode(own, texts, ["good"] * 4, 64)] == pairs, family
