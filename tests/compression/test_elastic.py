"""Slicing: what a narrow or shallow sub-network uses, and what it must not touch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from compression.batches import make_batch
from compression.encoder import build_encoder, numpy_weights
from compression.errors import InvalidSpec
from compression.supernet import (
    extract_weights,
    kept_layers,
    replaced_states,
    subnetwork_name,
    subnetwork_of,
)
from tests.encoders import clear, gradients, random_rows, tiny_encoder

WIDTHS = [Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)]


def test_the_full_width_subnetwork_is_the_encoder() -> None:
    encoder, batch = tiny_encoder(), make_batch(random_rows(4), range(4), pad_id=0)
    full = subnetwork_of(encoder.config, Fraction(1))
    np.testing.assert_array_equal(
        encoder(*batch.inputs).numpy(), encoder(*batch.inputs, subnetwork=full).numpy()
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_extraction_equals_the_sliced_supernet(width: Fraction) -> None:
    encoder, batch = tiny_encoder(), make_batch(random_rows(6), range(6), pad_id=0)
    subnetwork = subnetwork_of(encoder.config, width)
    small_config = encoder.config.narrowed(width)
    small = build_encoder(
        small_config, extract_weights(encoder.config, numpy_weights(encoder), subnetwork)
    )
    sliced = encoder.encode(*batch.inputs, subnetwork=subnetwork)
    alone = small.encode(*batch.inputs)
    np.testing.assert_array_equal(alone.logits.numpy(), sliced.logits.numpy())
    for own, shared in zip(alone.hidden, sliced.hidden, strict=True):
        np.testing.assert_array_equal(own.numpy(), shared.numpy())


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_gradients_outside_the_active_slice_are_exactly_zero(width: Fraction) -> None:
    encoder, batch = tiny_encoder(), make_batch(random_rows(6), range(6), pad_id=0)
    subnetwork = subnetwork_of(encoder.config, width)
    clear(encoder)
    encoder(*batch.inputs, subnetwork=subnetwork).square().sum().backward()
    found = gradients(encoder)
    for i in range(2):
        units, neurons = subnetwork.heads[i] * 6, subnetwork.ffn[i]
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.ffn"
        for part in ("query", "key", "value"):
            weight = found[f"{attention}.{part}.weight"]
            assert not weight[:, units:].any()
            assert not found[f"{attention}.{part}.bias"][units:].any()
            assert np.abs(weight[:, :units]).max() > 0
        assert not found[f"{attention}.output.weight"][units:].any()
        assert not found[f"{ffn}.intermediate.weight"][:, neurons:].any()
        assert not found[f"{ffn}.output.weight"][neurons:].any()
        assert np.abs(found[f"{ffn}.output.weight"][:neurons]).max() > 0


DEEP = {"layers": 6, "heads": (4,) * 6, "ffn": (16,) * 6}


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize(("width", "depth"), [("1", "1/2"), ("1/2", "2/3"), ("1/4", "1/6")])
def test_a_shallow_network_extracted_equals_the_sliced_supernet(
    width: str, depth: str, keep_last: bool
) -> None:
    encoder, batch = tiny_encoder(**DEEP), make_batch(random_rows(6), range(6), pad_id=0)
    subnetwork = subnetwork_of(
        encoder.config, Fraction(width), Fraction(depth), keep_last=keep_last
    )
    small = build_encoder(
        subnetwork.config(encoder.config),
        extract_weights(encoder.config, numpy_weights(encoder), subnetwork),
    )
    sliced, alone = (
        encoder.encode(*batch.inputs, subnetwork=subnetwork),
        small.encode(*batch.inputs),
    )
    assert len(alone.hidden) == len(sliced.hidden) == 1 + 6 * Fraction(depth)
    np.testing.assert_array_equal(alone.logits.numpy(), sliced.logits.numpy())
    for own, shared in zip(alone.hidden, sliced.hidden, strict=True):
        np.testing.assert_array_equal(own.numpy(), shared.numpy())


def test_layers_that_a_shallow_network_leaves_out_get_no_gradient() -> None:
    encoder, batch = tiny_encoder(**DEEP), make_batch(random_rows(6), range(6), pad_id=0)
    clear(encoder)
    subnetwork = subnetwork_of(encoder.config, Fraction(1, 2), Fraction(2, 3))
    encoder(*batch.inputs, subnetwork=subnetwork).square().sum().backward()
    found = gradients(encoder)
    touched = {int(name.split(".")[1]) for name in found if name.startswith("layers.")}
    assert touched == set(subnetwork.layers) == {0, 1, 3, 4}
    for layer in subnetwork.layers:
        weight = found[f"layers.{layer}.ffn.output.weight"]
        assert np.abs(weight[:8]).max() > 0
        assert not weight[8:].any()


@pytest.mark.parametrize(
    ("layers", "depth", "first", "last", "states"),
    [
        (6, "1", (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6)),
        (6, "1/2", (0, 2, 4), (1, 3, 5), (0, 2, 4, 6)),
        (6, "2/3", (0, 1, 3, 4), (0, 2, 3, 5), (0, 1, 3, 4, 6)),
        (4, "3/4", (0, 1, 2), (0, 1, 3), (0, 1, 2, 4)),
        (12, "1/12", (0,), (11,), (0, 12)),
    ],
)
def test_kept_layers_and_the_states_that_they_learn(
    layers: int, depth: str, first: tuple[int, ...], last: tuple[int, ...], states: tuple[int, ...]
) -> None:
    """By hand: floor(i / d), floor((i + 1) / d) - 1, and floor(i / d) up to the last state."""
    assert kept_layers(layers, Fraction(depth)) == first
    assert kept_layers(layers, Fraction(depth), keep_last=True) == last
    assert replaced_states(layers, Fraction(depth)) == states


@pytest.mark.parametrize("depth", ["3/4", "1/7", "1/12"])
def test_a_depth_that_cuts_a_layer_is_refused(depth: str) -> None:
    with pytest.raises(InvalidSpec, match=f"depth {depth} of the 6 layers is"):
        kept_layers(6, Fraction(depth))


def test_a_width_that_cuts_a_head_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="1/3 of the 4 heads of layer 0"):
        subnetwork_of(tiny_encoder().config, Fraction(1, 3))


def test_names_are_safe_as_folders() -> None:
    assert [subnetwork_name(w) for w in WIDTHS] == ["w1", "w3_4", "w1_2", "w1_4"]
    assert subnetwork_name(Fraction(1, 2), Fraction(1)) == "w1_2"
    assert subnetwork_name(Fraction(1, 2), Fraction(2, 3)) == "w1_2-d2_3"
