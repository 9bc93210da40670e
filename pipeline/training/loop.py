"""The loop that trains (section 5 of the paper): torch and model/ alone, no Ray, no MLflow, no DVC.

A step is a list of micro-batches, the same list whatever the number of workers; the workers (ranks) take them in
turn. Loss and gradient are sums over target tokens, divided by the tokens of the whole step, so that two workers
equal one and, but for dropout, four micro-batches one. Every micro-batch seeds its own dropout by (seed, step, its
place in the step): there is no random state to save, and a resumed run draws what the undisturbed one would.

On a CPU threads take a micro-batch each, as far as they share them evenly, with a replica of the model each. A
gradient lies in one flat buffer; those of the threads are added, then the sum over the ranks is taken, once a step.
DistributedDataParallel is not used: it wants equally many micro-batches on every rank.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.cpu import dropout
from model.loss import label_smoothed_loss
from model.perplexity import Batch
from model.transformer import Transformer

ADVICE = (
    "lower train.lr_scale, raise train.warmup_steps, set train.max_grad_norm to 1, or use norm pre; "
    "with bf16, see whether fp32 is finite. The last checkpoint stands"
)

MAX_REPLICAS = 8  # each adds a gradient and the activations of a micro-batch to what is in memory
MIN_BUSY_SHARE = (
    0.85  # of the threads' time; else fewer of them take micro-batches of their own, with more threads each
)


class NotFiniteError(ArithmeticError):
    """The loss or the gradient is no number any more; no step was taken with it."""


@dataclass(frozen=True)
class Step:
    """This rank's share of one step."""

    position: tuple[int, int]  # (epoch, step of the epoch) of the step after this one
    micro_batches: Iterable[tuple[int, Batch]]  # each with its place in the whole step
    num_tokens: int  # target tokens of the whole step, over all ranks


@dataclass
class State:
    """How far training is: all that a checkpoint needs beside weights and optimiser."""

    step: int = 0
    position: tuple[int, int] = (0, 0)  # of the next step in the plan
    tokens: int = 0  # target tokens trained on
    seconds: float = 0.0  # spent on steps: without validation and checkpoints
    best_valid_loss: float = math.inf
    stale_validations: int = 0  # since the best one
    finished: bool = False
    since_loss: float = 0.0  # summed since the last point of the training curve, as are the next two
    since_tokens: int = 0
    since_seconds: float = 0.0
    training_curve: list[dict[str, float]] = field(default_factory=list)
    validation_curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the loop needs of the settings; `learning_rate` is a function of the step, 1, 2, ..."""

    seed: int
    max_steps: int
    learning_rate: Callable[[int], float]
    label_smoothing: float
    max_grad_norm: float  # 0: no clipping
    validate_every: int
    patience: int  # validations without a better loss before training ends; 0: never
    checkpoint_every: int
    log_every: int
    bf16: bool
    compile: bool


class Replica:
    """The model with a gradient of its own: one flat vector, of which each parameter's .grad is a view."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradient = parameters[0].new_zeros(sum(p.numel() for p in parameters))
        for p, part in zip(parameters, self.gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)


