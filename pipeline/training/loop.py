"""The training loop (section 5 of the paper), as each rank runs it. It uses no Ray, no MLflow and no files.

A step is a list of micro-batches that does not depend on the number of ranks; they are dealt round-robin to the
ranks. Loss and gradient are sums over target tokens, divided by the target tokens of the whole step. So two ranks
compute the same step as one, and, without dropout, four micro-batches the same as one large batch. Dropout is seeded
for every micro-batch by (seed, step, index of the micro-batch). So there is no random state to save, and a resumed
run draws the same numbers as an uninterrupted one.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.cpu import dropout
from model.loss import label_smoothed_loss
from model.perplexity import Batch
from model.transformer import Transformer
from pipeline.common.settings import Train
from pipeline.data.batching import Position
from pipeline.training.threads import ThreadedDataParallel

ADVICE = (
    "Lower train.lr_scale, raise train.warmup_steps, set train.max_grad_norm to 1, or set model.norm to pre; "
    "with bf16, try fp32. The last checkpoint is intact"
)
START = Position(epoch=0, step=0)


class NotFiniteError(ArithmeticError):
    """A training or validation loss or the gradient is infinite or NaN. A failed step has not changed the weights."""


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's share of the micro-batches of one step."""

    next_position: Position  # position of the next step in the plan
    micro_batches: Iterable[tuple[int, Batch]]  # each with its index in the whole step
    num_tokens: int  # target tokens of the whole step, over all ranks


@dataclass
class TrainState:
    """The progress of training: the content of a checkpoint besides the weights and the optimizer's state."""

    step: int = 0
    position: Position = START  # of the next step in the plan
    tokens: int = 0  # target tokens trained on
    seconds: float = 0.0  # spent on steps, without validation and checkpoints
    finished: bool = False
    since_loss: float = 0.0  # this and the next two: sums since the last multiple of log_every
    since_tokens: int = 0
    since_seconds: float = 0.0
    training_curve: list[dict[str, float]] = field(default_factory=list)
    validation_curve: list[dict[str, float]] = field(default_factory=list)


def train_loop(
    parallel: ThreadedDataParallel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[GlobalBatch],
    settings: Train,
    state: TrainState,
    *,
    seed: int,
    bf16: bool,
    learning_rate: Callable[[int], float],
    validate: Callable[[], dict[str, float]],
    save: Callable[[TrainState], None],
    report: Callable[[dict[str, float], int], None],
    progress: Callable[[TrainState, float], None],
) -> TrainState:
    """Train from `state` to the end. Every rank calls this, with its own share of the micro-batches in `batches`.

    The last step always validates, reports and saves. A longer run that continues from it (`go_on`) discards the
    points that only the end added, and trains as if this run had not ended. The longer run may have another
    `log_every`, which applies from there on.

    `learning_rate` maps the step (1, 2, ...) to the rate. `validate` returns metrics with "valid_loss" (nats per
    token), `save` writes a checkpoint, `report` gets metrics and their step, and `progress` gets the state and the
    loss after each step. Raises NotFiniteError.
    """
    while not state.finished:
        started = time.perf_counter()
        batch = next(batches)
        rate = learning_rate(state.step + 1)
        loss, grad_norm = train_step(parallel, optimizer, batch, settings, state, seed=seed, bf16=bf16, rate=rate)
        elapsed = time.perf_counter() - started
        state.step, state.position = state.step + 1, batch.next_position
        state.tokens, state.seconds = state.tokens + batch.num_tokens, state.seconds + elapsed
        state.since_loss += loss * batch.num_tokens
        state.since_tokens += batch.num_tokens
        state.since_seconds += elapsed
        progress(state, loss)

        state.finished = state.step >= settings.max_steps
        if state.step % settings.validate_every == 0 or state.finished:
            metrics = validate()
            if not math.isfinite(metrics["valid_loss"]):
                raise NotFiniteError(f"step {state.step}: the validation loss is {metrics['valid_loss']}. {ADVICE}")
            metrics |= {"tokens": state.tokens, "epoch": state.position.epoch}
            state.validation_curve.append({"step": state.step, **metrics})
            state.finished = state.step >= end_of(state, settings)
            report(metrics, state.step)
        if state.step % settings.log_every == 0 or state.finished:
            metrics = {
                "train_loss": state.since_loss / state.since_tokens,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens_per_second": state.since_tokens / state.since_seconds,
            }
            if state.step % settings.log_every == 0:
                state.since_loss, state.since_tokens, state.since_seconds = 0.0, 0, 0.0
            state.training_curve.append({"step": state.step, **metrics})
            report(metrics, state.step)
        if state.step % settings.checkpoint_every == 0 or state.finished:
            save(state)
    return state


