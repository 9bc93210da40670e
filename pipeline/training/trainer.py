"""One rank of a training run: data, model, validation and checkpoints around the loop. Uses no Ray and no MLflow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model.perplexity import cross_entropy, perplexity
from model.schedule import learning_rate
from model.transformer import Transformer
from pipeline.common.environment import COMPILE_CACHE_ENV, set_defaults
from pipeline.common.paths import CLEAN
from pipeline.common.settings import Settings
from pipeline.common.storage import AnyPath, cache, retry_unreachable
from pipeline.data.batching import BatchPlan, MicroBatch, Position, batches_to_read, collate, easily_shared
from pipeline.data.dataset import CorpusInfo, EncodedSplit
from pipeline.training import checkpoint
from pipeline.training.loop import GlobalBatch, TrainState, adam, go_on, train_loop
from pipeline.training.threads import MIN_EFFICIENCY, ThreadedDataParallel, parallel_efficiency


def train_rank(
    settings: Settings,
    data: Path,
    run_folder: AnyPath,
    *,
    rank: int,
    num_ranks: int,
    device: torch.device,
    report: Callable[[dict[str, float], int], None],
    progress: Callable[[TrainState, float], None],
    log: Callable[[str], None],
    saved: Callable[[], None] = lambda: None,
    score: Callable[[Transformer], dict[str, float]] | None = None,
) -> TrainState:
    """Train on the encoded corpus in `data` to the end. Resumes from the last checkpoint in `run_folder`, if any.

    Every rank calls this with the same arguments except `rank`. `report` gets metrics and their step, `progress` the
    state and the loss after each step, and `log` a line for the user. On rank 0 only, `saved` is called after each
    checkpoint, and `score` adds metrics of the model to each validation. Raises NotFiniteError, and ValueError for
    data that does not fit the settings.
    """
    # torch's default folder for compiled code, which Adam creates, could have been created by another user.
    set_defaults({COMPILE_CACHE_ENV: str(cache() / "inductor")})
    train_split, valid_split = EncodedSplit.open(data, "train"), EncodedSplit.open(data, "valid")
    info = CorpusInfo.open(data)
    torch.manual_seed(settings.seed)
    model = Transformer(settings.model.config(info.vocab_size)).to(device)
    optimizer = adam(model, settings.train.beta1, settings.train.beta2, settings.train.eps)
    state = _resume(run_folder, model, optimizer, rank, device, log)
    go_on(state, settings.train)
    for curve in (state.training_curve, state.validation_curve):  # a worker that died may not have reported them
        for point in curve:
            report({key: value for key, value in point.items() if key != "step"}, int(point["step"]))

    plan = batch_plan(train_split, settings)
    if plan.num_skipped and rank == 0:
        log(f"{plan.num_skipped} training pairs are longer than model.max_length and are left out")
    if rank == 0 and (advice := share_advice(plan, num_ranks)):
        log(advice)
    valid_batches = [collate(valid_split, part) for part in _valid_batches(valid_split, settings)[rank::num_ranks]]
    bf16 = settings.hardware.precision == "bf16"

    def validate() -> dict[str, float]:
        total, tokens = cross_entropy(model, valid_batches, bf16)
        return {
            "valid_loss": total / tokens,
            "valid_ppl": perplexity(total, tokens),
            "valid_ppl_word": perplexity(total, info.words["valid"]["tgt"]),
            **(score(model) if score and rank == 0 else {}),
        }

    def write_checkpoint(state: TrainState) -> None:
        t = settings.train
        checkpoint.save(run_folder, model, optimizer, state, asdict(settings), t.keep_checkpoints, t.checkpoint_every)
        saved()

    def save(state: TrainState) -> None:
        if rank != 0:
            return
        if state.finished:
            return retry_unreachable(lambda: write_checkpoint(state), run_folder, log)
        try:
            write_checkpoint(state)
        except checkpoint.DiskFullError:
            raise
        except OSError as error:  # the store may be reachable again at the next checkpoint
            log(f"{error}; training continues")

    batches = _global_batches(plan, train_split, state.position, rank, num_ranks)
    with ThreadedDataParallel(model, compile=settings.hardware.compile) as parallel:
        return train_loop(
            parallel,
            optimizer,
            batches,
            settings.train,
            state,
            seed=settings.seed,
            bf16=bf16,
            learning_rate=rate_of_step(settings),
            validate=validate,
            save=save,
            report=report,
            progress=progress,
        )


def rate_of_step(settings: Settings) -> Callable[[int], float]:
    """The learning rate as a function of the step 1, 2, ... (section 5.3)."""
    t = settings.train
    return lambda step: learning_rate(step, settings.model.d_model, t.warmup_steps, t.lr_scale)


def batch_plan(split: EncodedSplit, settings: Settings) -> BatchPlan:
    """The batch plan of training, the same on all ranks. Raises the ValueError of BatchPlan with the split."""
    with _naming("train"):
        return BatchPlan(
            split.src.lengths,
            split.tgt.lengths,
            batch_tokens=settings.train.batch_tokens,
            micro_batch_tokens=settings.hardware.micro_batch_tokens,
            max_length=settings.model.max_length,
            seed=settings.seed,
        )


@contextmanager
def _naming(split: str) -> Iterator[None]:
    """Add the name of the split to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{split}: {error}") from None


