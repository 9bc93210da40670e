"""The training loop without corpus and Ray. The model is so small that a step takes milliseconds."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from model import loss
from model.config import EOS, PAD, TransformerConfig
from model.cpu import attention
from model.cpu import matmul as products
from model.perplexity import cross_entropy
from model.transformer import Transformer
from pipeline.common.settings import Train
from pipeline.training import checkpoint
from pipeline.training.loop import (
    GlobalBatch,
    NotFiniteError,
    TrainState,
    adam,
    end_of,
    go_on,
    seed_dropout,
    train_loop,
)
from pipeline.training.threads import ThreadedDataParallel
from tests.pipeline.training.harness import (
    CONFIG,
    DROPPING,
    SEED,
    SETTINGS,
    VOCAB,
    Sentences,
    batch,
    endless,
    micro_batches,
    new_model,
    nothing,
    random_pairs,
    run,
    weights,
)


@pytest.fixture(autouse=True)
def one_thread(own_threads: None) -> None:
    """Matrices this small gain nothing from a second thread, and are much slower with it on a busy machine."""
    torch.set_num_threads(1)


def torchs_loss(model: Transformer, micro: Sentences, smoothing: float) -> Tensor:
    """Return torch's loss per token, from all logits at once."""
    logits = model.logits(model(micro.src, micro.tgt_in))
    return F.cross_entropy(logits.flatten(0, 1), micro.tgt_out.flatten(), ignore_index=PAD, label_smoothing=smoothing)


