"""PaddleSlim's OFA-BERT recipe, step by step as its tutorial runs it (demo/ofa/bert).

Convert, OFA, DistillConfig, compute_neuron_head_importance, reorder_head and reorder_neuron,
dynabert_config: all PaddleSlim's own, on PaddleNLP's BERT, mended as `mends` lists. Only in the
process of `python -m compression.reference` and of what measures against it.

The loss of one width is `lambda_rep * sum over states of MSE + lambda_logit * cross-entropy`:
states are the embedding output and each layer's output, `calc_distill_loss` means each MSE over
all positions and units (lambda_distill multiplies the sum), the cross-entropy is a mean over
rows. All widths' gradients are summed before one optimizer step. What differs from ours:

- Its MSE counts padded positions; ours means over real tokens. On rows of equal length they agree.
- Its teacher runs once for each width, ours once for each batch; its answer is the same.
- Its batches are padded to their longest row; ours hold the same rows' tokens without padding.
- Its warm-up starts at a rate of 0, and it takes `max_grad_norm` without using it: no clipping.

And from the tutorial, because it would be wrong or would not run: gradients are cleared for each
batch of the importance; `ofa.model` alone is put into training mode and optimised, not the
teacher; 1 is always among the widths of the search space, whose largest width is the size of the
converted network; `OFA.export` is not used (it leaves the number of heads at the full one).

Letters: B rows, T tokens, L layers, A heads, F neurons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F
from paddlenlp.transformers import BertConfig, BertForSequenceClassification
from paddleslim.nas.ofa import OFA, DistillConfig, utils
from paddleslim.nas.ofa.convert_super import Convert, supernet
from paddleslim.nas.ofa.utils import nlp_utils

from compression.batches import Encoded, pad
from compression.reference import mends
from compression.teachers import FAMILIES, EncoderConfig

Weights = Mapping[str, np.ndarray]
(LAYOUT,) = (layout for layout in FAMILIES["bert"].layouts if layout.name == "paddlenlp")


@dataclasses.dataclass(frozen=True)
class ReferenceBatch:
    """What the tutorial's loader yields, int64 [B, T] twice and [B]; labels may be absent."""

    input_ids: Tensor
    token_type_ids: Tensor
    labels: Tensor | None


class Stepper(Protocol):
    """One update with the gradients at hand. The loop clears them."""

    def step(self) -> None: ...


class ReferenceLoop:
    """The tutorial's models and its training loop: `loop.step(batch)` is one optimizer step.

    `weights` (our names) are those of the fine-tuned model: the teacher, and where the supernet
    starts. `make_optimizer` gets the student. As shipped the teacher's forward records gradients
    that nothing uses; `teacher_records` False runs it under no_grad.
    """

    def __init__(
        self,
        config: EncoderConfig,
        weights: Weights,
        widths: Sequence[Fraction],
        *,
        lambda_rep: float,
        lambda_logit: float,
        make_optimizer: Callable[[nn.Layer], Stepper],
        dropouts: tuple[float, float] = (0.0, 0.0),
        teacher_records: bool = True,
    ) -> None:
        mends.apply()
        self.config = config
        self.widths = [float(width) for width in widths]
        self.lambda_logit = lambda_logit
        student = bert(config, weights, dropouts)
        start = dict(student.named_parameters())
        student = Convert(supernet(expand_ratio=sorted({*self.widths, 1.0}))).convert(student)
        utils.set_state_dict(student, start)
        teacher = bert(config, weights, dropouts)
        if not teacher_records:
            teacher.forward = paddle.no_grad()(teacher.forward)
        self.ofa = OFA(
            student,
            distill_config=DistillConfig(
                lambda_distill=lambda_rep,
                teacher_model=teacher,
                mapping_layers=[
                    "bert.embeddings",
                    *(f"bert.encoder.layers.{i}" for i in range(config.layers)),
                ],
            ),
            elastic_order=["width"],
        )
        self.ofa.set_epoch(0)
        self.ofa.set_task("width")
        self.optimizer = make_optimizer(self.student)
        self.student.train()

    @property
    def student(self) -> nn.Layer:
        return self.ofa.model

    def step(self, batch: ReferenceBatch) -> list[float]:
        """One optimizer step; the loss of each width, in the order of `widths`."""
        losses = []
        for width in self.widths:
            logits, targets = self._forward(batch, width)
            logit_loss = soft_cross_entropy(logits, targets.detach())
            loss = self.ofa.calc_distill_loss() + self.lambda_logit * logit_loss
            loss.backward()
            losses.append(float(loss))
        self.optimizer.step()
        self.student.clear_gradients()
        return losses

    def logits(self, batch: ReferenceBatch, width: Fraction) -> np.ndarray:
        """The supernet's [B, classes] at one width, in evaluation mode (training mode after it)."""
        self.student.eval()
        with paddle.no_grad():
            logits, _ = self._forward(batch, float(width))
        self.student.train()
        return logits.numpy()

    def _forward(self, batch: ReferenceBatch, width: float) -> tuple[Tensor, Tensor]:
        self.ofa.set_net_config(utils.dynabert_config(self.ofa, width))
        return self.ofa(batch.input_ids, batch.token_type_ids, attention_mask=[None, None])

    def importance(
        self, batches: Sequence[ReferenceBatch], on_batch: Callable[[int], None] = lambda done: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores of heads [L, A] and neurons [L, F], summed over batches; at full width.

        PaddleSlim's function, called for one batch at a time with the gradients cleared
        in between: over several batches it would add up absolute values of running sums.
        """
        heads: Any = 0
        neurons: Any = 0
        self.student.eval()
        self.ofa.current_config = None  # full width, whatever the last forward ran at
        for done, batch in enumerate(batches, start=1):
            head_scores, neuron_scores = nlp_utils.compute_neuron_head_importance(
                "classification",
                self.student,
                [(batch.input_ids, batch.token_type_ids, batch.labels)],
                num_layers=self.config.layers,
                num_heads=self.config.heads[0],
            )
            self.student.clear_gradients()
            heads = heads + head_scores.numpy()
            neurons = neurons + np.stack(neuron_scores)
            on_batch(done)
        self.student.train()
        return heads, neurons

    def reorder(self, heads: Sequence[np.ndarray], neurons: Sequence[np.ndarray]) -> None:
        """The tutorial's reorder_neuron_head: each layer's units into these orders."""
        for layer, *orders in zip(self.student.bert.encoder.layers, heads, neurons, strict=True):
            head_order, neuron_order = map(paddle.to_tensor, orders)
            nlp_utils.reorder_head(layer.self_attn, head_order)
            nlp_utils.reorder_neuron(layer.linear1.fn, neuron_order, dim=1)
            nlp_utils.reorder_neuron(layer.linear2.fn, neuron_order, dim=0)

    def weights(self) -> dict[str, np.ndarray]:
        """The full-width supernet's weights by our names."""
        return {our_name(name): value.numpy() for name, value in self.student.named_parameters()}


def bert(
    config: EncoderConfig, weights: Weights, dropouts: tuple[float, float]
) -> BertForSequenceClassification:
    """PaddleNLP's BERT with these weights; `dropouts` are of hidden states and attention."""
    hidden_dropout, attention_dropout = dropouts
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads[0],
            intermediate_size=config.ffn[0],
            hidden_act=config.activation,
            hidden_dropout_prob=hidden_dropout,
            attention_probs_dropout_prob=attention_dropout,
            max_position_embeddings=config.max_positions,
            type_vocab_size=config.type_vocab_size,
            pad_token_id=config.pad_token_id,
            num_labels=config.num_labels,
        )
    )
    mends.set_epsilon(model, config.layer_norm_eps)
    for name, parameter in model.named_parameters():
        parameter.set_value(weights[our_name(name)])
    return model


