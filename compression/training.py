"""What both trainings share: optimizer, schedule, and the loop with what a long job needs.

A training says what the losses of a batch are; the loop does the rest. Everything random in step
n comes from the seed, n and the rows alone, so a training goes on from a checkpoint with the bits
of one that never stopped.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import paddle
from paddle import Tensor, nn

from compression.batches import Batch, Encoded, make_batch, sorted_batches, training_rows
from compression.checkpoint import Checkpoints, StageState
from compression.encoder import Encoder, load_weights, numpy_weights
from compression.errors import Interrupted, OutOfMemory, TrainingDiverged
from compression.layout import Packed
from compression.noise import Noise
from compression.parallel import Replicas, balanced
from compression.precision import Kind, Precision
from compression.ranks import ALONE, Group
from compression.report import TrainingReport
from compression.sampling import Sandwich, taken
from compression.supernet import Subnetwork
from compression.tasks.base import Task
from compression.token_rows import put_back, used_tokens, with_token_rows

HELD_OUT_SHARE = 10  # one row in ten of train judges a training that has a patience
HELD_OUT_ROWS = 1024  # at most
TOKENS_AT_ONCE = 512  # of a replica; one row may have more
TIMED_STEPS = 1000  # the newest ones, of which a step's median time is told
SHOWN_ROWS = 10

ACCUMULATORS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")  # of AdamW

T = TypeVar("T")
Ended = Literal["complete", "plateau", "time"]


class Schedule(Protocol):
    """What a training needs of a spec section."""

    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def evaluate_every(self) -> int | None: ...
    @property
    def micro_batch(self) -> int | Literal["auto"] | None: ...


def step_count(schedule: Schedule, rows: int) -> int:
    """Optimizer steps: epochs over the rows, at most max_steps, at least one."""
    steps = math.ceil(schedule.epochs * math.ceil(rows / schedule.batch_size))
    return max(1, min(steps, schedule.max_steps or steps))


class Optimizer:
    """AdamW with linear warm-up, linear decay to 0 and clipping by global norm.

    Biases and norms are not decayed, as in BERT. With `replicas` of the model its parameters
    are shared out: paddle updates each with one thread.
    """

    def __init__(
        self,
        model: nn.Layer,
        schedule: Schedule,
        *,
        steps: int,
        precision: Precision | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        warmup = round(schedule.warmup_fraction * steps)

        def factor(step: int) -> float:  # of the peak rate, for the step that comes next
            if step < warmup:
                return (step + 1) / warmup
            return max(0.0, (steps - step) / max(1, steps - warmup))

        decayed = {
            parameter.name
            for name, parameter in model.named_parameters()
            if not name.endswith(".bias") and ".norm." not in name
        }
        self.precision = precision or Precision()
        self.named = dict(model.named_parameters())
        self.rate = paddle.optimizer.lr.LambdaDecay(schedule.learning_rate, factor)
        self._schedule, self._factor = schedule, factor
        self._replicas = replicas
        count = len(replicas.members) if replicas else 1
        self._parts = [
            _Part(
                parameters,
                paddle.optimizer.AdamW(
                    self.rate,
                    parameters=parameters,
                    weight_decay=schedule.weight_decay,
                    apply_decay_param_fun=lambda name: name in decayed,
                ),
            )
            for parameters in balanced(
                model.parameters(), count, size=lambda parameter: int(parameter.size)
            )
        ]

    def step(self) -> None:
        """One update with the gradients that have been accumulated, which are then cleared."""
        # Paddle makes and names its accumulators here, by a counter of the process: in a scope of
        # their own the names are the same for the second optimizer of the same parameters.
        with paddle.utils.unique_name.guard():
            self._each(lambda part: self.precision.unscale(part.optimizer))
            norm = math.sqrt(sum(self._each(_Part.squared_norm)))
            # A norm that is not finite changes nothing: GradScaler leaves such a step out.
            too_long = math.isfinite(norm) and norm > self._schedule.max_grad_norm
            scale = self._schedule.max_grad_norm / norm if too_long else 1.0
            self._each(lambda part: part.step(self.precision, scale))
        self.rate.step()

    def _each(self, work: Callable[[_Part], T]) -> list[T]:
        if self._replicas is None:
            return [work(part) for part in self._parts]
        return self._replicas.each(work, self._parts)

    def decay(self, steps: int) -> float:
        """What the first `steps` updates multiply a weight with that has no gradient."""
        rate = self._schedule.learning_rate * self._schedule.weight_decay
        return math.prod(1.0 - rate * self._factor(step) for step in range(steps))

    def tensors(self) -> dict[str, Tensor]:
        """Its moments and their powers, "<parameter>.<accumulator>"; none before the first step."""
        held = {}
        for part in self._parts:
            held |= part.optimizer.state_dict()
        held.pop("LR_Scheduler", None)
        found = {
            f"{name}.{accumulator}": held.pop(key)
            for name, parameter in self.named.items()
            for accumulator in ACCUMULATORS
            if (key := f"{parameter.name}_{accumulator}_0") in held
        }
        if held:  # a checkpoint without them would go on, and end elsewhere
            raise RuntimeError(f"the optimizer keeps what no checkpoint would: {sorted(held)}")
        return found

    def restore(self, tensors: Mapping[str, np.ndarray], *, step: int) -> None:
        """As it was after `step` steps; the inverse of `tensors`."""
        # Paddle names parameters by a counter of the process; ours are the same in any.
        for part in self._parts:
            own = {parameter.name for parameter in part.parameters}
            part.optimizer.set_state_dict(
                {
                    f"{parameter.name}_{accumulator}_0": paddle.to_tensor(tensors[key])
                    for name, parameter in self.named.items()
                    for accumulator in ACCUMULATORS
                    if parameter.name in own and (key := f"{name}.{accumulator}") in tensors
                }
            )
        self.rate.step(step)


@dataclass(frozen=True)
class _Part:
    """Parameters that one thread updates."""

    parameters: list[Tensor]
    optimizer: paddle.optimizer.Optimizer

    @paddle.no_grad()
    def squared_norm(self) -> float:
        """Of all gradients together."""
        found = 0.0
        for parameter in self.parameters:
            if parameter.grad is not None:
                row = parameter.grad.reshape([1, -1])
                # A product is six times as fast as any of paddle's norms.
                found += paddle.matmul(row, row, transpose_y=True).item()
        return found

    @paddle.no_grad()
    def step(self, precision: Precision, scale: float) -> None:
        """With `scale` times the gradients, which are then cleared."""
        if scale != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.scale_(scale)
        precision.step(self.optimizer)
        self.optimizer.clear_grad(set_to_zero=False)


# --- the loop -------------------------------------------------------------------------------


class Losses(Protocol):
    """Yields name and loss of each sub-network for a share of a batch.

    A loss may be differentiated before the next is asked for. It is the share's part of the
    `whole` batch's, so that the shares' losses and gradients add up. `encoder` is the one to
    run, a replica of the model. `step` counts from 1, and is for what is drawn for each step
    alike in all shares; `noise` and `step` None are a pass outside training.
    """

    def __call__(
        self,
        encoder: Encoder,
        share: Batch,
        whole: Batch,
        noise: Noise | None,
        step: int | None = None,
    ) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class BatchGradients:
    """One step before the optimizer: the gradients of a batch, computed by replicas at once."""

    replicas: Replicas
    data: Encoded
    losses: Losses
    seed: int
    keep_length: bool = False  # shares are padded like the whole batch
    group: Group = ALONE
    precision: Precision = field(default_factory=Precision)

    def __call__(
        self, rows: np.ndarray, *, step: int, micro_batch: int | None = None
    ) -> dict[str, float]:
        """The batch's losses by name; its gradients are then the encoder's.

        Both are summed over the group's processes. At most `micro_batch` rows are computed
        at once in each, but one a replica; None is all. On the CPU a replica computes no more
        than TOKENS_AT_ONCE: more at once takes memory and is no faster.
        """
        pad_id = self.replicas.members[0].config.pad_token_id
        whole = make_batch(self.data, rows, pad_id=pad_id)
        length = whole.input_ids.shape[1] if self.keep_length else None
        at_once = len(rows) if micro_batch is None else micro_batch // len(self.replicas.members)
        on_cpu = whole.input_ids.place.is_cpu_place()

        def work(member: Encoder, part: np.ndarray) -> dict[str, float]:
            found: dict[str, float] = {}
            # Of fewer rows than processes some have none: they go along without a say.
            weight = 1.0 if len(own) else 0.0
            for micro in pieces(
                part,
                np.array([len(self.data.input_ids[row]) for row in part]),
                rows=max(1, at_once),
                tokens=TOKENS_AT_ONCE if on_cpu else None,
            ):
                share = make_batch(self.data, micro, pad_id=pad_id, length=length)
                noise = Noise([self.seed, step, int(micro[0])])
                with self.precision.cast():
                    for name, loss in self.losses(member, share, whole, noise, step):
                        self.precision.scaled(loss if weight else loss * weight).backward()
                        found[name] = found.get(name, 0.0) + weight * float(loss)
                        del loss  # or its graph would live through the next one's pass
            return found

        own = self.group.share(rows)
        parts = self.replicas.map(work, own if len(own) else rows[:1])
        self.replicas.gather_gradients()
        self.group.add_up_gradients(self.replicas.members[0])
        sums = self.group.add_up([sum(part[name] for part in parts) for name in parts[0]])
        return dict(zip(parts[0], sums, strict=True))


def pieces(
    part: np.ndarray, lengths: np.ndarray, *, rows: int, tokens: int | None
) -> list[np.ndarray]:
    """The rows of a part in as few pieces as have at most so many rows and tokens each, or one row.

    Rows are dealt out in turn: of rows in order of length the pieces are alike.
    """
    count = -(-len(part) // rows)
    while count < len(part) and any(
        len(part[i::count]) > rows or (tokens is not None and lengths[i::count].sum() > tokens)
        for i in range(count)
    ):
        count += 1
    return [part[i::count] for i in range(count)]


@dataclass(frozen=True)
class Surroundings:
    """What a training is given by the job that it is a stage of.

    `section` is where the spec speaks of it. `deadline` is in seconds of the job
    (`Checkpoints.seconds`); `stop` is asked after each step whether to write a checkpoint and end.
    `group`: the processes that train together; the first one's clock and `stop` are all theirs.
    """

    stage: str
    section: str
    checkpoints: Checkpoints | None = None
    deadline: float | None = None
    stop: Callable[[], bool] = lambda: False
    group: Group = ALONE
    precision: Kind = "fp32"

    @property
    def state(self) -> StageState | None:
        """Where an earlier run of the job left the stage."""
        return self.checkpoints[self.stage] if self.checkpoints else None

    def asked(self) -> tuple[bool, bool]:
        """Whether the training's time is over, and whether it is to stop: one answer for all."""
        late = False
        if self.checkpoints is not None and self.deadline is not None:
            late = self.checkpoints.seconds >= self.deadline
        late, stop = map(bool, self.group.of_the_first([late, self.stop()]))
        return late, stop

    @property
    def newest(self) -> str:
        """The last good checkpoint, in words."""
        newest = self.checkpoints.newest if self.checkpoints else None
        return "there is no checkpoint" if newest is None else f"the checkpoint is {newest.name}"


