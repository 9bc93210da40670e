"""The fused loss compared with torch's cross_entropy of all logits in double precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import loss as loss_module
from model.config import PAD
from model.cpu import matmul
from model.loss import label_smoothed_loss

D_MODEL, VOCAB = 11, 31


def problem(rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight, target. About a third of the targets are PAD."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D_MODEL, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, D_MODEL, dtype=dtype, generator=generator).requires_grad_()
    target = torch.randint(1, VOCAB, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.3] = PAD
    return x, weight, target


def torchs(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value and both gradients, by torch in double precision."""
    x, weight = (value.detach().double().requires_grad_() for value in (x, weight))
    logits = (x @ weight.T).flatten(0, -2)
    value = F.cross_entropy(logits, target.flatten(), ignore_index=PAD, label_smoothing=smoothing, reduction="sum")
    return value.detach(), *torch.autograd.grad(value, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("chunk_rows", [1, 150, 1000])
@pytest.mark.parametrize("onednn", [True, False])
def test_label_smoothed_loss_and_its_gradients_are_torchs(dtype, smoothing, chunk_rows, onednn, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_rows * VOCAB)
    onednn = onednn and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(matmul, "chosen", lambda: "onednn" if onednn else "mkl")
    monkeypatch.setattr(matmul, "SMALL", 0)
    x, weight, target = problem(rows=753, dtype=dtype)
    value = label_smoothed_loss(x, weight, target, smoothing)
    (3 * value).backward()  # the incoming gradient is not 1, as after a division by the number of tokens
    expected, grad_x, grad_weight = torchs(x, weight, target, smoothing)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), 3 * grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), 3 * grad_weight, rtol=1e-5, atol=1e-4)
    assert (x.grad[target == PAD] == 0).all()


def test_label_smoothed_loss_is_that_of_a_table_made_by_hand():
    # Vocabulary 5, smoothing 0.1: each token has 0.02, the target 0.92. The logits are x itself.
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25], [0.4, 0.1, 0.1, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]])
    table = torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02], [0.02, 0.02, 0.02, 0.02, 0.92], [0, 0, 0, 0, 0]])
    target = torch.tensor([2, 4, PAD])
    value = label_smoothed_loss(probabilities.log(), torch.eye(5), target, smoothing=0.1)
    torch.testing.assert_close(value, -(table * probabilities.log()).sum())


def test_label_smoothed_loss_ignores_leading_dimensions():
    x, weight, target = problem(rows=42)
    value = label_smoothed_loss(x.view(2, 3, 7, D_MODEL), weight, target.view(2, 3, 7), 0.1)
    assert torch.equal(value, label_smoothed_loss(x, weight, target, 0.1))


def test_label_smoothed_loss_of_padding_alone_is_0():
    x, weight, target = problem(rows=13)
    value = label_smoothed_loss(x, weight, torch.full_like(target, PAD), 0.1)
    value.backward()
    assert value.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_label_smoothed_loss_is_the_same_without_gradients():
    x, weight, target = problem(rows=53)
    with torch.no_grad():
        value = label_smoothed_loss(x, weight, target, 0.1)
    assert torch.equal(value, label_smoothed_loss(x, weight, target, 0.1).detach())


@pytest.mark.parametrize("grad", [True, False])
def test_label_smoothed_loss_computes_gradients_only_if_needed(grad):
    x, weight, target = problem(rows=53)
    with torch.set_grad_enabled(grad), torch.profiler.profile() as profile:
        label_smoothed_loss(x, weight, target, 0.1)
    assert ("aten::index_add_" in {event.key for event in profile.key_averages()}) == grad
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == (2 if grad else 1)


def test_label_smoothed_loss_of_large_logits_does_not_overflow():
    x, weight, target = problem(rows=29)
    value = label_smoothed_loss(x * 1000, weight, target, 0.1)
    torch.testing.assert_close(value.double(), torchs(x * 1000, weight, target, 0.1)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrt", ["x", "weight"])
def test_label_smoothed_loss_gradients_are_the_slope_of_the_value(wrt):
    """The loss computes in single precision, so the finite differences are wide and the tolerance is loose."""
    x, weight, target = problem(rows=5, dtype=torch.float64)
    moved = {"x": x, "weight": weight}[wrt]
    label_smoothed_loss(x, weight, target, 0.1).backward()
    direction = torch.randn(moved.shape, dtype=moved.dtype, generator=torch.Generator().manual_seed(3))
    values = []
    for step in (-0.01, 0.01):
        ends = {"x": x, "weight": weight, wrt: moved + step * direction}
        values.append(label_smoothed_loss(ends["x"], ends["weight"], target, 0.1).item())
    slope = (values[1] - values[0]) / 0.02
    assert slope == pytest.approx((moved.grad * direction).sum().item(), rel=2e-3)


def test_label_smoothed_loss_in_bf16_is_close_to_single_precision():
    x, weight, target = problem(rows=499)
    with torch.autocast("cpu", torch.bfloat16):
        value = label_smoothed_loss(x, weight, target, 0.1)
    value.backward()
    expected, grad_x, grad_weight = torchs(x, weight, target, 0.1)
    assert value.item() == pytest.approx(expected.item(), rel=2e-3)
    assert value.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    for ours, theirs in ((x.grad, grad_x), (weight.grad, grad_weight)):
        assert F.cosine_similarity(ours.double().flatten(), theirs.flatten(), dim=0) > 0.9999
        assert ours.double().norm() == pytest.approx(theirs.norm().item(), rel=1e-2)
