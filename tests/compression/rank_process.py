"""One of two processes that add up a gradient; the first comes SECONDS late.

    python -m tests.compression.rank_process RANK SECONDS ENDPOINT ...

Lines that say that the first has come go from its standard output to the other's input.
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    rank, seconds, endpoints = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries print as they like

    import numpy as np
    import paddle

    from compression.ranks import join
    from tests.encoders import tiny_encoder

    def meet() -> None:
        if rank == 0:
            lines.write(b"\n")
        elif not sys.stdin.buffer.readline():
            sys.exit("the first process is gone")

    paddle.set_device("cpu")
    group = join(rank, endpoints, meet)
    model = tiny_encoder()
    model.classifier.weight.grad = paddle.full_like(model.classifier.weight, 1.0 + rank)
    if rank == 0:
        time.sleep(seconds)
    group.add_up_gradients(model)
    assert np.all(model.classifier.weight.grad.numpy() == 3.0)
    assert model.classifier.bias.grad is None  # no process had one


if __name__ == "__main__":
    main()
