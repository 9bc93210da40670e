"""Dropout that uses 16 bits of each random draw: shares, independence, gradients, seeds."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.cpu.dropout import dropout, generator, use_own_generator


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest_to_the_same_mean(p):
    torch.manual_seed(3)
    x = torch.ones(400_003, requires_grad=True)  # not a multiple of four
    dropped = dropout(x, p)
    kept = dropped != 0
    share = 1 - round(p * 2**16) / 2**16
    assert torch.equal(dropped, kept * torch.tensor(1 / share))
    for values in (kept, *(kept[i::4] for i in range(4))):  # four neighbours come from one draw
        deviation = math.sqrt(p * (1 - p) / len(values))
        assert abs(values.float().mean() - (1 - p)) < 5 * deviation + 2**-16
    for distance in (1, 2, 3, 4):  # neighbours are independent
        both = (kept[:-distance] & kept[distance:]).float().mean()
        assert abs(both - (1 - p) ** 2) < 5 * math.sqrt(0.25 / len(kept)) + 2**-15
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)


def test_dropout_of_nearly_all_does_not_divide_by_zero():
    torch.manual_seed(3)
    assert dropout(torch.ones(400_003), 1 - 1e-9).unique().tolist() == [0, 2**16]


def test_dropout_draws_differ_each_time_and_repeat_with_the_same_seed():
    x = torch.randn(31, 7, dtype=torch.float64)
    torch.manual_seed(11)
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    torch.manual_seed(11)
    assert torch.equal(dropout(x, 0.3), first)
    assert not torch.equal(first, second)
    assert torch.equal(dropout(x, 0.0), x)
    assert first.shape == x.shape
    assert first.dtype == x.dtype


def test_use_own_generator_leaves_the_other_threads_draws_alone():
    x = torch.ones(1001)
    torch.manual_seed(11)
    expected = dropout(x, 0.3)

    def of_a_thread() -> torch.Tensor:
        generator().manual_seed(11)
        return dropout(x, 0.3)

    torch.manual_seed(11)
    with ThreadPoolExecutor(1, initializer=use_own_generator) as pool:
        assert torch.equal(pool.submit(of_a_thread).result(), expected)
    assert torch.equal(dropout(x, 0.3), expected)