def share_advice(plan: BatchPlan, num_ranks: int) -> str | None:
    """A line of advice if workers would wait too long for each other, else None."""
    num_micro = plan.most_micro_batches
    if parallel_efficiency(num_micro, num_ranks) >= MIN_EFFICIENCY:
        return None
    enough = num_micro
    while enough != easily_shared(enough) or parallel_efficiency(enough, num_ranks) < MIN_EFFICIENCY:
        enough += 1
    micro_batch_tokens = plan.budget * num_micro // enough * 8 // 7  # a little more, because batches are not full
    way_out = (
        f"set hardware.micro_batch_tokens to {micro_batch_tokens}, which starts another run"
        if micro_batch_tokens >= plan.longest
        else "use fewer workers"
    )
    return f"{num_ranks} workers share {num_micro} micro-batches per step, so some wait for others: {way_out}"


def _valid_batches(split: EncodedSplit, settings: Settings) -> list[np.ndarray]:
    """Micro-batches of the validation split. Raises ValueError for a pair that is too long: none may be left out."""
    allowed = settings.model.max_length
    lengths = np.stack([split.src.lengths, split.tgt.lengths]) + 1  # end of sentence counted
    side, pair = np.unravel_index(lengths.argmax(), lengths.shape)
    if (longest := int(lengths[side, pair])) > allowed:
        text = CLEAN / f"valid.{(settings.data.src, settings.data.tgt)[side]}"
        others = int((lengths.max(axis=0) > allowed).sum()) - 1
        raise ValueError(
            f"{text}, line {pair + 1}, has {longest} tokens, more than model.max_length ({allowed})"
            f"{f', and {others} more pairs are too long' if others else ''}: set model.max_length to {longest}, or "
            "lower validate.max_words to drop such pairs"
        )
    budget = settings.hardware.micro_batch_tokens
    with _naming("valid"):
        return batches_to_read(split.src.lengths, split.tgt.lengths, micro_batch_tokens=budget, max_length=allowed)


def _global_batches(
    plan: BatchPlan, split: EncodedSplit, start: Position, rank: int, num_ranks: int
) -> Iterator[GlobalBatch]:
    """Yield this rank's micro-batches of every step from `start` on, without end."""

    def collated(micro_batches: list[np.ndarray]) -> Iterator[tuple[int, MicroBatch]]:
        for place in range(rank, len(micro_batches), num_ranks):
            yield place, collate(split, micro_batches[place])

    for position, micro_batches in plan.from_position(start):
        ends_epoch = position.step + 1 == plan.num_steps
        after = Position(position.epoch + 1, 0) if ends_epoch else Position(position.epoch, position.step + 1)
        yield GlobalBatch(after, collated(micro_batches), plan.num_tgt_tokens(micro_batches))


def _resume(
    run_folder: AnyPath,
    model: Transformer,
    optimizer: torch.optim.Adam,
    rank: int,
    device: torch.device,
    log: Callable[[str], None],
) -> TrainState:
    """Load the last intact checkpoint that rank 0 finds on all ranks, so that they start at the same step."""
    found = retry_unreachable(lambda: checkpoint.load_latest(run_folder, log), run_folder, log) if rank == 0 else None
    step = torch.tensor(found.state.step if found else -1, device=device)
    if dist.is_initialized():
        dist.broadcast(step, src=0)
    if step.item() < 0:
        return TrainState()
    if found is None:
        at = checkpoint.folder_of(run_folder, int(step.item()))
        found = retry_unreachable(lambda: checkpoint.load(at), run_folder, log)
    if rank == 0:
        log(f"continuing from the checkpoint of step {found.state.step}")
    return found.restore(model, optimizer)
