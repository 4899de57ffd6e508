"""Training with the rows of the word embedding that the data uses."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from compression.batches import Encoded, make_batch
from compression.encoder import numpy_weights
from compression.spec import FineTuneSpec
from compression.token_rows import WORD, put_back, used_tokens, with_token_rows
from compression.training import Optimizer, fine_tune
from tests.encoders import CLASSIFICATION, random_rows, tiny_encoder

PAD = 0


def data_of_even_tokens() -> Encoded:
    rows = random_rows(24, labels=2)
    ids = [[each - each % 2 + 2 for each in row] for row in rows.input_ids]
    limit = tiny_encoder().config.vocab_size - 1
    return Encoded(
        [[min(each, limit - limit % 2) for each in row] for row in ids],
        rows.token_type_ids,
        rows.labels,
    )


def test_the_tokens_are_those_of_the_rows_and_padding() -> None:
    data = Encoded([[7, 3], [3, 9, 4]], [[0, 0], [0, 0, 0]], np.array([0, 1]))
    assert used_tokens(data, pad_id=1).tolist() == [1, 3, 4, 7, 9]


def test_the_function_of_the_used_tokens_is_the_same_and_their_weights_are_shared() -> None:
    encoder, data = tiny_encoder(), data_of_even_tokens()
    tokens = used_tokens(data, pad_id=PAD)
    lean = with_token_rows(encoder, tokens)
    batch = make_batch(data, range(8), pad_id=PAD)
    np.testing.assert_array_equal(lean(*batch.inputs).numpy(), encoder(*batch.inputs).numpy())
    assert len(tokens) == lean.config.vocab_size < encoder.config.vocab_size
    assert lean.state_dict().keys() == encoder.state_dict().keys()
    shared = dict(encoder.named_parameters())
    for name, parameter in lean.named_parameters():
        assert (parameter.data_ptr() == shared[name].data_ptr()) == (name != WORD), name


def test_a_token_that_was_not_named_is_an_error() -> None:
    encoder = tiny_encoder()
    lean = with_token_rows(encoder, np.array([0, 2, 4]))
    ids = paddle.to_tensor([[2, 3]])
    with pytest.raises(ValueError, match="id"):
        lean(ids, paddle.zeros_like(ids), paddle.ones_like(ids))


def test_put_back_writes_the_used_rows_and_decays_the_others() -> None:
    encoder = tiny_encoder()
    before = numpy_weights(encoder)[WORD]
    tokens = np.array([0, 2, 5])
    lean = with_token_rows(encoder, tokens)
    trained = np.arange(3 * before.shape[1], dtype=np.float32).reshape(3, -1)
    lean.embeddings.word.weight.set_value(trained)
    put_back(lean, encoder, tokens, decay=0.5)
    after = numpy_weights(encoder)[WORD]
    np.testing.assert_array_equal(after[tokens], trained)
    others = np.delete(np.arange(len(before)), tokens)
    np.testing.assert_array_equal(after[others], before[others] * np.float32(0.5))


def test_a_training_ends_with_the_weights_of_one_with_the_whole_vocabulary() -> None:
    data = data_of_even_tokens()
    spec = FineTuneSpec(
        epochs=3, batch_size=24, learning_rate=1e-2, weight_decay=0.5, max_grad_norm=0.5
    )
    calm = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "num_labels": 2}
    tuned, whole = tiny_encoder(**calm), tiny_encoder(**calm)
    fine_tune(tuned, data, spec, CLASSIFICATION, seed=1, on_step=lambda step: None)
    optimizer = Optimizer(whole, spec, steps=3)
    for _ in range(3):
        batch = make_batch(data, range(24), pad_id=PAD)
        CLASSIFICATION.label_loss(whole(*batch.inputs), batch).backward()
        optimizer.step()
    before, ours = numpy_weights(tiny_encoder(**calm)), numpy_weights(tuned)
    unused = np.setdiff1d(np.arange(len(before[WORD])), used_tokens(data, pad_id=PAD))
    assert len(unused) and np.abs(ours[WORD][unused] - before[WORD][unused]).max() > 1e-4
    for name, value in numpy_weights(whole).items():
        # A key's bias has no gradient but rounding's, which AdamW makes as large as any.
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(ours[name], value, atol=2e-4, err_msg=name)
