"""Our backward passes against paddle's, and what their inputs may be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle import Tensor
from paddle.nn import functional as F

from compression import kernels

REAL = paddle.to_tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]])  # the tokens
MASK = kernels.expanded((1.0 - REAL).unsqueeze([1, 2]) * -1e9, 3)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]]
CASES = {
    "linear": (kernels.linear, F.linear, ((3, 5, 4), (4, 6), (6,))),
    "layer_norm": (
        lambda *inputs: kernels.layer_norm(*inputs, 1e-5),
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5),
        ((3, 5, 8), (8,), (8,)),
    ),
    "feed_forward": (
        kernels.gelu_feed_forward,
        lambda x, *pairs: F.linear(F.gelu(F.linear(x, *pairs[:2])), *pairs[2:]),
        ((3, 5, 4), (4, 12), (12,), (12, 4), (4,)),
    ),
    "attention": (
        lambda *inputs: kernels.attention(*inputs, MASK),
        lambda query, key, value: paddle.matmul(
            F.softmax(paddle.matmul(query, key, transpose_y=True) + MASK), value
        ),
        ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
    ),
    "squared_distance": (
        lambda own: kernels.squared_distance(own, paddle.ones([2, 5, 4]), REAL),
        lambda own: ((own - 1.0).square() * REAL.unsqueeze(-1)).sum(),
        ((2, 5, 4),),
    ),
}


def with_gradients(
    function: Callable[..., Tensor], arrays: list[np.ndarray], weights: np.ndarray
) -> list[np.ndarray]:
    inputs = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
    result = function(*inputs)
    (result * paddle.to_tensor(weights)).sum().backward()
    return [result.numpy(), *(each.grad.numpy() for each in inputs)]


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_are_paddles(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    shape = theirs(*(paddle.to_tensor(array) for array in arrays)).shape
    weights = generator.normal(size=shape).astype(np.float32)
    for own, other in zip(
        with_gradients(ours, arrays, weights), with_gradients(theirs, arrays, weights), strict=True
    ):
        np.testing.assert_allclose(own, other, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_an_input_may_stop_its_gradient_and_the_others_stay_right(frozen: int) -> None:
    """paddle 3.3.1's own layer_norm passes a wrong gradient to x where the weight is frozen."""
    generator = np.random.default_rng(1)
    arrays = [generator.normal(size=shape).astype(np.float32) for shape in ((6, 8), (8,), (8,))]
    weights = paddle.to_tensor(generator.normal(size=(6, 8)).astype(np.float32))

    def gradients(stopped: int | None) -> list[np.ndarray | None]:
        inputs = [
            paddle.to_tensor(array, stop_gradient=i == stopped) for i, array in enumerate(arrays)
        ]
        (kernels.layer_norm(*inputs, 1e-5) * weights).sum().backward()
        return [None if each.grad is None else each.grad.numpy() for each in inputs]

    every, some = gradients(None), gradients(frozen)
    for i in range(3):
        if i == frozen:
            assert some[i] is None
        else:
            np.testing.assert_array_equal(some[i], every[i])


def test_without_gradients_paddles_own_function_runs() -> None:
    x = paddle.to_tensor([[1.0, 2.0]], stop_gradient=False)
    with paddle.no_grad():
        assert kernels.linear(x, paddle.ones([2, 3]), paddle.ones([3])).stop_gradient


def test_an_expanded_mask_is_the_mask_for_every_head_and_query() -> None:
    mask = paddle.to_tensor([[0.0, -1e9], [0.0, 0.0]]).reshape([2, 1, 1, 2])
    np.testing.assert_array_equal(
        kernels.expanded(mask, 3).numpy(), mask.expand([2, 3, 2, 2]).numpy()
    )