class Replicas:
    """The model, and replicas that share its weights, so that several threads work at a micro-batch each.

    On a CPU, two threads at one micro-batch wait for each other at every operator; at one each they wait at the end
    of the step. On another device, and with torch.compile, there is the model alone. Who takes which micro-batch, and
    the order of sums, depend on the numbers of threads and micro-batches alone: with as many threads, a run's weights
    are the same to the bit again.
    """

    def __init__(self, model: Transformer, recipe: Recipe) -> None:
        self.all, self._recipe = [Replica(model)], recipe
        self._forward = torch.compile(model, dynamic=True) if recipe.compile else None
        self._threads = ThreadPoolExecutor(
            MAX_REPLICAS, initializer=dropout.use_own_generator
        )  # each starts when it is wanted

    @property
    def gradient(self) -> Tensor:
        """The last step's, as one vector."""
        return self.all[0].gradient

    def backward(self, step: Step, number: int) -> Tensor:
        """Set `gradient` to this rank's part of that of step `number`; return its part of the loss."""
        if self._recipe.compile or self.gradient.device.type != "cpu":
            return self._backward(self.all[0], step.micro_batches, step.num_tokens, number)
        micro_batches, num_threads = list(step.micro_batches), torch.get_num_threads()
        num_replicas = number_of_replicas(num_threads, len(micro_batches))
        if num_replicas == 1:
            return self._backward(self.all[0], micro_batches, step.num_tokens, number)
        while len(self.all) < num_replicas:
            model = self.all[0].model
            same_weights = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
            self.all.append(Replica(copy.deepcopy(model, same_weights)))

        def share(i: int) -> Tensor:
            torch.set_num_threads(num_threads // num_replicas)
            return self._backward(self.all[i], micro_batches[i::num_replicas], step.num_tokens, number)

        try:
            shares = [self._threads.submit(share, i) for i in range(num_replicas)]
            wait(shares)
        finally:
            torch.set_num_threads(num_threads)  # a new thread takes the number that was set last, by whomever
        losses = [share.result() for share in shares]
        for replica in self.all[1:num_replicas]:
            self.gradient.add_(replica.gradient)
        return torch.stack(losses).sum()

    def _backward(
        self, replica: Replica, micro_batches: Iterable[tuple[int, Batch]], num_tokens: int, number: int
    ) -> Tensor:
        recipe, device, model = self._recipe, replica.gradient.device, replica.model.train()
        forward = model if self._forward is None else self._forward  # a compiled module has no truth value
        replica.gradient.zero_()
        loss = torch.zeros((), device=device)
        for place, batch in micro_batches:
            seed_dropout(device, recipe.seed, number, place)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                x = forward(batch.src.to(device), batch.tgt_in.to(device))
                part = label_smoothed_loss(
                    x, model.embedding.weight, batch.tgt_out.to(device), recipe.label_smoothing
                )
            part = part / num_tokens
            part.backward()
            loss += part.detach()
        return loss


def number_of_replicas(num_threads: int, num_micro_batches: int) -> int:
    """As many as leave little of the threads' time unused, which they share; one always does."""
    for number in range(min(num_threads, num_micro_batches, MAX_REPLICAS), 1, -1):
        used = (num_threads // number) * number / num_threads
        if used * busy_share(num_micro_batches, number) >= MIN_BUSY_SHARE:
            return number
    return 1


def busy_share(num_micro_batches: int, takers: int) -> float:
    """Of the time of those that take micro-batches in turn, until the one that has most is done."""
    return num_micro_batches / (takers * -(-num_micro_batches // takers))


def train(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[Step],
    recipe: Recipe,
    state: State,
    *,
    validate: Callable[[], dict[str, float]],
    save: Callable[[State], None],
    report: Callable[[dict[str, float], int], None],
    progress: Callable[[State, float], None],
) -> State:
    """Train from `state` to the end; every rank calls this, with its own share in `steps`.

    `validate` returns metrics, "valid_loss" among them; `save` writes a checkpoint; `report` gets metrics and
    their step; `progress` gets the state and the loss after each step. Raises NotFiniteError.
    """
    replicas = Replicas(model, recipe)
    while not state.finished:
        started = time.perf_counter()
        step = next(steps)
        rate = recipe.learning_rate(state.step + 1)
        loss, grad_norm = train_step(replicas, optimizer, step, rate, recipe, state)
        elapsed = time.perf_counter() - started
        state.step, state.position = state.step + 1, step.position
        state.tokens, state.seconds = state.tokens + step.num_tokens, state.seconds + elapsed
        state.since_loss += loss * step.num_tokens
        state.since_tokens += step.num_tokens
        state.since_seconds += elapsed
        progress(state, loss)

        state.finished = state.step >= recipe.max_steps
        if state.step % recipe.validate_every == 0 or state.finished:
            metrics = validate()
            if not math.isfinite(metrics["valid_loss"]):
                raise NotFiniteError(f"step {state.step}: the validation loss is {metrics['valid_loss']}. {ADVICE}")
            better = metrics["valid_loss"] < state.best_valid_loss
            state.stale_validations = 0 if better else state.stale_validations + 1
            state.best_valid_loss = min(metrics["valid_loss"], state.best_valid_loss)
            state.finished = state.finished or 0 < recipe.patience <= state.stale_validations
            metrics |= {"tokens": state.tokens, "epoch": state.position[0]}
            state.validation_curve.append({"step": state.step, **metrics})
            report(metrics, state.step)
        if state.step % recipe.log_every == 0 or state.finished:
            metrics = {
                "train_loss": state.since_loss / state.since_tokens,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens_per_second": state.since_tokens / state.since_seconds,
            }
            state.since_loss, state.since_tokens, state.since_seconds = 0.0, 0, 0.0
            state.training_curve.append({"step": state.step, **metrics})
            report(metrics, state.step)
        if state.step % recipe.checkpoint_every == 0 or state.finished:
            save(state)
    return state


def train_step(
    replicas: Replicas, optimizer: torch.optim.Optimizer, step: Step, rate: float, recipe: Recipe, state: State
) -> tuple[float, float]:
    """One update. Returns the loss per target token (label-smoothed, nats) and the gradient's norm before
    clipping, both of the whole step."""
    loss, gradient = replicas.backward(step, state.step + 1), replicas.gradient
    if dist.is_initialized():
        dist.all_reduce(gradient)
        dist.all_reduce(loss)
    grad_norm = gradient.norm()
    loss_value, norm_value = loss.item(), grad_norm.item()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise NotFiniteError(
            f"step {state.step + 1} (epoch {state.position[0]}, batch {state.position[1]} of it): the loss is "
            f"{loss_value}, the gradient's norm {norm_value}, the learning rate {rate:.3g}. {ADVICE}"
        )
    if recipe.max_grad_norm and norm_value > recipe.max_grad_norm:
        gradient.mul_(recipe.max_grad_norm / norm_value)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss_value, norm_value


def adam(model: nn.Module, beta1: float, beta2: float, eps: float) -> torch.optim.Adam:
    """Section 5.3; the rate is set at every step."""
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=(beta1, beta2), eps=eps, fused=True)


def seed_dropout(device: torch.device, *parts: Any) -> None:
    """Seed what dropout draws from in this thread by a digest of the parts (torch's generators on CPUs use its low
    32 bits alone)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    # torch.manual_seed notes down who called it, for GPUs, which takes longer than to seed.
    (dropout.generator() if device.type == "cpu" else torch).manual_seed(int.from_bytes(digest, "little") >> 1)
