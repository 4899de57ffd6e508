"""Three functions that paddle has, with a faster backward on the CPU.

Forward is paddle's own. Measured on one thread of an AMD Zen 3 core, 800 tokens, width
384, 1,536 neurons, forward and backward: linear 41 ms for 49, gelu 11.2 for 13.6, norm
3.3 for 5.6. What paddle's backward spends beyond its products goes to sums over rows,
which a product with a vector of ones does thirty times faster, and to temporaries.

On a GPU, and in a traced (static) graph, which is only ever run forward, they are
paddle's own. Shapes: N rows (any leading axes), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.nn import functional as F

_SQRT_HALF = 0.7071067811865476
_INVERSE_SQRT_TWO_PI = 0.3989422804014327


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, I] @ weight [I, O] + bias [O] -> [N, O]."""
    return _Linear.apply(x, weight, bias) if _differentiates(x) else F.linear(x, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """x [N, H] to mean 0 and variance 1 over H, times weight [H], plus bias [H].

    Unlike paddle 3.3.1's, its gradient for x is right whether or not the weight's is wanted.
    """
    if _differentiates(x):
        return _LayerNorm.apply(x, weight, bias, epsilon)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), exact, not the tanh approximation."""
    return _Gelu.apply(x) if _differentiates(x) else F.gelu(x)


def _differentiates(x: Tensor) -> bool:
    """On the CPU: a GPU's own kernels are good, and mixed precision knows them."""
    return bool(paddle.in_dynamic_mode() and paddle.is_grad_enabled() and x.place.is_cpu_place())


def _wanted(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, None for inputs that stop them: paddle takes no others."""
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


def _column_sums(x: Tensor) -> Tensor:  # [N, O] -> [O]
    return paddle.matmul(paddle.ones([1, x.shape[0]]), x).reshape([-1])


class _Linear(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wanted = [not each.stop_gradient for each in (x, weight, bias)]
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensor()
        inputs, outputs = weight.shape
        rows, grads = x.reshape([-1, inputs]), grad.reshape([-1, outputs])
        return _wanted(
            ctx,
            paddle.matmul(grad, weight, transpose_y=True),
            paddle.matmul(rows, grads, transpose_x=True),
            _column_sums(grads),
        )


class _LayerNorm(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wanted = [not each.stop_gradient for each in (x, weight, bias)]
        ctx.epsilon = epsilon
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensor()
        hidden = weight.shape[0]
        rows, grads = x.reshape([-1, hidden]), grad.reshape([-1, hidden])
        mean = paddle.full([hidden, 1], 1.0 / hidden)  # a product with it is the mean over H
        centred = rows - paddle.matmul(rows, mean)
        scale = paddle.rsqrt(paddle.matmul(centred.square(), mean) + ctx.epsilon)  # [N, 1]
        normal = centred.multiply_(scale)
        weighted = grads * weight
        back = weighted - paddle.matmul(weighted, mean)
        back = back.subtract_(normal * paddle.matmul(weighted.multiply_(normal), mean))
        return _wanted(
            ctx,
            back.multiply_(scale).reshape(grad.shape),
            _column_sums(normal.multiply_(grads)),
            _column_sums(grads),
        )


class _Gelu(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensor()
        cumulative = paddle.erf(x * _SQRT_HALF).scale_(0.5, 0.5)  # Phi(x)
        density = x.square().scale_(-0.5).exp_().scale_(_INVERSE_SQRT_TWO_PI)
        return density.multiply_(x).add_(cumulative).multiply_(grad)
