"""Heads that read every token: both toolkits' layouts, and PaddleNLP's own logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from compression.encoder import build_encoder
from compression.errors import InvalidModel
from compression.teachers import check_checkpoint, read_checkpoint
from tests.builders import tiny_bert, tiny_paddlenlp, with_token_head, write_json


@pytest.mark.parametrize(
    ("head", "name", "task"),
    [
        ("TokenClassification", "classifier", "token_classification"),
        ("QuestionAnswering", "qa_outputs", "question_answering"),
    ],
)
def test_a_hugging_face_head_is_read_as_a_classifier_of_tokens(
    tmp_path: Path, head: str, name: str, task: str
) -> None:
    folder = with_token_head(tiny_bert(tmp_path), head)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.config.head, checkpoint.head_task) == ("token", task)
    assert checkpoint.config.num_labels == 2
    stored = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        checkpoint.tensors["classifier.weight"], stored[f"{name}.weight"].T
    )
    np.testing.assert_array_equal(checkpoint.tensors["classifier.bias"], stored[f"{name}.bias"])
    assert check_checkpoint(folder).head_task == task


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
def test_logits_are_those_of_paddlenlp(tmp_path: Path, head: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paddlenlp 2.8.1 uses what its dependencies deprecate
        from paddlenlp.transformers import BertConfig, BertForQuestionAnswering
        from paddlenlp.transformers import BertForTokenClassification as ForTokens

    paddle.seed(3)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        type_vocab_size=2,
        num_labels=2,
    )
    theirs: Any = (ForTokens if head == "TokenClassification" else BertForQuestionAnswering)(config)
    theirs.eval()
    weights = {key: value.numpy() for key, value in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {**config.to_dict(), "architectures": [f"BertFor{head}"]})
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.ignored == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    ours = build_encoder(checkpoint.config, checkpoint.tensors)
    generator = np.random.default_rng(0)
    ids = paddle.to_tensor(generator.integers(1, 50, (3, 9)))
    types = paddle.to_tensor(generator.integers(0, 2, (3, 9)))
    mask = paddle.to_tensor((np.arange(9) < np.array([[9], [6], [2]])).astype(np.int64))
    with paddle.no_grad():
        found = ours(ids, types, mask)
        wanted = theirs(ids, types, attention_mask=mask)
        if head == "QuestionAnswering":
            wanted = paddle.stack(wanted, axis=-1)
    real = mask.numpy() == 1
    np.testing.assert_allclose(found.numpy()[real], wanted.numpy()[real], atol=1e-5)


def test_a_pooler_that_a_token_head_never_reads_is_left_out(tmp_path: Path) -> None:
    folder = tiny_paddlenlp(tmp_path, weights_file="model.safetensors")
    config = {**read_checkpoint(folder).config.to_dict()}
    assert config["head"] == "sequence"
    raw = (folder / "config.json").read_text().replace("ForSequence", "ForToken")
    (folder / "config.json").write_text(raw)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.head == "token"
    assert "pooler.weight" not in checkpoint.tensors
    assert "bert.pooler.dense.weight" in checkpoint.ignored


def test_a_head_stored_under_both_names_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    weights = load_file(folder / "model.safetensors")
    twice = {**weights, "qa_outputs.weight": weights["classifier.weight"]}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidModel, match="stored twice"):
        read_checkpoint(folder)
