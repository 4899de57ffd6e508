"""What PaddleSlim 2.6.0 and PaddleNLP 2.8.1 need to run, and run right, on Paddle 3.3.1.

`apply` patches their classes, and importing this module already replaces paddle's
MultiHeadAttention and encoder forwards (PaddleSlim's nlp_utils does): it is for the
reference process alone, which serves nothing else.

| what is wrong | mended by |
| --- | --- |
| SuperEmbedding and SuperLayerNorm pass keyword-only arguments by position | `_*_init` |
| SuperLayerNorm.forward unpacks a tensor: an error, or a wrong tensor at batch size 3 | `_norm` |
| the patched attention lacks the scale 1/sqrt(head_dim) | `_scaled` |
| BertModel.forward does not know the tutorial's pair of masks | `_bert_forward` |
| PaddleNLP's norms have epsilon 1e-5, whatever the model was trained with | `set_epsilon` |
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F
from paddlenlp.transformers import BertModel
from paddleslim.nas.ofa.layers import SuperEmbedding, SuperLayerNorm

# After paddlenlp, which patches the same classes: the last import wins.
from paddleslim.nas.ofa.utils import nlp_utils

MASKED = -1e9  # as in the tutorial


def apply() -> None:
    """Patches the classes; a second call changes nothing."""
    SuperEmbedding.__init__ = _embedding_init
    SuperLayerNorm.__init__ = _norm_init
    SuperLayerNorm.forward = _norm
    nn.MultiHeadAttention._prepare_qkv = _scaled
    BertModel.forward = _bert_forward


def set_epsilon(model: nn.Layer, epsilon: float) -> None:
    """Gives every norm the checkpoint's epsilon; to be called before Convert, which copies it."""
    for layer in model.sublayers():
        if isinstance(layer, nn.LayerNorm):
            layer._epsilon = epsilon


def _embedding_init(
    self: SuperEmbedding,
    num_embeddings: int,
    embedding_dim: int,
    candidate_config: dict[str, Any],
    padding_idx: int | None = None,
    sparse: bool = False,
    weight_attr: Any = None,
    name: str | None = None,
) -> None:
    nn.Embedding.__init__(
        self,
        num_embeddings,
        embedding_dim,
        padding_idx=padding_idx,
        sparse=sparse,
        weight_attr=weight_attr,
        name=name,
    )
    self.candidate_config = candidate_config
    self.cur_config = None
    self.expand_ratio = candidate_config.get("expand_ratio")
    widest = max(self.expand_ratio) if self.expand_ratio else 1
    self.base_output_dim = int(embedding_dim / widest)


def _norm_init(
    self: SuperLayerNorm,
    normalized_shape: int,
    epsilon: float = 1e-5,
    weight_attr: Any = None,
    bias_attr: Any = None,
    name: str | None = None,
) -> None:
    nn.LayerNorm.__init__(
        self,
        normalized_shape,
        epsilon,
        weight_attr=weight_attr,
        bias_attr=bias_attr,
        name=name,
    )
    self.cur_config = None


def _norm(self: SuperLayerNorm, x: Tensor) -> Tensor:
    """The hidden size is not elastic in this recipe, so nothing is sliced."""
    self.cur_config = {"prune_dim": x.shape[-1]}
    return F.layer_norm(x, x.shape[-1], self.weight, self.bias, self._epsilon)


def _scaled(self: nn.MultiHeadAttention, *inputs: Any) -> tuple[Any, ...]:
    """PaddleSlim's projections, with the scale that its attention then forgets."""
    query, *others = nlp_utils._prepare_qkv(self, *inputs)
    return (query * self.head_dim**-0.5, *others)


def _bert_forward(
    self: BertModel,
    input_ids: Tensor,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Any = (None, None),
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The tutorial's: `attention_mask` is (mask added to the scores or None, head mask or None).

    Without a mask, padding is told by its id.
    """
    mask, head_mask = attention_mask
    if mask is None:
        padding = (input_ids == self.pad_token_id).astype(paddle.get_default_dtype())
        mask = padding.unsqueeze([1, 2]) * MASKED  # [B, 1, 1, T]
    embedded = self.embeddings(
        input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids
    )
    sequence = self.encoder(embedded, [mask, head_mask])
    return sequence, self.pooler(sequence)
