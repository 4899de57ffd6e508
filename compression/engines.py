"""Which jobs PaddleSlim's recipe can run, told before anything is trained. Paddle-free."""

from __future__ import annotations

from fractions import Fraction

from compression.errors import InvalidSpec
from compression.spec import Spec
from compression.teachers.config import EncoderConfig

POINTER = "/engine"
ACTIVATIONS = ("gelu", "relu")  # those of ours that paddle.nn.functional calls the same


def check_paddleslim(spec: Spec, config: EncoderConfig) -> None:
    """InvalidSpec where the engine paddleslim cannot do the job, or would do another one.

    It knows BERT sentence and sentence-pair classifiers whose layers are all of one size.
    """
    if config.family != "bert":
        raise _refused(f"knows the family bert, not {config.family}")
    if spec.task.kind != "classification":
        raise _refused(f"knows classification of sentences and pairs, not {spec.task.kind}")
    if config.activation not in ACTIVATIONS:
        raise _refused(f"knows the activations {', '.join(ACTIVATIONS)}, not {config.activation}")
    heads, ffn = config.heads[0], config.ffn[0]
    if set(config.heads) != {heads} or set(config.ffn) != {ffn}:
        raise _refused("knows models whose layers are all of one size, and this one's are not")
    if heads * config.head_dim != config.hidden:
        raise _refused(
            f"knows models whose {heads} heads of {config.head_dim} units are as wide as the "
            f"hidden size, {config.hidden}"
        )
    for i, width in enumerate(spec.supernet.width_mults):
        if not rounds_exactly(width, heads=heads, head_dim=config.head_dim, ffn=ffn):
            raise InvalidSpec(
                f"the engine paddleslim rounds the width {width} of {heads} heads and {ffn} "
                "neurons to other numbers; leave it out, or use the engine widthwise",
                pointer=f"/supernet/width_mults/{i}",
            )
    if spec.supernet.per_layer is not None:
        raise InvalidSpec(
            "the engine paddleslim knows no widths that differ between layers; leave per_layer "
            "out, or use the engine widthwise",
            pointer="/supernet/per_layer",
        )
    for i, depth in enumerate(spec.supernet.depth_mults):
        if depth != 1:
            raise InvalidSpec(
                f"the engine paddleslim trains the full depth alone, not {depth} of the layers; "
                "leave it out, or use the engine widthwise",
                pointer=f"/supernet/depth_mults/{i}",
            )


def rounds_exactly(width: Fraction, *, heads: int, head_dim: int, ffn: int) -> bool:
    """Whether PaddleSlim's decimal arithmetic keeps the very heads and neurons of the fraction.

    It cuts `decimal * units` down to whole units, the number of heads likewise, and after each
    forward divides that by the decimal to have all heads back.
    """
    decimal = float(width)
    kept = int(heads * decimal)
    return (
        kept == heads * width
        and int(kept / decimal) == heads
        and int(decimal * (heads * head_dim)) == heads * head_dim * width
        and int(decimal * ffn) == ffn * width
    )


def _refused(why: str) -> InvalidSpec:
    return InvalidSpec(f"the engine paddleslim {why}; use the engine widthwise", pointer=POINTER)
