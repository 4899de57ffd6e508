"""The encoder against PaddleNLP's own BERT, and what padding must not do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from compression.batches import make_batch, pad
from compression.encoder import build_encoder, numpy_weights, with_new_head
from compression.errors import InvalidModel
from compression.evaluate import largest_difference, predict
from compression.teachers import parameter_shapes, read_checkpoint, write_checkpoint
from tests.encoders import as_tensors, random_rows, random_weights, tiny_config, tiny_encoder


def test_hidden_states_and_logits_equal_paddlenlps_own_bert(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paddlenlp 2.8.1 uses what its dependencies deprecate
        from paddlenlp.transformers import BertConfig, BertForSequenceClassification

    paddle.seed(0)
    theirs = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=16,
            max_position_embeddings=32,
            type_vocab_size=2,
            num_labels=3,
        )
    )
    theirs.eval()
    generator = np.random.default_rng(0)
    weights = {
        name: generator.normal(0, 0.3, value.shape).astype(np.float32)
        for name, value in theirs.state_dict().items()
    }
    theirs.set_state_dict(weights)
    save_file(weights, tmp_path / "model.safetensors")
    config = {**theirs.config.to_dict(), "architectures": ["BertForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.layout == "paddlenlp"
    ours = build_encoder(checkpoint.config, checkpoint.tensors)

    ids, types, mask = as_tensors(pad(random_rows(8), range(8), pad_id=0))
    states = ours.encode(ids, types, mask)
    answer = theirs(
        ids, token_type_ids=types, attention_mask=mask, output_hidden_states=True, return_dict=True
    )
    np.testing.assert_allclose(states.logits.numpy(), answer.logits.numpy(), atol=1e-5)
    real = mask.numpy().astype(bool)
    assert len(states.hidden) == len(answer.hidden_states) == 3
    for own, other in zip(states.hidden, answer.hidden_states, strict=True):
        np.testing.assert_allclose(own.numpy()[real], other.numpy()[real], atol=1e-5)


def test_padding_a_batch_further_changes_no_logit() -> None:
    encoder, data = tiny_encoder(), random_rows(6)
    close = encoder(*as_tensors(pad(data, range(6), pad_id=0)))
    wide = encoder(*as_tensors(pad(data, range(6), pad_id=0, length=30)))
    np.testing.assert_allclose(close.numpy(), wide.numpy(), atol=1e-6)


def test_a_row_alone_gives_the_logits_it_gives_among_others() -> None:
    encoder, data = tiny_encoder(), random_rows(5)
    together = encoder(*as_tensors(pad(data, range(5), pad_id=0))).numpy()
    for row in range(5):
        alone = encoder(*as_tensors(pad(data, [row], pad_id=0))).numpy()
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)


def test_gates_of_ones_change_nothing_and_a_gate_of_zero_does() -> None:
    encoder, data = tiny_encoder(), random_rows(4)
    inputs = as_tensors(pad(data, range(4), pad_id=0))
    plain = encoder(*inputs).numpy()
    ones = [paddle.ones([4]), paddle.ones([4])]
    np.testing.assert_array_equal(encoder.encode(*inputs, head_gates=ones).logits.numpy(), plain)
    closed = [paddle.to_tensor([1.0, 0.0, 1.0, 1.0]), paddle.ones([4])]
    gated = encoder.encode(*inputs, head_gates=closed).logits.numpy()
    assert np.abs(gated - plain).max() > 1e-4


def test_build_encoder_names_what_does_not_fit() -> None:
    config = tiny_config()
    weights = random_weights(config)
    lacking = {k: v for k, v in weights.items() if k != "pooler.bias"}
    with pytest.raises(InvalidModel, match=r"missing \['pooler.bias'\]"):
        build_encoder(config, lacking)
    with pytest.raises(InvalidModel, match=r"unexpected \['extra'\]"):
        build_encoder(config, {**weights, "extra": np.zeros(1, np.float32)})
    with pytest.raises(InvalidModel, match=r"pooler.bias has shape \[3\], expected \[24\]"):
        build_encoder(config, {**weights, "pooler.bias": np.zeros(3, np.float32)})


def test_a_new_head_is_seeded_and_leaves_the_rest() -> None:
    config = tiny_config(num_labels=None)
    full = random_weights(tiny_config())
    headless = {k: v for k, v in full.items() if not k.startswith(("classifier", "pooler"))}
    config_5, first = with_new_head(config, headless, num_labels=5, seed=3)
    _, again = with_new_head(config, headless, num_labels=5, seed=3)
    _, other = with_new_head(config, headless, num_labels=5, seed=4)
    encoder = build_encoder(config_5, first)
    assert first["classifier.weight"].shape == (24, 5)
    np.testing.assert_array_equal(first["pooler.weight"], again["pooler.weight"])
    assert np.abs(first["classifier.weight"] - other["classifier.weight"]).max() > 0
    kept = numpy_weights(encoder)
    for name, value in headless.items():
        np.testing.assert_array_equal(kept[name], value)


def test_a_token_head_classifies_every_token_and_has_no_pooler(tmp_path: Path) -> None:
    encoder, data = tiny_encoder(head="token"), random_rows(5)
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes == parameter_shapes(encoder.config)
    assert not any(name.startswith("pooler") for name in shapes)
    found = predict(encoder, data)
    for row, logits in enumerate(found):
        assert logits.shape == (len(data.input_ids[row]), 3)
        alone = encoder.encode(*make_batch(data, [row], pad_id=0).inputs)
        by_hand = encoder.classifier(alone.hidden[-1])[0]
        np.testing.assert_allclose(logits, by_hand.numpy(), atol=1e-5)
    write_checkpoint(tmp_path, encoder.config, numpy_weights(encoder), None)
    assert read_checkpoint(tmp_path).config == encoder.config
    config, weights = with_new_head(
        tiny_config(num_labels=None),
        random_weights(tiny_config()),
        num_labels=5,
        head="token",
        seed=0,
    )
    assert {name: value.shape for name, value in weights.items()} == parameter_shapes(config)
    new = build_encoder(config, weights)
    assert largest_difference(predict(new, data), predict(new, data)) == 0
