"""Who answers for a sub-network: the supernet's slice, or a network of its own."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from compression.encoder import build_encoder, numpy_weights
from compression.evaluate import predict
from compression.networks import Networks
from compression.supernet import subnetwork_of
from tests.encoders import random_rows, random_weights, tiny_config, tiny_encoder


def test_a_sub_network_answers_with_the_supernets_weights_or_with_its_own() -> None:
    supernet, rows = tiny_encoder(1), random_rows(6)
    half, quarter = (subnetwork_of(supernet.config, Fraction(width)) for width in ("1/2", "1/4"))
    config = half.config(supernet.config)
    own = build_encoder(config, random_weights(config, 2))
    networks = Networks(supernet, {"w1_2": own})
    np.testing.assert_array_equal(networks.predict(half, rows), predict(own, rows))
    np.testing.assert_array_equal(
        networks.predict(quarter, rows), predict(supernet, rows, subnetwork=quarter)
    )
    for each in (half, quarter):
        found = networks.extracted(each, supernet.config)
        assert found.config == each.config(supernet.config)
        np.testing.assert_allclose(
            predict(found, rows), networks.predict(each, rows), atol=1e-5, err_msg=each.name
        )


def test_what_is_extracted_has_the_models_dropout() -> None:
    """The supernet may have learnt with another."""
    supernet = tiny_encoder(1, hidden_dropout=0.0, attention_dropout=0.0)
    half = subnetwork_of(supernet.config, Fraction(1, 2))
    found = Networks(supernet).extracted(half, tiny_config())
    assert found.config.hidden_dropout == 0.1
    weights, whole = numpy_weights(found), numpy_weights(supernet)
    np.testing.assert_array_equal(
        weights["layers.0.ffn.intermediate.weight"],
        whole["layers.0.ffn.intermediate.weight"][:, :8],
    )
