"""Removal of unused tokens: what stayed is found as before, files agree, figures are told."""

from __future__ import annotations

import json
import string
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import BertProcessing, ByteLevel, Sequence

from compression.batches import Encoded, pad
from compression.encoder import build_encoder
from compression.errors import InvalidModel, InvalidSpec
from compression.export.fresh import fresh_environment
from compression.job import load
from compression.judging import regression
from compression.pipeline import compress
from compression.report import CompressionReport, VocabularyReport
from compression.spec import Spec
from compression.teachers import read_checkpoint, read_config
from compression.tokenization import encode, load_tokenizer
from compression.vocabulary import (
    Vocabulary,
    check_removable,
    effect,
    save_smaller_tokenizer,
    smaller_vocabulary,
    unknown_entries,
)
from tests.builders import (
    SPECIAL_TOKENS,
    WORDS,
    tiny_bert,
    tiny_dataset,
    tiny_family,
    tiny_tags,
    write_json,
)
from tests.encoders import as_tensors

LETTERS = (*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase))
CHARACTERS = tuple(letter for letter in LETTERS if letter not in WORDS)
# "marvel" falls into pieces without its token, "λογος" into nothing: its letters are no tokens.
RARE = ("marvel", "##lous", "λογος", "goods")
TOKENS = (*SPECIAL_TOKENS, *RARE[:2], *WORDS, *CHARACTERS, *RARE[2:])
USED = ["the good film", "a bad story ."]


def model_of(folder: Path, **changes: Any) -> Path:
    return tiny_bert(folder, words=TOKENS[len(SPECIAL_TOKENS) :], **changes)


def smaller(folder: Path, texts: list[str] = USED, keep: tuple[str, ...] = ()) -> Vocabulary:
    tokenizer = load_tokenizer(folder)
    config = read_config(folder).encoder
    return smaller_vocabulary(
        tokenizer, config, [row.ids for row in tokenizer.encode_batch(texts)], keep
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("model"))


def tokens_left(vocabulary: Vocabulary) -> list[str]:
    return [TOKENS[old] for old in vocabulary.kept]


def test_what_is_used_special_or_a_character_stays_in_the_old_order(model: Path) -> None:
    left = tokens_left(smaller(model))
    used = {"the", "good", "film", "a", "bad", "story", "."}
    assert set(left) == {*SPECIAL_TOKENS, *used, *LETTERS, ",", "!"}
    assert left == [token for token in TOKENS if token in left]


def test_of_a_token_that_stands_twice_the_row_that_is_read_stays(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path, words=("good", "film", "good", "a"))
    vocabulary = smaller(folder, ["good"])
    first = len(SPECIAL_TOKENS)
    assert vocabulary.kept.tolist() == [*range(first), first + 2, first + 3]


def test_a_keep_list_names_tokens_and_texts(model: Path) -> None:
    keep = ("##lous", "A clever plot", "λόγος")
    vocabulary = smaller(model, keep=keep)
    assert {"##lous", "clever", "plot", "λογος"} <= set(tokens_left(vocabulary))
    tokenizer = load_tokenizer(model)
    assert unknown_entries(tokenizer, keep) == []
    assert unknown_entries(tokenizer, ("good", "北", " ")) == ["北", " "]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(
            st.sampled_from([*WORDS, *RARE, "unheardof", "Goodness", "[MASK]", "naïve", "北京"])
            | st.text("abgoxλ #'", max_size=8),
            max_size=6,
        ).map(" ".join),
        min_size=1,
        max_size=8,
    )
)
def test_ids_are_equal_through_the_map_where_every_token_stayed(
    model: Path, texts: list[str]
) -> None:
    tokenizer, vocabulary = load_tokenizer(model), smaller(model)
    for text in texts:
        before = tokenizer.encode(text).ids
        after = vocabulary.tokenizer.encode(text).ids
        assert max(after) < len(vocabulary.kept)
        if set(before) <= set(vocabulary.kept.tolist()):
            assert [vocabulary.kept[token] for token in after] == before
    effect(tokenizer, vocabulary, texts, "dev")  # finds nothing to refuse either