def our_name(name: str) -> str:
    """Our name for a parameter of PaddleNLP's BERT, converted by PaddleSlim or not."""
    ours = LAYOUT.ours(FAMILIES["bert"].normalised(name.replace(".fn.", ".")))
    if ours is None:
        raise ValueError(f"PaddleNLP's BERT has a parameter {name} that is unknown here")
    return ours


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy against the teacher's softmax, both [B, classes]."""
    return -(F.softmax(targets, axis=-1) * F.log_softmax(logits, axis=-1)).sum(axis=-1).mean()


class TutorialOptimizer:
    """AdamW with linear warm-up (from a rate of 0) and linear decay; biases and norms not decayed.

    Both of the tutorial's: it takes a `max_grad_norm` and does not use it, so neither does this.
    """

    def __init__(
        self,
        student: nn.Layer,
        *,
        steps: int,
        learning_rate: float,
        warmup_steps: int,
        weight_decay: float,
    ) -> None:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            return max(0.0, (steps - step) / max(1, steps - warmup_steps))

        decayed = {
            parameter.name
            for name, parameter in student.named_parameters()
            if "bias" not in name and "norm" not in name
        }
        self.rate = paddle.optimizer.lr.LambdaDecay(learning_rate, factor)
        self.optimizer = paddle.optimizer.AdamW(
            self.rate,
            epsilon=1e-8,
            parameters=student.parameters(),
            weight_decay=weight_decay,
            apply_decay_param_fun=lambda name: name in decayed,
        )

    def step(self) -> None:
        self.optimizer.step()
        self.rate.step()


def reference_batch(
    data: Encoded, rows: Sequence[int] | np.ndarray, *, pad_id: int, length: int | None = None
) -> ReferenceBatch:
    """These rows, padded to the longest of them unless `length` (tokens) is given."""
    arrays = pad(data, rows, pad_id=pad_id, length=length)
    labels = data.take(rows).labels
    return ReferenceBatch(
        paddle.to_tensor(arrays["input_ids"]),
        paddle.to_tensor(arrays["token_type_ids"]),
        None if labels is None else paddle.to_tensor(labels),
    )


def shuffled_batches(
    data: Encoded, *, batch_size: int, steps: int, seed: int, pad_id: int
) -> Iterator[ReferenceBatch]:
    """`steps` batches of the tutorial's loader: each epoch all rows in an order of its own."""
    done = epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(data))
        for start in range(0, len(order), batch_size):
            if done == steps:
                return
            yield reference_batch(data, order[start : start + batch_size], pad_id=pad_id)
            done += 1
        epoch += 1
