"""Threads with a micro-batch each give the result of one thread."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.training.loop import TrainState
from pipeline.training.threads import ThreadedDataParallel, number_of_replicas, parallel_efficiency
from tests.pipeline.training.harness import DROPPING, SETTINGS, Sentences, micro_batches, new_model, run, weights


@pytest.fixture(autouse=True)
def one_thread(own_threads: None) -> None:
    """Matrices this small gain nothing from a second thread, and are much slower with it on a busy machine."""
    torch.set_num_threads(1)


def run_by(num_threads: int, epoch: list[list[Sentences]], bf16: bool = False) -> tuple[Tensor, TrainState]:
    """Train a model with dropout for six steps. Returns weights and state."""
    torch.set_num_threads(num_threads)
    model = new_model(DROPPING)
    state = run(model, epoch, replace(SETTINGS, max_steps=6), bf16=bf16)
    assert threads_of_a_new_thread() == num_threads
    return weights(model), state


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("num_threads", [2, 3, 4, 16])
@pytest.mark.parametrize("bf16", [False, True])
def test_threaded_data_parallel_equals_one_thread_with_dropout_on(num_threads, bf16):
    epoch = [micro_batches([5, 7, 2, 9, 3, 8]), micro_batches([4], seed=2), micro_batches([6, 1, 3, 3], seed=3)]
    (expected, alone), (found, together) = run_by(1, epoch, bf16), run_by(num_threads, epoch, bf16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 if bf16 else 1e-4)
    for ours, theirs in zip(together.training_curve, alone.training_curve, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3 if bf16 else 1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2 if bf16 else 1e-4)


def test_threaded_data_parallel_repeats_the_same_weights_bit_for_bit():
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
def test_number_of_replicas_is_the_most_that_keep_the_threads_busy(num_threads, num_micro_batches, expected):
    assert number_of_replicas(num_threads, num_micro_batches) == expected


def test_replicas_work_at_once_and_share_torchs_threads(monkeypatch):
    seen: dict[int, int] = {}  # {sentences of the micro-batch: threads of torch}

    def spy(model: Transformer, src: Tensor, tgt_in: Tensor) -> Tensor:
        everyone.wait(timeout=60)  # waits until all threads are here
        seen[len(src)] = torch.get_num_threads()
        return forward(model, src, tgt_in)

    forward, everyone = Transformer.forward, threading.Barrier(3)
    monkeypatch.setattr(Transformer, "forward", spy)
    run_by(6, [micro_batches([5, 7, 2])])
    assert seen == {5: 2, 7: 2, 2: 2}
    everyone = threading.Barrier(1)
    run_by(6, [micro_batches([5])])
    assert seen[5] == 6


def sum_of_outputs(model: Transformer, micro: Sentences) -> Tensor:
    return model(micro.src, micro.tgt_in).sum()


def test_replicas_share_the_weights_and_are_no_more_than_had_work():
    torch.set_num_threads(6)
    model = new_model()
    with ThreadedDataParallel(model) as parallel:
        for count, expected in ((1, 1), (3, 3), (2, 3), (6, 6)):
            parallel.backward(micro_batches([2] * count), sum_of_outputs)
            assert len(parallel.replicas) == expected
    for replica in parallel.replicas:
        for ours, theirs in zip(replica.model.parameters(), model.parameters(), strict=True):
            assert ours.data_ptr() == theirs.data_ptr()
            assert ours.grad is not None
    assert len({replica.gradient.data_ptr() for replica in parallel.replicas}) == 6


def test_threaded_data_parallel_raises_an_error_once_all_threads_are_done(monkeypatch):
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


@pytest.mark.parametrize("fails", [False, True])
def test_threaded_data_parallel_ends_its_threads_with_the_context(fails):
    def loss_of(model: Transformer, micro: Sentences) -> Tensor:
        seen.add(threading.current_thread())
        if fails:
            raise RuntimeError("too many")
        return sum_of_outputs(model, micro)

    seen: set[threading.Thread] = set()
    torch.set_num_threads(2)
    with suppress(RuntimeError), ThreadedDataParallel(new_model()) as parallel:
        parallel.backward(micro_batches([2, 3]), loss_of)
    assert threading.current_thread() not in seen
    assert seen
    assert not any(thread.is_alive() for thread in seen)


@pytest.mark.parametrize(
    ("num_micro_batches", "num_workers", "expected"),
    [(4, 1, 1), (4, 4, 1), (4, 3, 2 / 3), (5, 4, 5 / 8), (1, 8, 1 / 8)],
)
def test_parallel_efficiency_is_the_mean_load_over_the_largest(num_micro_batches, num_workers, expected):
    assert parallel_efficiency(num_micro_batches, num_workers) == pytest.approx(expected)