def test_a_removed_word_falls_into_pieces_or_is_unknown(model: Path) -> None:
    tokenizer, vocabulary = load_tokenizer(model), smaller(model)
    assert tokenizer.encode("marvellous λογος").tokens[1:-1] == ["marvel", "##lous", "λογος"]
    found = vocabulary.tokenizer.encode("marvellous λογος").tokens[1:-1]
    assert found == ["m", *(f"##{letter}" for letter in "arvellous"), "[UNK]"]
    assert effect(tokenizer, vocabulary, ["a marvel", "λογος 北", "good", "bad"], "test") == (
        VocabularyReport(
            tokens_before=len(TOKENS),
            tokens_after=len(vocabulary.kept),
            split="test",
            unk_before=1 / 6,
            unk_after=2 / 11,
            length_before=6 / 4,
            length_after=11 / 4,
            changed_texts=0.5,
        )
    )


def test_words_given_one_by_one_are_told_of_too(model: Path) -> None:
    tokenizer, vocabulary = load_tokenizer(model), smaller(model)
    told = effect(tokenizer, vocabulary, [("good", "λογος"), ("a",)], "dev")
    assert (told.unk_after, told.changed_texts, told.length_before) == (1 / 3, 0.5, 1.5)


def test_a_tokenizer_that_finds_other_tokens_is_refused(model: Path) -> None:
    vocabulary = smaller(model)
    other = Vocabulary(vocabulary.kept[::-1].copy(), vocabulary.rows, vocabulary.tokenizer)
    with pytest.raises(InvalidModel, match="of 'good' for one"):
        effect(load_tokenizer(model), other, ["good"], "dev")


# --- files ----------------------------------------------------------------------------------


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [ids for ids, _ in encode(tokenizer, texts, texts[::-1], 16)]


def test_vocab_txt_and_tokenizer_json_agree_and_the_map_is_beside_them(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "model")
    load_tokenizer(folder).save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", {"unk_token": "[UNK]"})
    vocabulary = smaller(folder)
    out = tmp_path / "out"
    written = save_smaller_tokenizer(vocabulary, folder, out)
    assert sorted(path.name for path in written) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "vocabulary_map.json",
    ]
    stored = json.loads((out / "vocabulary_map.json").read_text())
    assert stored == {"tokens_before": len(TOKENS), "kept": vocabulary.kept.tolist()}
    lines = (out / "vocab.txt").read_text().split("\n")[:-1]
    assert lines == [TOKENS[old] for old in stored["kept"]]

    config = json.loads((folder / "config.json").read_text())
    write_json(out / "config.json", {**config, "vocab_size": len(lines)})
    texts = ["the Good film.", "marvellous [MASK] λογος", "", "北"]
    fast = load_tokenizer(out)
    (out / "tokenizer.json").unlink()
    slow = load_tokenizer(out)
    assert ids_of(fast, texts) == ids_of(slow, texts)
    assert ids_of(fast, texts) == ids_of(vocabulary.tokenizer, texts)


