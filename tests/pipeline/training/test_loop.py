"""The loop on its own: no corpus, no Ray; a model so small that a step takes milliseconds."""

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from model import loss
from model.config import BOS, EOS, PAD, TransformerConfig
from model.cpu import attention
from model.cpu import matmul as products
from model.perplexity import cross_entropy
from model.transformer import Transformer
from pipeline.training import checkpoint
from pipeline.training.loop import (
    NotFiniteError,
    Recipe,
    Replicas,
    State,
    Step,
    adam,
    number_of_replicas,
    seed_dropout,
    train,
)

VOCAB = 23
CONFIG = TransformerConfig(
    vocab_size=VOCAB, num_layers=1, d_model=14, d_ff=17, num_heads=3, d_k=5, d_v=7,
    dropout=0.0, positions="sinusoidal", norm="post", max_length=41,
)  # fmt: skip
DROPPING = replace(CONFIG, dropout=0.3)
RECIPE = Recipe(
    seed=5,
    max_steps=3,
    learning_rate=lambda step: 0.01 / step,
    label_smoothing=0.1,
    max_grad_norm=0.0,
    validate_every=1000,
    patience=0,
    checkpoint_every=1000,
    log_every=1,
    bf16=False,
    compile=False,
)


@pytest.fixture(autouse=True)
def one_thread(own_threads: None) -> None:
    """Matrices this small gain nothing from a second one, and lose much on a busy machine."""
    torch.set_num_threads(1)


class Sentences(NamedTuple):
    src: Tensor
    tgt_in: Tensor
    tgt_out: Tensor

    @property
    def num_tokens(self) -> int:
        return int((self.tgt_out != PAD).sum())