def end_of(state: TrainState, settings: Train) -> int:
    """The step at which training with these settings ends, as far as `state` tells.

    It is max_steps, or the step at which `patience` validations in a row have not improved on the best one. Only
    validations at multiples of validate_every count, not the extra one at the end of a run.
    """
    best, stale = math.inf, 0
    for point in state.validation_curve:
        if point["step"] % settings.validate_every == 0:
            stale = 0 if point["valid_loss"] < best else stale + 1
            best = min(point["valid_loss"], best)
            if 0 < settings.patience <= stale:
                return min(int(point["step"]), settings.max_steps)
    return settings.max_steps


def go_on(state: TrainState, settings: Train) -> None:
    """Remove the points that only the end of a shorter run added, if training with these settings continues it."""
    if not state.finished or state.step >= end_of(state, settings):
        return
    if state.since_tokens:  # not step % log_every: that run's log_every may have been different
        state.training_curve.pop()
    if state.step % settings.validate_every:
        state.validation_curve.pop()
    state.finished = False


def train_step(
    parallel: ThreadedDataParallel,
    optimizer: torch.optim.Optimizer,
    batch: GlobalBatch,
    settings: Train,
    state: TrainState,
    *,
    seed: int,
    bf16: bool,
    rate: float,
) -> tuple[float, float]:
    """Take the step after `state`. Raises NotFiniteError before the weights change.

    Returns the label-smoothed loss (nats per target token) and the norm of the gradient before clipping, both of the
    whole step over all ranks.
    """
    step, device = state.step + 1, parallel.gradient.device

    def loss_of(model: Transformer, placed: tuple[int, Batch]) -> Tensor:
        place, micro_batch = placed
        seed_dropout(device, seed, step, place)
        return summed_loss(model, micro_batch, settings.label_smoothing, device, bf16=bf16) / batch.num_tokens

    loss = parallel.backward(batch.micro_batches, loss_of)
    gradient = parallel.gradient
    if dist.is_initialized():
        dist.all_reduce(gradient)
        dist.all_reduce(loss)
    grad_norm = gradient.norm()
    loss_value, norm_value = loss.item(), grad_norm.item()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise NotFiniteError(
            f"step {step} (epoch {state.position.epoch}, batch {state.position.step}): the loss is "
            f"{loss_value}, the gradient norm {norm_value}, the learning rate {rate:.3g}. {ADVICE}"
        )
    if settings.max_grad_norm and norm_value > settings.max_grad_norm:
        gradient.mul_(settings.max_grad_norm / norm_value)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss_value, norm_value


def summed_loss(
    model: Transformer, batch: Batch, label_smoothing: float, device: torch.device, *, bf16: bool
) -> Tensor:
    """The label-smoothed loss of a micro-batch, summed over its target tokens (nats)."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        x = model(batch.src.to(device), batch.tgt_in.to(device))  # [batch, tgt, d_model]
        return label_smoothed_loss(x, model.embedding.weight, batch.tgt_out.to(device), label_smoothing)


def adam(model: nn.Module, beta1: float, beta2: float, eps: float) -> torch.optim.Adam:
    """Adam as in section 5.3. `train_step` sets the learning rate."""
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=(beta1, beta2), eps=eps, fused=True)


def seed_dropout(device: torch.device, *parts: Any) -> None:
    """Seed this thread's dropout generator with a digest of `parts`, so that all of them affect the low 32 bits, the
    only ones that torch's CPU generators use."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    # On a CPU, do not call torch.manual_seed: it also records a stack trace for a later GPU seeding, which is slower
    # than the seeding itself.
    (dropout.generator() if device.type == "cpu" else torch).manual_seed(int.from_bytes(digest, "little") >> 1)