def test_added_tokens_keep_a_number_wherever_it_is_written(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    size = len(TOKENS)
    write_json(folder / "config.json", {**config, "vocab_size": size + 1})
    write_json(folder / "added_tokens.json", {"<user>": size})
    decoder = {"1": {"content": "[UNK]"}, str(size): {"content": "<user>"}, "5": {"content": "x"}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    vocabulary = smaller(folder)
    last = len(vocabulary.kept) - 1
    assert vocabulary.kept[last] == size
    out = tmp_path / "out"
    save_smaller_tokenizer(vocabulary, folder, out)
    assert json.loads((out / "added_tokens.json").read_text()) == {"<user>": last}
    rewritten = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert rewritten == {"1": {"content": "[UNK]"}, str(last): {"content": "<user>"}}
    write_json(out / "config.json", {**config, "vocab_size": last + 1})
    for _ in ("tokenizer.json", "vocab.txt"):
        assert load_tokenizer(out).encode("good <user>").ids[2] == last
        (out / "tokenizer.json").unlink(missing_ok=True)


def test_tokens_around_a_text_are_numbered_anew_in_every_processor(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    # [SEP] and [CLS] stand behind removed tokens here, and only the processor names them.
    processor = BertProcessing(("story", TOKENS.index("story")), ("film", TOKENS.index("film")))
    tokenizer.post_processor = Sequence([processor, ByteLevel()])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = smaller(folder, ["good"])
    assert TOKENS[vocabulary.kept[vocabulary.tokenizer.encode("good").ids[0]]] == "film"
    assert vocabulary.tokenizer.encode("good").tokens == ["film", "good", "story"]


def test_a_processor_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    document = json.loads(tokenizer.to_str())
    document["post_processor"]["type"] = "Surprise"

    class Strange:
        def to_str(self) -> str:
            return json.dumps(document)

    with pytest.raises(InvalidModel, match="'Surprise' is not known") as caught:
        smaller_vocabulary(Strange(), read_config(folder).encoder, [], ())  # type: ignore[arg-type]
    assert caught.value.pointer == "tokenizer.json"


def test_an_added_token_in_the_middle_of_a_vocabulary_stays(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken("clever", single_word=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = smaller(folder)
    assert "clever" in tokens_left(vocabulary)
    assert vocabulary.tokenizer.encode("clever").tokens[1] == "clever"


# --- what is refused ------------------------------------------------------------------------


def test_other_tokenizers_than_wordpiece_are_refused(tmp_path: Path) -> None:
    asked = Spec.model_validate({"vocabulary": {"remove_unused": True}})
    with pytest.raises(InvalidSpec, match="tokenizer is BPE") as caught:
        check_removable(asked.vocabulary, "BPE")
    assert caught.value.pointer == "/vocabulary/remove_unused"
    check_removable(Spec().vocabulary, "BPE")
    check_removable(asked.vocabulary, "WordPiece")
    check_removable(asked.vocabulary, None)

    folder = tiny_family(tmp_path / "model", "roberta", num_labels=2, max_tokens=32)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 40, "dev": 20})
    with pytest.raises(InvalidSpec, match="tokenizer is BPE"):
        load(asked, folder, dataset, 1)


# --- a whole job ----------------------------------------------------------------------------


def a_job(root: Path, *, spec: dict[str, Any]) -> tuple[Spec, Path, Path]:
    """A model, a dataset whose dev and test have words that train has not, and the spec."""
    dataset = tiny_dataset(root / "dataset", rows={"train": 200, "dev": 40, "test": 20})
    for split in ("dev", "test"):
        with (dataset / f"{split}.tsv").open("a", encoding="utf-8") as file:
            file.write("a good marvel\t1\nthe λογος was bad\t0\n")
    common = {
        "task": {"max_seq_len": 16},
        "supernet": {"width_mults": ["1/2"]},
        "latency": {"rounds": 5},
        "vocabulary": {"remove_unused": True, "keep": ["##lous", "北"]},
    }
    model = model_of(root / "model", num_labels=2, seed=3)
    return Spec.model_validate({**common, **spec}), model, dataset


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("job")
    spec, model, dataset = a_job(
        root,
        spec={
            "distillation": {"max_steps": 2},
            "export": {
                "formats": ["safetensors", "paddle", "onnx", "onnx-int8-dynamic", "onnx-fp16"],
                "int8": {"max_flipped": 1.0},
            },
        },
    )
    report = compress(spec, model, dataset, root / "run")
    with tarfile.open(root / "run" / "artifacts" / "w1_2" / "bundle.tar.gz") as archive:
        archive.extractall(root, filter="data")
    return {"root": root, "model": model, "dataset": dataset, "report": report}


def rows_of(path: Path) -> tuple[list[str], list[int]]:
    cells = [line.split("\t") for line in path.read_text("utf-8").split("\n")[1:-1]]
    return [text for text, _ in cells], [int(label) for _, label in cells]


def test_every_format_is_published_with_the_smaller_embedding(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    (half,) = report.subnetworks
    *formats, in_fp16 = half.formats
    assert [(fmt.format, fmt.published, fmt.error) for fmt in formats] == [
        (fmt, True, None) for fmt in ("safetensors", "paddle", "onnx", "onnx-int8-dynamic")
    ]
    assert (in_fp16.format, in_fp16.parity_tolerance) == ("onnx-fp16", None)
    assert in_fp16.flipped is not None and in_fp16.max_flipped == 0.005
    assert in_fp16.published == (in_fp16.flipped <= 0.005)  # one of 42 rows would be more
    assert (in_fp16.latency is not None) == in_fp16.published
    told = report.vocabulary
    assert told is not None and told.split == "test"
    assert told.tokens_before == len(TOKENS) > told.tokens_after
    assert told.unk_after > told.unk_before
    assert told.changed_texts == 2 / 22
    checkpoint = read_checkpoint(finished["root"] / "w1_2" / "safetensors")
    assert checkpoint.config.vocab_size == told.tokens_after
    hidden = checkpoint.config.hidden
    assert checkpoint.tensors["embeddings.word.weight"].shape == (told.tokens_after, hidden)
    assert any("vocabulary.keep, '北'" in note for note in report.dataset.notes)


@pytest.mark.parametrize("fmt", ["onnx", "onnx-int8-dynamic"])
def test_the_figures_are_those_of_the_file_that_is_shipped(
    finished: dict[str, Any], fmt: str
) -> None:
    """Dev and test answered by what the bundle holds and nothing else, unknown words and all."""
    report: CompressionReport = finished["report"]
    (half,) = report.subnetworks
    tokenizer = Tokenizer.from_file(str(finished["root"] / "w1_2" / "tokenizer" / "tokenizer.json"))
    onnx = pytest.importorskip("onnxruntime")
    session = onnx.InferenceSession(
        str(finished["root"] / "w1_2" / fmt / "model.onnx"), providers=["CPUExecutionProvider"]
    )

    def accuracy_on(split: str) -> float:
        texts, labels = rows_of(finished["dataset"] / f"{split}.tsv")
        rows = encode(tokenizer, texts, None, 16)
        found = [
            session.run(None, pad(Encoded([ids], [types], None), [0], pad_id=0))[0].argmax()
            for ids, types in rows
        ]
        return float(np.mean(np.array(found) == labels))

    own = next(each.accuracy for each in half.formats if each.format == fmt)
    assert accuracy_on("dev") == pytest.approx(half.accuracy if own is None else own)
    assert half.test is not None
    if (half.test.format or "onnx") == fmt:
        assert accuracy_on("test") == pytest.approx(half.test_accuracy)


def test_the_bundle_says_what_was_removed_and_runs(finished: dict[str, Any]) -> None:
    folder: Path = finished["root"] / "w1_2"
    report: CompressionReport = finished["report"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert report.vocabulary is not None
    assert manifest["vocabulary"] == report.vocabulary.model_dump(mode="json")
    named = {entry["path"] for entry in manifest["files"]}
    assert {"tokenizer/vocabulary_map.json", "tokenizer/vocab.txt"} <= named
    card = (folder / "MODEL_CARD.md").read_text()
    share = f"{report.vocabulary.unk_after:.2%} of them are unknown"
    assert f"It knows {report.vocabulary.tokens_after:,} of the teacher's" in card
    assert share in card
    done = subprocess.run(
        [sys.executable, str(folder / "predict.py"), "--check", "--json", "a good marvel", "λογος"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=fresh_environment(),
    )
    assert len(done.stdout.splitlines()) == 2


def test_what_the_training_learnt_does_not_depend_on_the_removal(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights as without it, less some rows; the same answers where no word is gone."""
    spec, model, dataset = a_job(
        tmp_path,
        spec={
            "distillation": {"max_steps": 2},
            "latency": {"rounds": 5, "baselines": []},
            "export": {"formats": ["safetensors", "onnx"]},
            "vocabulary": {},
        },
    )
    compress(spec, model, dataset, tmp_path / "run")
    whole = read_checkpoint(tmp_path / "run" / "artifacts" / "w1_2" / "safetensors")
    less = read_checkpoint(finished["root"] / "w1_2" / "safetensors")
    kept = json.loads(
        (finished["root"] / "w1_2" / "tokenizer" / "vocabulary_map.json").read_text()
    )["kept"]
    for name, tensor in whole.tensors.items():
        expected = tensor[kept] if name == "embeddings.word.weight" else tensor
        np.testing.assert_array_equal(less.tensors[name], expected)
    ids = [kept.index(TOKENS.index(token)) for token in ("[CLS]", "good", "film", "[SEP]")]
    rows = Encoded([ids], [[0] * 4], None)
    before = Encoded([[kept[token] for token in ids]], [[0] * 4], None)
    np.testing.assert_allclose(
        build_encoder(less.config, less.tensors)(*as_tensors(pad(rows, [0], pad_id=0))).numpy(),
        build_encoder(whole.config, whole.tensors)(*as_tensors(pad(before, [0], pad_id=0))).numpy(),
        atol=1e-6,
    )


def test_rows_of_train_that_score_the_search_keep_their_tokens(tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for split, words in (("train", [*WORDS, *WORDS[:20]]), ("dev", WORDS[:20])):
        rows = [f"{word}\t{number % 2}" for number, word in enumerate(words)]
        (dataset / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    spec = Spec.model_validate(
        {
            "task": {"max_seq_len": 16},
            "supernet": {"per_layer": {"holdout_rows": 8}},
            "constraints": {"max_size_mb": 10},
            "vocabulary": {"remove_unused": True},
        }
    )
    job = load(spec, model_of(tmp_path / "model", num_labels=2), dataset, 1)
    assert job.holdout is not None and job.vocabulary is not None
    held_out = {token for row in job.holdout.input_ids for token in row}
    learnt = {token for row in job.splits["train"].input_ids for token in row}
    assert held_out - learnt  # words that stand in none of the rows that are trained on
    assert held_out <= set(job.vocabulary.kept.tolist())


def test_unlabelled_rows_keep_their_tokens_and_those_of_dev_and_test_do_not(
    tmp_path: Path,
) -> None:
    spec, model, dataset = a_job(tmp_path, spec={"vocabulary": {"remove_unused": True}})
    before = load(spec, model, dataset, 1).vocabulary
    (dataset / "unlabelled.tsv").write_text("text\na good marvel\n")
    after = load(spec, model, dataset, 1).vocabulary
    assert before is not None and after is not None
    assert not {"marvel", "λογος"} & set(tokens_left(before))  # of dev and test alone
    assert set(tokens_left(after)) == {*tokens_left(before), "marvel"}


def test_words_that_two_tokenizers_cut_off_are_compared_where_both_answer(tmp_path: Path) -> None:
    dataset = tiny_tags(tmp_path / "dataset", rows={"train": 100, "dev": 4})
    row = {"tokens": [*["marvel"] * 3, "good"], "tags": ["O"] * 4}
    with (dataset / "dev.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    spec = Spec.model_validate(
        {
            "task": {"kind": "token_classification", "max_seq_len": 16},
            "vocabulary": {"remove_unused": True},
        }
    )
    job = load(spec, model_of(tmp_path / "model", num_labels=None), dataset, 1)
    assert job.own["dev"].cut == job.splits["dev"].cut + 1
    outputs = len(job.plan.label_names)
    theirs, own = (
        [np.zeros((len(ids), outputs), np.float32) for ids in rows["dev"].input_ids]
        for rows in (job.splits, job.own)
    )
    told = regression(job, "dev", job.task.judged(theirs, job.splits["dev"]), own)
    # Three times "m ##a ##r ##v ##e ##l" is more than fits: the fourth word is gone.
    assert told.overall.units == len(job.task.judged(theirs, job.splits["dev"]).rows) - 1
    assert told.overall.agreement == 1.0
