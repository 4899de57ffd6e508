from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from compression.cost import flops, parameters
from compression.teachers import read_checkpoint, read_config
from tests.builders import bert_config, tiny_bert, write_json


def test_parameters_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(tiny_bert(tmp_path, num_labels=3))
    counted = sum(array.size for array in checkpoint.tensors.values())
    assert parameters(checkpoint.config) == counted


def test_bert_base_has_its_published_size(tmp_path: Path) -> None:
    config = bert_config(
        vocab_size=30522, layers=12, heads=12, hidden=768, ffn=3072, num_labels=None,
        max_positions=512,
    )  # fmt: skip
    write_json(tmp_path / "config.json", config)
    encoder = read_config(tmp_path).encoder
    assert parameters(encoder) == 109_482_240
    # 2 * 85 M weights of the linear layers for each of 128 tokens, and attention: about 22.4 G.
    assert abs(flops(encoder, 128) / 22.35e9 - 1) < 0.01


def test_flops_by_hand(tmp_path: Path) -> None:
    encoder = read_config(tiny_bert(tmp_path, layers=1, heads=2, hidden=8, ffn=16)).encoder
    tokens = 5
    attention = 4 * tokens * 8 * 8 + 2 * tokens * tokens * 8
    by_hand = 2 * (attention + 2 * tokens * 8 * 16 + 8 * 8)
    assert flops(encoder, tokens) == by_hand


def test_half_the_width_halves_what_layers_cost(tmp_path: Path) -> None:
    encoder = read_config(tiny_bert(tmp_path, num_labels=None)).encoder
    half = encoder.narrowed(Fraction(1, 2))
    pooler = 2 * encoder.hidden**2
    assert flops(half, 16) - pooler == (flops(encoder, 16) - pooler) // 2
    assert parameters(half) < parameters(encoder)