@dataclass(frozen=True)
class Step:
    """One step's losses by name, and its duration in seconds."""

    done: int
    total: int
    losses: Mapping[str, float]
    seconds: float


def held_out(count: int, schedule: Schedule, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train on, and of those that judge it: none without a patience."""
    if schedule.patience is None or count < 2:
        return np.arange(count), np.arange(0)
    order = np.random.default_rng([seed, 3]).permutation(count)
    judging = max(1, min(count // HELD_OUT_SHARE, HELD_OUT_ROWS))
    return np.sort(order[judging:]), np.sort(order[:judging])


def train(
    model: Encoder,
    data: Encoded,
    schedule: Schedule,
    surroundings: Surroundings,
    losses: Losses,
    *,
    seed: int,
    replicas: int,
    keep_length: bool = False,
    on_step: Callable[[Step], None],
) -> TrainingReport:
    """Trains the model in place, from the stage's checkpoint where there is one.

    `replicas` threads share each batch. Where there is a patience, the losses of rows that it
    is not trained on judge the model, and the best weights are what is left. TrainingDiverged
    where a loss is not finite, OutOfMemory where the memory is too small and the spec leaves no
    smaller micro-batch, Interrupted when told to stop.
    """
    rows, judging = held_out(len(data), schedule, seed=seed)
    steps = step_count(schedule, len(rows))
    every = schedule.evaluate_every or math.ceil(len(rows) / schedule.batch_size)
    group, precision = surroundings.group, Precision(surroundings.precision)
    tokens = used_tokens(data, pad_id=model.config.pad_token_id)
    learner = with_token_rows(model, tokens)
    learnt = data.take(rows)
    with Replicas(learner, replicas) as parallel:
        optimizer = Optimizer(
            learner, schedule, steps=steps, precision=precision, replicas=parallel
        )
        run = _Run.restored(surroundings.state, learner, optimizer, schedule)
        group.take_from_the_first(learner)
        gradients = BatchGradients(parallel, learnt, losses, seed, keep_length, group, precision)
        for batch in training_rows(
            learnt, batch_size=schedule.batch_size, steps=steps, seed=seed, start=run.step
        ):
            started = time.perf_counter()
            found = run.losses(gradients, batch, schedule, surroundings)
            _require_finite(found, rows[batch], surroundings, step=run.step + 1)
            optimizer.step()
            run.step += 1
            run.seconds.append(time.perf_counter() - started)
            on_step(Step(run.step, steps, found, run.seconds[-1]))
            (is_late, stop), is_last = surroundings.asked(), run.step == steps
            if len(judging) and (is_late or is_last or run.step % every == 0):
                loss = _loss_of(learner, data.take(judging), schedule.batch_size, losses)
                run.judge(group.of_the_first([loss])[0], learner)
            if run.without_gain >= (schedule.patience or math.inf):
                run.ended = "plateau"
                break
            if is_late and not is_last:
                run.ended = "time"
                break
            _save(surroundings, lambda: run.state(learner, optimizer), stop=stop)
    if run.best is not None:
        load_weights(learner, run.best)
    best_step = run.step if run.best is None else run.best_step
    put_back(learner, model, tokens, decay=optimizer.decay(best_step))
    return TrainingReport(
        steps=run.step,
        planned_steps=steps,
        best_step=best_step,
        ended=run.ended,
        step_seconds=statistics.median(run.seconds),
        micro_batch=run.micro_batch,
    )


@paddle.no_grad()
def _loss_of(model: Encoder, data: Encoded, batch_size: int, losses: Losses) -> float:
    """The mean over rows, of the sum over sub-networks."""
    pad_id = model.config.pad_token_id
    return sum(
        float(loss) * len(batch.rows) / len(data)
        for batch in sorted_batches(data, batch_size=batch_size, pad_id=pad_id)
        for _, loss in losses(model, batch, batch, None)
    )


@dataclass
class _Run:
    """What changes from step to step, beside the weights and the optimizer."""

    step: int
    micro_batch: int | None
    seconds: deque[float]
    best: Mapping[str, np.ndarray] | None = None
    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0
    ended: Ended = "complete"

    @classmethod
    def restored(
        cls,
        state: StageState | None,
        model: Encoder,
        optimizer: Optimizer,
        schedule: Schedule,
    ) -> _Run:
        """At the checkpoint's step, with model and optimizer as they were; else at the start."""
        size = schedule.micro_batch
        run = cls(0, size if isinstance(size, int) else None, deque(maxlen=TIMED_STEPS))
        if state is None:
            return run
        load_weights(model, _below(state.tensors, "weights/"))
        optimizer.restore(_below(state.tensors, "optimizer/"), step=state.step)
        figures = dict(state.figures)
        optimizer.precision.restore(figures.pop("loss_scale", {}))
        run.seconds.extend(figures.pop("seconds"))
        run.step = state.step
        run.best = _below(state.tensors, "best/") or None
        for name, value in figures.items():
            setattr(run, name, value)
        return run

    def state(self, model: Encoder, optimizer: Optimizer) -> StageState:
        tensors: dict[str, Any] = _under("weights/", model.state_dict())
        tensors |= _under("optimizer/", optimizer.tensors())
        tensors |= _under("best/", self.best or {})
        names = ("micro_batch", "best_loss", "best_step", "without_gain")
        figures = {name: getattr(self, name) for name in names}
        figures |= {"seconds": list(self.seconds), "loss_scale": optimizer.precision.state()}
        return StageState(self.step, False, figures, tensors)

    def losses(
        self,
        gradients: BatchGradients,
        batch: np.ndarray,
        schedule: Schedule,
        surroundings: Surroundings,
    ) -> Mapping[str, float]:
        """Of the next step, whose gradients are then the model's.

        Where the memory is too small the micro-batch is halved, if the spec allows it.
        """
        step = self.step + 1
        while True:
            try:
                return gradients(batch, step=step, micro_batch=self.micro_batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                share = max(1, len(gradients.group.share(batch)))
                size = min(self.micro_batch or share, share)
                # One of several processes cannot halve its own: the others would wait for it.
                is_fixed = schedule.micro_batch != "auto" or gradients.group.count > 1
                if is_fixed or size <= len(gradients.replicas.members):
                    raise OutOfMemory(
                        f"the memory is too small for {size} rows at once (step {step}, stage "
                        f"{surroundings.stage}): lower {surroundings.section}.micro_batch or "
                        "task.max_seq_len",
                        pointer=f"/{surroundings.section}/micro_batch",
                    ) from error
            # Here the error is gone, and with it the frames that held the failed step's tensors.
            self.micro_batch = size // 2
            gradients.replicas.clear_gradients()

    def judge(self, loss: float, model: Encoder) -> None:
        if loss < self.best_loss:
            self.best, self.best_loss, self.best_step = numpy_weights(model), loss, self.step
            self.without_gain = 0
        else:
            self.without_gain += 1


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in tensors.items()}


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _save(surroundings: Surroundings, state: Callable[[], StageState], *, stop: bool) -> None:
    """A checkpoint where one is due or the job is to stop, which then raises Interrupted."""
    checkpoints = surroundings.checkpoints if surroundings.group.leads else None
    if checkpoints is not None and (stop or checkpoints.is_due):
        checkpoints.save(surroundings.stage, state())
    if stop:
        raise Interrupted(f"stopped in stage {surroundings.stage}; {surroundings.newest}")


def is_out_of_memory(error: BaseException) -> bool:
    """Paddle's allocators raise MemoryError; some operators wrap it in a RuntimeError."""
    return isinstance(error, MemoryError) or "ResourceExhausted" in str(error)


def _require_finite(
    losses: Mapping[str, float], rows: np.ndarray, surroundings: Surroundings, *, step: int
) -> None:
    """TrainingDiverged, with all that is needed to look into it."""
    for name, loss in losses.items():
        if math.isfinite(loss):
            continue
        shown = ", ".join(str(row) for row in np.sort(rows)[:SHOWN_ROWS])
        more = ", ..." if len(rows) > SHOWN_ROWS else ""
        raise TrainingDiverged(
            f"the loss of {name} is {loss} at step {step}: lower {surroundings.section}."
            f"learning_rate, or look at the batch's {len(rows)} rows of train (counted "
            f"from 0): {shown}{more}; {surroundings.newest}",
            pointer=f"/{surroundings.section}/learning_rate",
        )


# --- fine-tuning ----------------------------------------------------------------------------


FINE_TUNING = Surroundings("teacher", "teacher")  # with nothing to go on from, and no limit


def fine_tune(
    encoder: Encoder,
    data: Encoded,
    spec: Schedule,
    task: Task,
    surroundings: Surroundings = FINE_TUNING,
    *,
    subnetworks: Sequence[Subnetwork | None] | Sandwich = (None,),
    seed: int,
    on_step: Callable[[Step], None],
    replicas: int = 1,
) -> TrainingReport:
    """Trains the encoder in place on labels.

    `None` is the whole network. Of several sub-networks each batch takes the sum of the
    losses, one after the other, and then one optimizer step: DynaBERT's (arXiv:2004.04037)
    final fine-tuning. `replicas` threads share each batch.
    """

    def losses(
        member: Encoder,
        share: Batch,
        whole: Batch,
        noise: Noise | None,
        step: int | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        total = task.count(whole)
        layout = Packed(share.lengths, share.input_ids.shape[1])
        for subnetwork in taken(subnetworks, step):
            logits = member.encode(
                *share.inputs, layout=layout, subnetwork=subnetwork, noise=noise
            ).logits
            name = subnetwork.name if subnetwork else "fine-tuning"
            yield name, task.label_loss(logits, share, total=total)
            del logits  # or this pass's memory would be kept through the next

    return train(
        encoder,
        data,
        spec,
        surroundings,
        losses,
        seed=seed,
        replicas=replicas,
        on_step=on_step,
    )
