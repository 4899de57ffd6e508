"""Dropout by numbers: the same key the same masks, and what they do to a tensor."""

from __future__ import annotations

import numpy as np
import paddle

from compression.noise import Noise, dropout


def test_the_same_key_gives_the_same_masks_and_another_key_others() -> None:
    x = paddle.ones([40, 50])
    one, same, other = (Noise(key).dropped(x, 0.3).numpy() for key in ([1, 2], [1, 2], [1, 3]))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_a_share_is_dropped_and_the_mean_stays() -> None:
    found = Noise([0]).dropped(paddle.ones([400, 500]), 0.25).numpy()
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((found == 0).mean() - 0.25) < 0.005


def test_masks_of_one_pass_differ_and_none_without_noise_or_rate() -> None:
    noise, x = Noise([5]), paddle.ones([64])
    assert (noise.dropped(x, 0.5).numpy() != noise.dropped(x, 0.5).numpy()).any()
    assert dropout(x, 0.5, None) is x
    assert noise.dropped(x, 0.0) is x