class Descent(torch.optim.SGD):
    """Gradient descent, so that the change of the weights is rate times gradient. Records the rates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


# --- one step


def test_train_loop_of_four_micro_batches_of_different_sizes_equals_one():
    one, four = new_model(), new_model()
    curves = [
        run(one, [micro_batches([31])]).training_curve,
        run(four, [micro_batches([2, 3, 19, 7])]).training_curve,
    ]
    torch.testing.assert_close(weights(four), weights(one), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*curves, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_train_step_follows_the_gradient_of_torchs_loss_per_token():
    model, twin = new_model(), new_model()
    whole, parts = micro_batches([31])[0], micro_batches([2, 3, 19, 7])
    expected = torchs_loss(twin, whole, 0.1)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
    settings = replace(SETTINGS, max_steps=1)
    state = run(model, [parts], settings, optimizer=Descent(model), learning_rate=lambda step: 1.0)
    torch.testing.assert_close(weights(twin) - weights(model), gradient, rtol=1e-4, atol=1e-5)
    assert state.training_curve[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert state.training_curve[0]["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_train_loop_has_the_loss_curve_of_torchs_own_operators(monkeypatch):
    """Compares our operators with torch's: oneDNN's products with linear, attention by batched products with
    scaled_dot_product_attention, and the loss by chunks and micro-batches with cross_entropy of all logits. Both
    train a model with dropout by Adam until it has learned something."""
    config = replace(DROPPING, d_model=128, d_ff=256, num_heads=4, d_k=32, d_v=32)
    data = [[batch([(src, src) for src, _ in random_pairs(67, seed)])] for seed in range(5)]  # the task is to copy
    rate = 5e-4  # with larger steps, rounding exceeds the tolerance on some processors
    settings = replace(SETTINGS, max_steps=40)
    products_by_onednn = []

    def curve(
        change: Callable[[pytest.MonkeyPatch], None], steps: Callable[[Transformer], list[float]]
    ) -> list[float]:
        with monkeypatch.context() as patch:
            change(patch)
            return steps(new_model(config))

    def fast(patch: pytest.MonkeyPatch) -> None:
        onednn = products._Linear.apply
        patch.setattr(products, "chosen", lambda: "onednn")
        patch.setattr(products, "SMALL", 0)
        patch.setattr(loss, "CHUNK_LOGITS", products.ROW_MULTIPLE * VOCAB)
        patch.setattr(products._Linear, "apply", lambda *x: products_by_onednn.append(0) or onednn(*x))

    def plain(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(products, "chosen", lambda: "mkl")
        patch.setattr(attention, "MAX_UNFUSED_QUERIES", 0)

    def by_hand(model: Transformer) -> list[float]:
        optimizer, losses = torch.optim.Adam(model.parameters(), rate, (0.9, 0.98), 1e-9), []
        for step in range(1, settings.max_steps + 1):
            seed_dropout(torch.device("cpu"), SEED, step, 0)
            optimizer.zero_grad()
            value = torchs_loss(model, data[(step - 1) % len(data)][0], settings.label_smoothing)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    def by_the_loop(model: Transformer) -> list[float]:
        return [
            point["train_loss"]
            for point in run(model, data, settings, learning_rate=lambda step: rate).training_curve
        ]

    ours, theirs = curve(fast, by_the_loop), curve(plain, by_hand)
    assert len(products_by_onednn) > 10 * settings.max_steps
    assert theirs[-1] < 0.8 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_adam_is_the_formula_of_section_5_3():
    model, twin = new_model(), new_model()
    epoch = [[micro] for micro in micro_batches([5, 7, 11])]
    run(model, epoch, optimizer=adam(model, 0.9, 0.98, 1e-9))
    first = second = torch.zeros_like(weights(twin))
    for step, (micro,) in enumerate(epoch, start=1):
        twin.zero_grad()
        torchs_loss(twin, micro, SETTINGS.label_smoothing).backward()
        gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
        first = 0.9 * first + (1 - 0.9) * gradient
        second = 0.98 * second + (1 - 0.98) * gradient**2
        change = first / (1 - 0.9**step) / ((second / (1 - 0.98**step)).sqrt() + 1e-9)
        nn.utils.vector_to_parameters(weights(twin) - 0.01 / step * change, twin.parameters())
    # Where the gradient is almost 0, Adam turns its rounding error into a step. These few weights are left out.
    differ = ~torch.isclose(weights(model), weights(twin), rtol=1e-3, atol=1e-5)
    assert differ.float().mean() < 0.01


def test_train_step_sets_the_learning_rate_of_its_step():
    model = new_model()
    optimizer = Descent(model)
    settings = replace(SETTINGS, max_steps=7)
    rates = [0.001 * step**2 for step in range(1, 8)]
    state = run(
        model, [micro_batches([3])], settings, optimizer=optimizer, learning_rate=lambda step: 0.001 * step**2
    )
    assert optimizer.rates == rates
    assert [point["learning_rate"] for point in state.training_curve] == rates


@pytest.mark.parametrize(("max_grad_norm", "clipped"), [(0.0, False), (0.01, True), (100.0, False)])
def test_train_step_clips_the_gradient_to_its_norm_in_its_direction(max_grad_norm, clipped):
    moves = []
    for limit in (max_grad_norm, 0.0):
        model = new_model()
        before = weights(model)
        settings = replace(SETTINGS, max_steps=1, max_grad_norm=limit)
        epoch = [micro_batches([5, 3])]
        state = run(model, epoch, settings, optimizer=Descent(model), learning_rate=lambda step: 1.0)
        moves.append(before - weights(model))
    assert state.training_curve[0]["grad_norm"] == pytest.approx(moves[1].norm().item(), rel=1e-3)
    assert moves[0].norm().item() == pytest.approx(0.01 if clipped else moves[1].norm().item(), rel=1e-3)
    assert F.cosine_similarity(*moves, dim=0) == pytest.approx(1.0, abs=1e-4)


def test_seed_dropout_differs_by_seed_step_and_place_and_nothing_else():
    def noise(*parts: int) -> tuple[float, ...]:
        seed_dropout(torch.device("cpu"), *parts)
        return tuple(torch.rand(3).tolist())

    parts = [(seed, step, place) for seed in range(3) for step in range(5) for place in range(4)]
    assert len({noise(*part) for part in parts}) == len(parts)
    assert noise(1, 2, 3) == noise(1, 2, 3)


def test_train_loop_has_dropout_on_after_a_validation_too():
    micro = micro_batches([13])[0]

    def losses(config: TransformerConfig) -> list[float]:
        model = new_model(config)

        def validate() -> dict[str, float]:
            total, tokens = cross_entropy(model, [micro])
            return {"valid_loss": total / tokens}

        settings = replace(SETTINGS, max_steps=2, validate_every=1)
        rate = 1e-9  # the weights do not change: only dropout makes a difference
        state = run(model, [[micro]], settings, learning_rate=lambda step: rate, validate=validate)
        valid = [point["valid_loss"] for point in state.validation_curve]
        assert valid[0] == pytest.approx(valid[1], abs=1e-5)
        return [point["train_loss"] for point in state.training_curve]

    without, with_dropout = losses(CONFIG), losses(DROPPING)
    assert without[0] == pytest.approx(without[1], abs=1e-5)
    assert len({round(loss, 4) for loss in (without[0], *with_dropout)}) == 3


def test_train_step_in_bf16_changes_little_and_keeps_weights_in_fp32():
    models = [new_model(), new_model()]
    losses = [
        run(model, [micro_batches([13])], replace(SETTINGS, max_steps=1), bf16=bf16).training_curve[0]["train_loss"]
        for model, bf16 in zip(models, (False, True), strict=True)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert all(p.dtype == torch.float32 for p in models[1].parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 1e-2)])
def test_train_loop_takes_the_steps_of_double_precision_on_each_device(device, bf16, tolerance):
    exact, model = new_model().double(), new_model().to(device)
    epoch = [micro_batches([5, 7]), micro_batches([3], seed=2)]
    settings = replace(SETTINGS, max_steps=6)
    states = [run(exact, epoch, settings), run(model, epoch, settings, bf16=bf16)]
    expected, found = ([point["train_loss"] for point in state.training_curve] for state in states)
    assert found == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < 0.9 * expected[0]
    sums = [cross_entropy(trained, epoch[0], bf16=on) for trained, on in ((exact, False), (model, bf16))]
    assert sums[1][0] == pytest.approx(sums[0][0], rel=tolerance)
    assert sums[1][1] == sums[0][1]


def test_seed_dropout_seeds_as_torch_does_and_by_torch_on_a_gpu(monkeypatch):
    seeds: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", seeds.append)
        seed_dropout(torch.device("cuda"), 1, 2, 3)
        seed_dropout(torch.device("cpu"), 1, 2, 3)
    drawn = torch.rand(5)
    assert len(seeds) == 1
    torch.manual_seed(seeds[0])
    assert torch.equal(torch.rand(5), drawn)


def test_compile_sends_every_micro_batch_through_the_compiled_model(monkeypatch):
    calls: list[int] = []  # the thread that calls it

    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.embedding = model.embedding

        def forward(self, *args: Tensor) -> Tensor:
            calls.append(threading.get_ident())
            return self.model(*args)

        def __len__(self) -> int:  # like torch's compiled model, it has no truth value
            raise TypeError

    def fake_compile(model: nn.Module, **options: Any) -> nn.Module:
        assert options == {"dynamic": True}
        return Compiled(model)

    monkeypatch.setattr(torch, "compile", fake_compile)
    for num_threads in (1, 2):  # a compiled model uses no replicas, even with two threads
        torch.set_num_threads(num_threads)
        plain, compiled = new_model(), new_model()
        run(plain, [micro_batches([2, 3])])
        assert not calls
        run(compiled, [micro_batches([2, 3])], compile=True)
        assert calls == 2 * SETTINGS.max_steps * [threading.get_ident()]
        calls.clear()
        if num_threads == 1:
            assert torch.equal(weights(plain), weights(compiled))
        torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # the C++ compiler takes half a minute
@pytest.mark.filterwarnings("ignore")
def test_compile_takes_the_steps_of_the_plain_model():
    models = [new_model(), new_model()]
    for model, on in zip(models, (False, True), strict=True):
        run(model, [micro_batches([5, 7]), micro_batches([3], seed=2)], compile=on)
    torch.testing.assert_close(*(weights(model) for model in models), rtol=1e-3, atol=1e-4)


# --- losses and gradients that are not finite


def test_train_step_refuses_a_loss_that_is_not_finite_and_names_the_step():
    model = new_model()
    plan = endless([micro_batches([3]), micro_batches([5])], TrainState())
    before: list[Tensor] = []

    def poisoned() -> Iterator[GlobalBatch]:
        yield next(plan)
        yield next(plan)
        with torch.no_grad():
            model.embedding.weight[7, 3] = math.inf
        before.append(weights(model))
        yield next(plan)

    state, saved = TrainState(), []
    with pytest.raises(NotFiniteError) as error, ThreadedDataParallel(model) as parallel:
        train_loop(
            parallel,
            adam(model, 0.9, 0.98, 1e-9),
            poisoned(),
            replace(SETTINGS, max_steps=5),
            state,
            seed=SEED,
            bf16=False,
            learning_rate=lambda step: 0.01 / step,
            validate=lambda: {"valid_loss": 1.0},
            save=saved.append,
            report=nothing,
            progress=nothing,
        )
    message = str(error.value)
    assert message.startswith("step 3 (epoch 1, batch 0): the loss is inf, the gradient norm nan")
    assert "the learning rate 0.00333" in message
    assert "Lower train.lr_scale, raise train.warmup_steps, set train.max_grad_norm to 1" in message
    assert torch.equal(weights(model), before[0])
    assert (state.step, state.position, saved) == (2, (1, 0), [])


def test_train_step_refuses_a_gradient_that_is_not_finite():
    model = new_model()
    before = weights(model)
    next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NotFiniteError, match=r"step 1 .*the loss is \d\.\d+, the gradient norm (nan|inf)"):
        run(model, [micro_batches([3])])
    assert torch.equal(weights(model), before)


# --- when the loop reports, validates, saves and ends


def events(settings: Train, losses: list[float] | None = None) -> tuple[TrainState, list[tuple[str, int]]]:
    """Return the final state, and (call, step) in order. Validation returns `losses` one after the other."""
    state, seen = TrainState(), []
    turn = iter(losses or [1.0] * 100)

    def validate() -> dict[str, float]:
        seen.append(("validate", state.step))
        return {"valid_loss": next(turn)}

    def report(metrics: dict[str, float], step: int) -> None:
        seen.append(("valid" if "valid_loss" in metrics else "train", step))

    run(
        new_model(), [micro_batches([2])] * 3, settings,
        state=state, validate=validate, report=report, save=lambda state: seen.append(("save", state.step)),
    )  # fmt: skip
    return state, seen


def at(seen: list[tuple[str, int]], what: str) -> list[int]:
    return [step for name, step in seen if name == what]


def test_train_loop_reports_validates_and_saves_as_often_as_set():
    settings = replace(SETTINGS, max_steps=13, log_every=4, validate_every=5, checkpoint_every=3)
    state, seen = events(settings)
    assert at(seen, "train") == [4, 8, 12, 13]
    assert at(seen, "validate") == at(seen, "valid") == [5, 10, 13]
    assert at(seen, "save") == [3, 6, 9, 12, 13]
    assert (state.step, state.finished, state.position) == (13, True, (4, 1))
    assert [point["step"] for point in state.training_curve] == [4, 8, 12, 13]
    assert [point["step"] for point in state.validation_curve] == [5, 10, 13]


def test_train_loop_reports_a_last_step_that_is_due_anyway_once():
    _, seen = events(replace(SETTINGS, max_steps=6, log_every=3, validate_every=3, checkpoint_every=3))
    assert seen[-4:] == [("validate", 6), ("valid", 6), ("train", 6), ("save", 6)]
    assert len(seen) == 8


def test_patience_ends_training_after_validations_without_a_better_loss():
    settings = replace(SETTINGS, max_steps=100, validate_every=2, patience=3, checkpoint_every=7)
    state, seen = events(settings, [3.0, 2.0, 2.5, 2.0, 1.5, 1.6, 1.5, 1.7, 0.1])
    assert at(seen, "validate") == [
        2,
        4,
        6,
        8,
        10,
        12,
        14,
        16,
    ]  # 1.5, then three that are not lower
    assert (state.step, state.finished) == (16, True)
    assert at(seen, "save") == [7, 14, 16]


def test_patience_keeps_the_last_training_point():
    settings = replace(SETTINGS, max_steps=100, log_every=50, validate_every=2, patience=1, checkpoint_every=7)
    state, seen = events(settings, [1.0, 2.0])
    assert [point["step"] for point in state.training_curve] == at(seen, "train") == [4]


def test_train_loop_refuses_a_validation_loss_that_is_no_number():
    settings = replace(SETTINGS, max_steps=4, validate_every=2, checkpoint_every=2)
    with pytest.raises(NotFiniteError, match=r"step 4: the validation loss is nan. Lower train.lr_scale"):
        events(settings, [1.0, math.nan])


def test_patience_of_zero_never_ends_training():
    state, _ = events(replace(SETTINGS, max_steps=9, validate_every=1), [float(i) for i in range(9)])
    assert state.step == 9


def test_patience_does_not_count_the_validation_that_an_end_adds():
    settings = replace(SETTINGS, max_steps=5, validate_every=2, patience=2)
    losses = [1.0, 1.1, 1.2, 1.3]  # at steps 2, 4, 5, and in the longer run 6
    state, _ = events(settings, losses)
    assert end_of(state, settings) == 5
    longer = replace(settings, max_steps=9)
    assert end_of(state, longer) == 9
    go_on(state, longer)
    assert [point["step"] for point in state.validation_curve] == [2, 4]


def test_go_on_leaves_a_run_that_is_at_its_end_as_it_is():
    settings = replace(SETTINGS, max_steps=5, log_every=3, validate_every=2)
    state, _ = events(settings)
    before = asdict(state)
    for same in (settings, replace(settings, log_every=2), replace(settings, max_steps=4)):
        go_on(state, same)
        assert asdict(state) == before


def test_train_loop_that_is_finished_takes_no_further_step():
    model = new_model()
    before = weights(model)
    run(model, [micro_batches([2])], state=TrainState(step=3, finished=True))
    assert torch.equal(weights(model), before)


def test_training_curve_is_the_mean_over_the_tokens_since_the_last_point():
    epoch = [micro_batches([2], seed=1), micro_batches([17], seed=2), micro_batches([5], seed=3)]
    every = run(new_model(), epoch).training_curve
    whole = run(new_model(), epoch, replace(SETTINGS, log_every=3)).training_curve
    tokens = [sum(micro.num_tokens for micro in step) for step in epoch]
    expected = sum(n * point["train_loss"] for n, point in zip(tokens, every, strict=True)) / sum(tokens)
    assert whole[0]["train_loss"] == pytest.approx(expected, rel=1e-6)


def test_train_loop_counts_tokens_over_all_steps():
    epoch = [micro_batches([2, 3]), micro_batches([7])]
    state = run(new_model(), epoch, replace(SETTINGS, max_steps=5))
    per_step = [sum(micro.num_tokens for micro in step) for step in epoch]
    assert state.tokens == 3 * per_step[0] + 2 * per_step[1]


# --- resume


def without_time(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in point.items() if key != "tokens_per_second"} for point in curve]


def twice_half_and_whole(folder: Path, config: TransformerConfig, log_every: int) -> list[dict[str, Any]]:
    """Train 10 steps, first with a resume from the checkpoint of step 5, then without interruption.

    Returns weights, Adam's moments and the loop's state of both.
    """
    epoch = [micro_batches([3, 5, 2, 4], seed=seed) for seed in (1, 2, 3)]
    settings = replace(SETTINGS, max_steps=10, log_every=log_every, validate_every=3, checkpoint_every=5)
    results = []
    for stop in (5, 10):
        model = new_model(config)
        optimizer = adam(model, 0.9, 0.98, 1e-9)

        def save(
            state: TrainState, model: Transformer = model, optimizer: torch.optim.Adam = optimizer, stop: int = stop
        ) -> None:
            if state.step == 5 == stop:
                checkpoint.save(folder, model, optimizer, state, {}, keep=1)
                raise KeyboardInterrupt

        def validate(model: Transformer = model) -> dict[str, float]:
            total, tokens = cross_entropy(model, micro_batches([7], seed=9))
            return {"valid_loss": total / tokens}

        try:
            state = run(model, epoch, settings, optimizer=optimizer, validate=validate, save=save)
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
                settings,
                optimizer=optimizer,
                state=state,
                validate=lambda: validate(model),  # noqa: B023
            )
        moments = [optimizer.state[p] for p in model.parameters()]
        results.append({"weights": weights(model), "moments": moments, "state": asdict(state)})
    return results


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("config", [CONFIG, DROPPING], ids=["no dropout", "dropout"])
def test_resume_after_k_steps_equals_2k_steps_bit_for_bit(tmp_path, config, num_threads):
    torch.set_num_threads(num_threads)
    resumed, undisturbed = twice_half_and_whole(tmp_path, config, log_every=5)
    assert torch.equal(resumed["weights"], undisturbed["weights"])
    for ours, theirs in zip(resumed["moments"], undisturbed["moments"], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    for result in (resumed, undisturbed):
        result["state"]["training_curve"] = without_time(result["state"]["training_curve"])
        del result["state"]["seconds"]
    assert resumed["state"] == undisturbed["state"]


def test_resume_between_two_points_does_not_change_the_training_curve(tmp_path):
    resumed, undisturbed = twice_half_and_whole(tmp_path, CONFIG, log_every=4)
    curves = [without_time(result["state"]["training_curve"]) for result in (resumed, undisturbed)]
    assert curves[0] == curves[1]


# --- ranks

SPLITS = {
    "as many on each": [[[3, 5, 2, 7]], [[2, 2]]],
    "one more on the first": [[[3, 5, 2]], [[4, 1, 1]]],
    "none on the second": [[[6]], [[2, 3]]],
}
"""Sizes of the micro-batches in each step of an epoch."""


def steps_of(name: str) -> list[list[Sentences]]:
    return [micro_batches(sizes, seed=seed) for seed, (sizes,) in enumerate(SPLITS[name])]


def as_rank(rank: int, folder: str) -> None:
    """Run one of two ranks and save the results that must equal those of one rank."""
    torch.set_num_threads(2)  # each trains on one micro-batch if there are two
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name in SPLITS:
        model = new_model(DROPPING)
        state = run(model, steps_of(name), rank=rank, num_ranks=2)
        results[name] = weights(model).numpy()
        results[f"{name}: losses"] = [point["train_loss"] for point in state.training_curve]
    validation = micro_batches([7])[rank:]  # the second rank has no micro-batch
    results["cross_entropy"] = cross_entropy(new_model(), validation)
    model = new_model()
    if rank == 1:  # only this rank's gradient is broken, but both must stop
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
def test_ranks_two_equal_one_with_dropout_on(two_ranks, name):
    model = new_model(DROPPING)
    state = run(model, steps_of(name))
    losses = [point["train_loss"] for point in state.training_curve]
    for results in two_ranks:
        np.testing.assert_allclose(results[name], weights(model).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(results[f"{name}: losses"], losses, rtol=1e-5)
    assert (two_ranks[0][name] == two_ranks[1][name]).all()


def test_ranks_share_validation_though_one_has_none_of_it(two_ranks):
    expected = cross_entropy(new_model(), micro_batches([7]))
    for results in two_ranks:
        np.testing.assert_allclose(results["cross_entropy"], expected, rtol=1e-6)


def test_ranks_both_stop_when_one_gradient_is_not_finite(two_ranks):
    for results in two_ranks:
        assert str(results["error"]).startswith("step 1 (epoch 0, batch 0)")


# --- it learns


def test_train_loop_learns_to_copy():
    """The tokens are random, so only the source predicts the next one. Without it, perplexity would stay at 19."""
    config = replace(CONFIG, d_model=64, d_ff=64, d_k=16, d_v=16, num_heads=4, norm="pre")
    rng = np.random.default_rng(3)

    def copies(count: int) -> Sentences:
        rows = [rng.integers(EOS + 1, VOCAB, rng.integers(3, 8)).tolist() for _ in range(count)]
        return batch([(row, row) for row in rows])

    epoch = [[copies(64)] for _ in range(100)]
    settings = replace(SETTINGS, max_steps=300, label_smoothing=0.0, log_every=50)
    model = new_model(config)
    run(model, epoch, settings, learning_rate=lambda step: 3e-3 * min(1, step / 40))
    total, tokens = cross_entropy(model, [copies(101)])
    assert math.exp(total / tokens) < 1.1