def pad(rows: list[list[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def batch(pairs: list[tuple[list[int], list[int]]]) -> Sentences:
    src, tgt = zip(*pairs, strict=True)
    return Sentences(pad([[*s, EOS] for s in src]), pad([[BOS, *t] for t in tgt]), pad([[*t, EOS] for t in tgt]))


def random_pairs(count: int, seed: int, longest: int = 7) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.integers(EOS + 1, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(2))
        for _ in range(count)
    ]  # type: ignore[misc]


def micro_batches(sizes: list[int], seed: int = 1) -> list[Sentences]:
    """Of so many sentences each; the sentences depend on their sum alone."""
    pairs = iter(random_pairs(sum(sizes), seed))
    return [batch([next(pairs) for _ in range(size)]) for size in sizes]


def endless(epoch: list[list[Sentences]], state: State, rank: int = 0, num_ranks: int = 1) -> Iterator[Step]:
    """This rank's share of these steps, over and over, from where `state` is."""
    number, at = state.position
    while True:
        whole = epoch[at]
        number, at = (number + 1, 0) if at + 1 == len(epoch) else (number, at + 1)
        mine = list(enumerate(whole))[rank::num_ranks]
        yield Step((number, at), mine, sum(micro.num_tokens for micro in whole))


def new_model(config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(11)
    return Transformer(config)


def nothing(*_: Any) -> None:
    pass


def run(
    model: Transformer,
    epoch: list[list[Sentences]],
    recipe: Recipe = RECIPE,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    state: State | None = None,
    validate: Callable[[], dict[str, float]] = lambda: {"valid_loss": 1.0},
    save: Callable[[State], None] = nothing,
    report: Callable[[dict[str, float], int], None] = nothing,
    rank: int = 0,
    num_ranks: int = 1,
) -> State:
    state = State() if state is None else state
    optimizer = optimizer or adam(model, 0.9, 0.98, 1e-9)
    steps = endless(epoch, state, rank, num_ranks)
    return train(
        model, optimizer, steps, recipe, state, validate=validate, save=save, report=report, progress=nothing
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def torchs_loss(model: Transformer, micro: Sentences, smoothing: float) -> Tensor:
    """Per token, by torch, from the whole matrix of logits."""
    logits = model.logits(model(micro.src, micro.tgt_in))
    return F.cross_entropy(logits.flatten(0, 1), micro.tgt_out.flatten(), ignore_index=PAD, label_smoothing=smoothing)


class Descent(torch.optim.SGD):
    """Plain descent: the change of the weights shows rate times gradient. Keeps the rates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


# --- one step


def test_four_micro_batches_of_unlike_size_equal_one():
    one, four = new_model(), new_model()
    curves = [
        run(one, [micro_batches([31])]).training_curve,
        run(four, [micro_batches([2, 3, 19, 7])]).training_curve,
    ]
    torch.testing.assert_close(weights(four), weights(one), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*curves, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_step_follows_the_gradient_of_torchs_loss_per_token_of_the_whole_step():
    model, twin = new_model(), new_model()
    whole, parts = micro_batches([31])[0], micro_batches([2, 3, 19, 7])
    expected = torchs_loss(twin, whole, 0.1)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
    recipe = replace(RECIPE, max_steps=1, learning_rate=lambda step: 1.0)
    state = run(model, [parts], recipe, optimizer=Descent(model))
    torch.testing.assert_close(weights(twin) - weights(model), gradient, rtol=1e-4, atol=1e-5)
    assert state.training_curve[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert state.training_curve[0]["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_loss_curve_is_that_of_torchs_own_operators(monkeypatch):
    """oneDNN's products, attention by batched products, the loss by chunks and micro-batches, beside linear,
    scaled_dot_product_attention, cross_entropy over all logits, and Adam: with dropout, and while it learns."""
    config = replace(DROPPING, d_model=128, d_ff=256, num_heads=4, d_k=32, d_v=32)
    data = [[batch([(src, src) for src, _ in random_pairs(67, seed)])] for seed in range(5)]  # to be copied
    rate = 5e-4  # by larger steps, the rounding of some processors grows beyond the tolerance
    recipe = replace(RECIPE, max_steps=40, learning_rate=lambda step: rate)
    products_by_onednn = []

    def curve(
        change: Callable[[pytest.MonkeyPatch], None], steps: Callable[[Transformer], list[float]]
    ) -> list[float]:
        with monkeypatch.context() as patch:
            change(patch)
            return steps(new_model(config))

    def fast(patch: pytest.MonkeyPatch) -> None:
        onednn = products._Linear.apply
        patch.setattr(products, "ONEDNN", True)
        patch.setattr(products, "SMALL", 0)
        patch.setattr(loss, "CHUNK_LOGITS", products.ROW_MULTIPLE * VOCAB)
        patch.setattr(products._Linear, "apply", lambda *x: products_by_onednn.append(0) or onednn(*x))

    def plain(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(products, "ONEDNN", False)
        patch.setattr(attention, "MAX_UNFUSED_QUERIES", 0)

    def by_hand(model: Transformer) -> list[float]:
        optimizer, losses = torch.optim.Adam(model.parameters(), rate, (0.9, 0.98), 1e-9), []
        for step in range(1, recipe.max_steps + 1):
            seed_dropout(torch.device("cpu"), recipe.seed, step, 0)
            optimizer.zero_grad()
            value = torchs_loss(model, data[(step - 1) % len(data)][0], recipe.label_smoothing)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    def by_the_loop(model: Transformer) -> list[float]:
        return [point["train_loss"] for point in run(model, data, recipe).training_curve]

    ours, theirs = curve(fast, by_the_loop), curve(plain, by_hand)
    assert len(products_by_onednn) > 10 * recipe.max_steps
    assert theirs[-1] < 0.8 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_adam_is_the_formula_of_section_5_3():
    model, twin = new_model(), new_model()
    epoch = [[micro] for micro in micro_batches([5, 7, 11])]
    run(model, epoch, optimizer=adam(model, 0.9, 0.98, 1e-9))
    first = second = torch.zeros_like(weights(twin))
    for step, (micro,) in enumerate(epoch, start=1):
        twin.zero_grad()
        torchs_loss(twin, micro, RECIPE.label_smoothing).backward()
        gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
        first = 0.9 * first + (1 - 0.9) * gradient
        second = 0.98 * second + (1 - 0.98) * gradient**2
        change = first / (1 - 0.9**step) / ((second / (1 - 0.98**step)).sqrt() + 1e-9)
        nn.utils.vector_to_parameters(weights(twin) - RECIPE.learning_rate(step) * change, twin.parameters())
    # Where the gradient is next to nothing, Adam turns its rounding into a step: those are few, and left out.
    differ = ~torch.isclose(weights(model), weights(twin), rtol=1e-3, atol=1e-5)
    assert differ.float().mean() < 0.01


def test_each_step_has_its_learning_rate():
    model = new_model()
    optimizer = Descent(model)
    recipe = replace(RECIPE, max_steps=7, learning_rate=lambda step: 0.001 * step**2)
    state = run(model, [micro_batches([3])], recipe, optimizer=optimizer)
    assert optimizer.rates == [0.001 * step**2 for step in range(1, 8)]
    assert [point["learning_rate"] for point in state.training_curve] == optimizer.rates


@pytest.mark.parametrize(("max_grad_norm", "clipped"), [(0.0, False), (0.01, True), (100.0, False)])
def test_the_gradient_is_clipped_to_its_largest_norm_and_keeps_its_direction(max_grad_norm, clipped):
    moves = []
    for limit in (max_grad_norm, 0.0):
        model = new_model()
        before = weights(model)
        recipe = replace(RECIPE, max_steps=1, learning_rate=lambda step: 1.0, max_grad_norm=limit)
        state = run(model, [micro_batches([5, 3])], recipe, optimizer=Descent(model))
        moves.append(before - weights(model))
    assert state.training_curve[0]["grad_norm"] == pytest.approx(moves[1].norm().item(), rel=1e-3)
    assert moves[0].norm().item() == pytest.approx(0.01 if clipped else moves[1].norm().item(), rel=1e-3)
    assert F.cosine_similarity(*moves, dim=0) == pytest.approx(1.0, abs=1e-4)


def test_dropout_differs_by_seed_step_and_place_and_by_nothing_else():
    def noise(*parts: int) -> tuple[float, ...]:
        seed_dropout(torch.device("cpu"), *parts)
        return tuple(torch.rand(3).tolist())

    parts = [(seed, step, place) for seed in range(3) for step in range(5) for place in range(4)]
    assert len({noise(*part) for part in parts}) == len(parts)
    assert noise(1, 2, 3) == noise(1, 2, 3)


def test_dropout_is_on_in_training_and_off_in_validation():
    model = new_model(DROPPING)
    micro = micro_batches([13])[0]
    losses = [
        run(new_model(config), [[micro]], replace(RECIPE, max_steps=1)).training_curve[0]["train_loss"]
        for config in (CONFIG, DROPPING)
    ]
    assert losses[0] != losses[1]
    with torch.no_grad():
        expected = torchs_loss(copy.deepcopy(model).eval(), micro, 0.0).item()
    total, tokens = cross_entropy(model.train(), [micro])
    assert total / tokens == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_bf16_changes_the_step_a_little_and_keeps_weights_in_single_precision():
    models = [new_model(), new_model()]
    losses = [
        run(model, [micro_batches([13])], replace(RECIPE, max_steps=1, bf16=bf16)).training_curve[0]["train_loss"]
        for model, bf16 in zip(models, (False, True), strict=True)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert all(p.dtype == torch.float32 for p in models[1].parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 1e-2)])
def test_a_device_takes_the_steps_of_double_precision(device, bf16, tolerance):
    exact, model = new_model().double(), new_model().to(device)
    epoch = [micro_batches([5, 7]), micro_batches([3], seed=2)]
    recipes = replace(RECIPE, max_steps=6), replace(RECIPE, max_steps=6, bf16=bf16)
    states = [run(*given) for given in ((exact, epoch, recipes[0]), (model, epoch, recipes[1]))]
    expected, found = ([point["train_loss"] for point in state.training_curve] for state in states)
    assert found == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < 0.9 * expected[0]
    sums = [cross_entropy(trained, epoch[0], bf16=on) for trained, on in ((exact, False), (model, bf16))]
    assert sums[1][0] == pytest.approx(sums[0][0], rel=tolerance)
    assert sums[1][1] == sums[0][1]


def test_dropout_is_seeded_as_torch_seeds_it_and_by_torch_on_a_gpu(monkeypatch):
    seeds: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", seeds.append)
        seed_dropout(torch.device("cuda"), 1, 2, 3)
        seed_dropout(torch.device("cpu"), 1, 2, 3)
    drawn = torch.rand(5)
    assert len(seeds) == 1
    torch.manual_seed(seeds[0])
    assert torch.equal(torch.rand(5), drawn)


def test_compile_sends_every_training_batch_through_the_compiled_model(monkeypatch):
    calls: list[int] = []  # by which thread

    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Tensor) -> Tensor:
            calls.append(threading.get_ident())
            return self.model(*args)

        def __len__(self) -> int:  # as torch's, which has no truth value either
            raise TypeError

    def fake_compile(model: nn.Module, **options: Any) -> nn.Module:
        assert options == {"dynamic": True}
        return Compiled(model)

    monkeypatch.setattr(torch, "compile", fake_compile)
    for num_threads in (1, 2):  # two would be for replicas, which a compiled model has not
        torch.set_num_threads(num_threads)
        plain, compiled = new_model(), new_model()
        run(plain, [micro_batches([2, 3])])
        assert not calls
        run(compiled, [micro_batches([2, 3])], replace(RECIPE, compile=True))
        assert calls == 2 * RECIPE.max_steps * [threading.get_ident()]
        calls.clear()
        if num_threads == 1:
            assert torch.equal(weights(plain), weights(compiled))
        torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # half a minute of the C++ compiler
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_takes_the_steps_of_the_plain_one():
    models = [new_model(), new_model()]
    for model, on in zip(models, (False, True), strict=True):
        run(model, [micro_batches([5, 7]), micro_batches([3], seed=2)], replace(RECIPE, compile=on))
    torch.testing.assert_close(*(weights(model) for model in models), rtol=1e-3, atol=1e-4)


# --- replicas, in threads


def run_by(num_threads: int, epoch: list[list[Sentences]], recipe: Recipe = RECIPE) -> tuple[Tensor, State]:
    """A model with dropout after it, and the state."""
    torch.set_num_threads(num_threads)
    model = new_model(DROPPING)
    state = run(model, epoch, replace(recipe, max_steps=6))
    assert threads_of_a_new_thread() == num_threads
    return weights(model), state


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("num_threads", [2, 3, 4, 16])
@pytest.mark.parametrize("bf16", [False, True])
def test_threads_with_a_micro_batch_each_equal_one_thread_with_dropout_on(num_threads, bf16):
    epoch = [micro_batches([5, 7, 2, 9, 3, 8]), micro_batches([4], seed=2), micro_batches([6, 1, 3, 3], seed=3)]
    recipe = replace(RECIPE, bf16=bf16)
    (expected, alone), (found, together) = run_by(1, epoch, recipe), run_by(num_threads, epoch, recipe)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 if bf16 else 1e-4)
    for ours, theirs in zip(together.training_curve, alone.training_curve, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3 if bf16 else 1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2 if bf16 else 1e-4)


def test_threads_give_the_same_weights_to_the_bit_again():
    epoch = [micro_batches([5, 7, 2, 9, 3, 1]), micro_batches([6, 1, 3], seed=3)]
    first = run_by(3, epoch)[0]
    for _ in range(5):
        assert torch.equal(run_by(3, epoch)[0], first)


@pytest.mark.parametrize(
    ("num_threads", "num_micro_batches", "expected"),
    [
        (1, 4, 1), (2, 1, 1), (2, 2, 2), (2, 3, 1), (2, 4, 2), (2, 7, 2), (3, 4, 1), (3, 8, 3), (4, 2, 2), (4, 4, 4),
        (6, 4, 2), (7, 8, 2), (8, 4, 4), (8, 32, 8), (12, 24, 6), (16, 4, 4), (16, 16, 8), (64, 24, 8), (4, 0, 1),
    ],
)  # fmt: skip
def test_there_are_as_many_replicas_as_keep_the_threads_busy(num_threads, num_micro_batches, expected):
    assert number_of_replicas(num_threads, num_micro_batches) == expected


def test_replicas_are_at_work_at_once_and_share_out_torchs_threads(monkeypatch):
    seen: dict[int, int] = {}  # of each micro-batch's sentences: the thread's number of threads

    def spy(model: Transformer, src: Tensor, tgt_in: Tensor) -> Tensor:
        everyone.wait(timeout=60)  # nobody gets by before all are here
        seen[len(src)] = torch.get_num_threads()
        return forward(model, src, tgt_in)

    forward, everyone = Transformer.forward, threading.Barrier(3)
    monkeypatch.setattr(Transformer, "forward", spy)
    run_by(6, [micro_batches([5, 7, 2])])
    assert seen == {5: 2, 7: 2, 2: 2}
    everyone = threading.Barrier(1)
    run_by(6, [micro_batches([5])])
    assert seen[5] == 6


def test_replicas_hold_the_weights_once_and_are_no_more_than_have_had_work():
    torch.set_num_threads(6)
    model = new_model()
    replicas = Replicas(model, RECIPE)
    for count, expected in ((1, 1), (3, 3), (2, 3), (6, 6)):
        parts = micro_batches([2] * count)
        replicas.backward(Step((0, 1), enumerate(parts), sum(part.num_tokens for part in parts)), 1)
        assert len(replicas.all) == expected
    for replica in replicas.all:
        for ours, theirs in zip(replica.model.parameters(), model.parameters(), strict=True):
            assert ours.data_ptr() == theirs.data_ptr()
            assert ours.grad is not None
    assert len({replica.gradient.data_ptr() for replica in replicas.all}) == 6


def test_a_fault_in_a_thread_is_raised_when_no_other_is_at_work(monkeypatch):
    done = []

    def fail(model: Transformer, src: Tensor, tgt_in: Tensor) -> Tensor:
        if len(src) == 5:
            raise RuntimeError("5 sentences are too many")
        time.sleep(0.2)
        done.append(len(src))
        return forward(model, src, tgt_in)

    forward = Transformer.forward
    torch.set_num_threads(2)
    model = new_model()
    before = weights(model)
    monkeypatch.setattr(Transformer, "forward", fail)
    with pytest.raises(RuntimeError, match=r"^5 sentences are too many$"):
        run(model, [micro_batches([5, 7])])
    assert done == [7]
    assert threads_of_a_new_thread() == 2
    assert torch.equal(weights(model), before)


# --- faults


def test_a_loss_that_is_not_finite_stops_before_the_step_and_says_where_and_what_to_do():
    model = new_model()
    plan = endless([micro_batches([3]), micro_batches([5])], State())
    before: list[Tensor] = []

    def poisoned() -> Iterator[Step]:
        yield next(plan)
        yield next(plan)
        with torch.no_grad():
            model.embedding.weight[7, 3] = math.inf
        before.append(weights(model))
        yield next(plan)

    state, saved = State(), []
    with pytest.raises(NotFiniteError) as error:
        train(
            model, adam(model, 0.9, 0.98, 1e-9), poisoned(), replace(RECIPE, max_steps=5), state,
            validate=lambda: {"valid_loss": 1.0}, save=saved.append, report=nothing, progress=nothing,
        )  # fmt: skip
    message = str(error.value)
    assert message.startswith("step 3 (epoch 1, batch 0 of it): the loss is inf, the gradient's norm nan")
    assert "the learning rate 0.00333" in message
    assert "lower train.lr_scale, raise train.warmup_steps, set train.max_grad_norm to 1" in message
    assert torch.equal(weights(model), before[0])
    assert (state.step, state.position, saved) == (2, (1, 0), [])


def test_a_gradient_that_is_not_finite_stops_too_though_the_loss_is():
    model = new_model()
    before = weights(model)
    next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NotFiniteError, match=r"step 1 .*the loss is \d\.\d+, the gradient's norm (nan|inf)"):
        run(model, [micro_batches([3])])
    assert torch.equal(weights(model), before)


# --- what happens when


def events(recipe: Recipe, losses: list[float] | None = None) -> tuple[State, list[tuple[str, int]]]:
    """The state at the end, and what was called at which step; validation gives `losses` in turn."""
    state, seen = State(), []
    turn = iter(losses or [1.0] * 100)

    def validate() -> dict[str, float]:
        seen.append(("validate", state.step))
        return {"valid_loss": next(turn)}

    def report(metrics: dict[str, float], step: int) -> None:
        seen.append(("valid" if "valid_loss" in metrics else "train", step))

    run(
        new_model(), [micro_batches([2])] * 3, recipe,
        state=state, validate=validate, report=report, save=lambda state: seen.append(("save", state.step)),
    )  # fmt: skip
    return state, seen


def at(seen: list[tuple[str, int]], what: str) -> list[int]:
    return [step for name, step in seen if name == what]


def test_reports_validations_and_checkpoints_come_as_often_as_set_and_at_the_end():
    recipe = replace(RECIPE, max_steps=13, log_every=4, validate_every=5, checkpoint_every=3)
    state, seen = events(recipe)
    assert at(seen, "train") == [4, 8, 12, 13]
    assert at(seen, "validate") == at(seen, "valid") == [5, 10, 13]
    assert at(seen, "save") == [3, 6, 9, 12, 13]
    assert (state.step, state.finished, state.position) == (13, True, (4, 1))
    assert [point["step"] for point in state.training_curve] == [4, 8, 12, 13]
    assert [point["step"] for point in state.validation_curve] == [5, 10, 13]


def test_a_last_step_that_is_due_anyway_is_not_reported_twice():
    _, seen = events(replace(RECIPE, max_steps=6, log_every=3, validate_every=3, checkpoint_every=3))
    assert seen[-4:] == [("validate", 6), ("valid", 6), ("train", 6), ("save", 6)]
    assert len(seen) == 8


def test_patience_ends_training_after_so_many_validations_without_a_better_loss():
    recipe = replace(RECIPE, max_steps=100, validate_every=2, patience=3, checkpoint_every=7)
    state, seen = events(recipe, [3.0, 2.0, 2.5, 2.0, 1.5, 1.6, 1.5, 1.7, 0.1])
    assert at(seen, "validate") == [2, 4, 6, 8, 10, 12, 14, 16]  # 1.5, then three times not below it
    assert (state.step, state.finished, state.best_valid_loss, state.stale_validations) == (16, True, 1.5, 3)
    assert at(seen, "save") == [7, 14, 16]


def test_training_that_patience_ends_keeps_its_last_training_point():
    recipe = replace(RECIPE, max_steps=100, log_every=50, validate_every=2, patience=1, checkpoint_every=7)
    state, seen = events(recipe, [1.0, 2.0])
    assert [point["step"] for point in state.training_curve] == at(seen, "train") == [4]


def test_a_validation_loss_that_is_no_number_stops_training_before_a_checkpoint_is_written():
    recipe = replace(RECIPE, max_steps=4, validate_every=2, checkpoint_every=2)
    with pytest.raises(NotFiniteError, match=r"step 4: the validation loss is nan. lower train.lr_scale"):
        events(recipe, [1.0, math.nan])


def test_without_patience_a_worse_loss_ends_nothing():
    state, _ = events(replace(RECIPE, max_steps=9, validate_every=1), [float(i) for i in range(9)])
    assert (state.step, state.stale_validations) == (9, 8)


def test_finished_training_takes_no_further_step():
    model = new_model()
    before = weights(model)
    run(model, [micro_batches([2])], state=State(step=3, finished=True))
    assert torch.equal(weights(model), before)


def test_the_training_curve_is_the_mean_over_the_tokens_since_the_last_point():
    epoch = [micro_batches([2], seed=1), micro_batches([17], seed=2), micro_batches([5], seed=3)]
    every = run(new_model(), epoch).training_curve
    whole = run(new_model(), epoch, replace(RECIPE, log_every=3)).training_curve
    tokens = [sum(micro.num_tokens for micro in step) for step in epoch]
    expected = sum(n * point["train_loss"] for n, point in zip(tokens, every, strict=True)) / sum(tokens)
    assert whole[0]["train_loss"] == pytest.approx(expected, rel=1e-6)


def test_tokens_are_counted_over_all_steps():
    epoch = [micro_batches([2, 3]), micro_batches([7])]
    state = run(new_model(), epoch, replace(RECIPE, max_steps=5))
    per_step = [sum(micro.num_tokens for micro in step) for step in epoch]
    assert state.tokens == 3 * per_step[0] + 2 * per_step[1]


# --- resume


def without_time(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in point.items() if key != "tokens_per_second"} for point in curve]


def twice_half_and_whole(folder: Path, config: TransformerConfig, log_every: int) -> list[dict[str, Any]]:
    """After 5 steps, a checkpoint, and 5 more from it; and after 10: weights, Adam's state, and the loop's."""
    epoch = [micro_batches([3, 5, 2, 4], seed=seed) for seed in (1, 2, 3)]
    recipe = replace(RECIPE, max_steps=10, log_every=log_every, validate_every=3, checkpoint_every=5)
    results = []
    for stop in (5, 10):
        model = new_model(config)
        optimizer = adam(model, 0.9, 0.98, 1e-9)

        def save(
            state: State, model: Transformer = model, optimizer: torch.optim.Adam = optimizer, stop: int = stop
        ) -> None:
            if state.step == 5 == stop:
                checkpoint.save(folder, model, optimizer, state, {}, keep=1)
                raise KeyboardInterrupt

        def validate(model: Transformer = model) -> dict[str, float]:
            total, tokens = cross_entropy(model, micro_batches([7], seed=9))
            return {"valid_loss": total / tokens}

        try:
            state = run(model, epoch, recipe, optimizer=optimizer, validate=validate, save=save)
        except KeyboardInterrupt:
            torch.manual_seed(999)
            model = Transformer(config)
            optimizer = adam(model, 0.9, 0.98, 1e-9)
            found = checkpoint.load_latest(folder, pytest.fail)
            assert found is not None
            state = found.restore(model, optimizer)
            state = run(
                model,
                epoch,
                recipe,
                optimizer=optimizer,
                state=state,
                validate=lambda: validate(model),  # noqa: B023
            )
        moments = [optimizer.state[p] for p in model.parameters()]
        results.append({"weights": weights(model), "moments": moments, "state": asdict(state)})
    return results


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("config", [CONFIG, DROPPING], ids=["no dropout", "dropout"])
def test_k_steps_a_checkpoint_and_k_steps_are_2k_steps_bit_for_bit(tmp_path, config, num_threads):
    torch.set_num_threads(num_threads)
    resumed, undisturbed = twice_half_and_whole(tmp_path, config, log_every=5)
    assert torch.equal(resumed["weights"], undisturbed["weights"])
    for ours, theirs in zip(resumed["moments"], undisturbed["moments"], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    for result in (resumed, undisturbed):
        result["state"]["training_curve"] = without_time(result["state"]["training_curve"])
        del result["state"]["seconds"]
    assert resumed["state"] == undisturbed["state"]


def test_a_checkpoint_between_two_points_of_the_training_curve_does_not_change_the_curve(tmp_path):
    resumed, undisturbed = twice_half_and_whole(tmp_path, CONFIG, log_every=4)
    curves = [without_time(result["state"]["training_curve"]) for result in (resumed, undisturbed)]
    assert curves[0] == curves[1]


# --- ranks

SPLITS = {
    "as many on each": [[[3, 5, 2, 7]], [[2, 2]]],
    "one more on the first": [[[3, 5, 2]], [[4, 1, 1]]],
    "none on the second": [[[6]], [[2, 3]]],
}
"""Sizes of the micro-batches of each of an epoch's steps."""


def steps_of(name: str) -> list[list[Sentences]]:
    return [micro_batches(sizes, seed=seed) for seed, (sizes,) in enumerate(SPLITS[name])]


def as_rank(rank: int, folder: str) -> None:
    """One of two processes: all that has to be the same as on one rank."""
    torch.set_num_threads(2)  # and a micro-batch to each, where there are as many
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name in SPLITS:
        model = new_model(DROPPING)
        state = run(model, steps_of(name), rank=rank, num_ranks=2)
        results[name] = weights(model).numpy()
        results[f"{name}: losses"] = [point["train_loss"] for point in state.training_curve]
    validation = micro_batches([7])[rank:]  # the second rank has none
    results["cross_entropy"] = cross_entropy(new_model(), validation)
    model = new_model()
    if rank == 1:  # only here is the gradient broken; both ranks have to stop
        next(model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    try:
        run(model, steps_of("as many on each"), rank=rank, num_ranks=2)
    except NotFiniteError as error:
        results["error"] = str(error)
    np.savez(f"{folder}/{rank}.npz", **results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(as_rank, (str(folder),), nprocs=2)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


@pytest.mark.parametrize("name", SPLITS)
def test_two_ranks_equal_one_with_dropout_on(two_ranks, name):
    model = new_model(DROPPING)
    state = run(model, steps_of(name))
    losses = [point["train_loss"] for point in state.training_curve]
    for results in two_ranks:
        np.testing.assert_allclose(results[name], weights(model).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(results[f"{name}: losses"], losses, rtol=1e-5)
    assert (two_ranks[0][name] == two_ranks[1][name]).all()


def test_two_ranks_share_validation_though_one_has_none_of_it(two_ranks):
    expected = cross_entropy(new_model(), micro_batches([7]))
    for results in two_ranks:
        np.testing.assert_allclose(results["cross_entropy"], expected, rtol=1e-6)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_both(two_ranks):
    for results in two_ranks:
        assert str(results["error"]).startswith("step 1 (epoch 0, batch 0 of it)")


# --- it learns


def test_it_learns_to_copy():
    """Pieces by chance: nothing but the source tells the next one; perplexity would stay at 19 without it."""
    config = replace(CONFIG, d_model=64, d_ff=64, d_k=16, d_v=16, num_heads=4, norm="pre")
    rng = np.random.default_rng(3)

    def copies(count: int) -> Sentences:
        rows = [rng.integers(EOS + 1, VOCAB, rng.integers(3, 8)).tolist() for _ in range(count)]
        return batch([(row, row) for row in rows])

    epoch = [[copies(64)] for _ in range(100)]
    recipe = replace(
        RECIPE, max_steps=300, label_smoothing=0.0, learning_rate=lambda step: 3e-3 * min(1, step / 40), log_every=50
    )
    model = new_model(config)
    run(model, epoch, recipe)
    total, tokens = cross_entropy(model, [copies(101)])
    assert math.exp(total / tokens) < 1.1
