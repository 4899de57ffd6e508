"""Small random encoders and batches for the tests of the method."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from compression.batches import Encoded
from compression.encoder import Encoder, build_encoder
from compression.spec import TaskSpec
from compression.tasks import make_task
from compression.teachers.config import EncoderConfig

CLASSIFICATION = make_task(TaskSpec(), ("0", "1", "2"))


def tiny_config(**changes: Any) -> EncoderConfig:
    values: dict[str, Any] = {
        "family": "bert",
        "vocab_size": 50,
        "hidden": 24,
        "layers": 2,
        "heads": (4, 4),
        "head_dim": 6,
        "ffn": (16, 16),
        "max_positions": 32,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "activation": "gelu",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
        "num_labels": 3,
    }
    return EncoderConfig(**{**values, **changes})


def random_weights(config: EncoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter random, biases and norms too, so that no term can hide."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, value in Encoder(config).state_dict().items():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        weights[name] = generator.normal(centre, 0.3, value.shape).astype(np.float32)
    return weights


def tiny_encoder(seed: int = 0, **changes: Any) -> Encoder:
    config = tiny_config(**changes)
    return build_encoder(config, random_weights(config, seed))


def random_rows(count: int, *, seed: int = 0, labels: int = 3, vocabulary: int = 50) -> Encoded:
    """Rows of 3 to 12 tokens, the second half of each of token type 1."""
    generator = np.random.default_rng(seed)
    ids = [
        generator.integers(1, vocabulary, generator.integers(3, 13)).tolist() for _ in range(count)
    ]
    types = [[0] * (len(row) - len(row) // 2) + [1] * (len(row) // 2) for row in ids]
    return Encoded(ids, types, generator.integers(0, labels, count))


def gradients(encoder: Encoder) -> dict[str, np.ndarray]:
    return {
        name: parameter.grad.numpy()
        for name, parameter in encoder.named_parameters()
        if parameter.grad is not None
    }


def clear(encoder: Encoder) -> None:
    for parameter in encoder.parameters():
        parameter.clear_grad()


def as_tensors(arrays: dict[str, np.ndarray]) -> tuple[paddle.Tensor, ...]:
    return tuple(
        paddle.to_tensor(arrays[name]) for name in ("input_ids", "token_type_ids", "attention_mask")
    )
