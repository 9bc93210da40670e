"""Matrix products by oneDNN compared with torch's; gradients compared in double precision."""

import pytest
import torch
from torch.nn import functional as F

from model.cpu import matmul
from model.cpu.library import onednn_matmul
from model.cpu.matmul import (
    ROW_MULTIPLE,
    Linear,
    accumulate_tn,
    alloc_accumulator,
    alloc_scratch,
    linear,
    matmul_nt,
    pad_rows,
)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Use oneDNN on every processor and record the shapes of its operands."""
    monkeypatch.setattr(matmul, "chosen", lambda: "onednn")
    shapes = []

    def counted(a, b, *rest):
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return onednn_matmul(a, b, *rest)

    monkeypatch.setattr(matmul, "onednn_matmul", counted)
    return shapes


@pytest.mark.parametrize("shape", [(1,), (5,), (32,), (64,), (7, 11), (3, 1, 67), (5, 0)])
def test_linear_gives_the_values_of_torch(shape, calls):
    x, weight, bias = torch.randn(*shape, 1009), torch.randn(2003, 1009), torch.randn(2003)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    for same in (x, strided):
        torch.testing.assert_close(linear(same, weight, bias), F.linear(x, weight, bias), **CLOSE)
        torch.testing.assert_close(linear(same, weight[:1999]), F.linear(x, weight[:1999]), **CLOSE)
    assert len(calls) == (4 if x.numel() else 0)
    torch.testing.assert_close(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("outputs", [499, 2003])  # fewer and more than the inputs: the order of the factors differs
@pytest.mark.parametrize("shape", [(3,), (ROW_MULTIPLE,), (7, 11), (3, 5, 67)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_gives_the_gradients_of_torch(shape, outputs, bias, calls):
    x = torch.randn(*shape, 1009, requires_grad=True)
    layer, slope = Linear(1009, outputs, bias=bias), torch.randn(*shape, outputs)
    (layer(x) * slope).sum().backward()
    assert len(calls) == 3
    exact = x.detach().double().requires_grad_()
    plain = torch.nn.Linear(1009, outputs, bias=bias, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    (plain(exact) * slope).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, **CLOSE)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **CLOSE)


def test_linear_computes_no_gradient_that_is_not_needed(calls):
    x, weight = torch.randn(67, 1009), torch.randn(2003, 1009, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(calls) == 2
    assert x.grad is None
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


def test_linear_refuses_a_second_derivative():
    x, weight = torch.randn(67, 1009, requires_grad=True), torch.randn(2003, 1009)
    (slope,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_linear_of_many_lengths_gives_onednn_few_shapes(calls):
    weight = torch.randn(128, 2048)
    for rows in range(1, 1000):
        linear(torch.zeros(rows, 2048), weight)
    assert len({shape for shape, _ in calls}) <= 7 + 1000 // ROW_MULTIPLE


def test_matmul_nt_is_torchs_product_in_any_layout(calls):
    a, b = torch.randn(64, 1009), torch.randn(2003, 1009)
    torch.testing.assert_close(matmul_nt(a, b), a @ b.T, **CLOSE)
    torch.testing.assert_close(matmul_nt(a.T, b[:64].T), a.T @ b[:64], **CLOSE)
    assert len(calls) == 2
    torch.testing.assert_close(matmul_nt(a.double(), b.double()), a.double() @ b.double().T)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_accumulate_tn_adds_products_up_by_either_library(onednn, autocast, calls, monkeypatch):
    monkeypatch.setattr(matmul, "chosen", lambda: "onednn" if onednn else "mkl")
    a, b, start = torch.randn(64, 2003), torch.randn(64, 1009), torch.randn(2003, 1009)
    total, before = alloc_accumulator(start), start.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        accumulate_tn(total, a, b)
        accumulate_tn(total, a, b)
    close = {"atol": 1.0, "rtol": 0.02} if autocast else CLOSE
    torch.testing.assert_close(total, start + 2 * a.T @ b, **close)
    assert torch.equal(start, before)
    assert len(calls) == (2 if onednn and not autocast else 0)
    one = torch.randn(1009)
    assert alloc_accumulator(one.expand(2003, -1))[0].data_ptr() != one.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_alloc_accumulator_and_pad_rows_leave_torchs_layout_for_its_products(dtype):
    start, x = torch.randn(67, 101), torch.randn(67, 101)
    assert not alloc_accumulator(start).is_contiguous()
    assert len(pad_rows(x)) == 2 * ROW_MULTIPLE
    assert alloc_accumulator(start.to(dtype)).is_contiguous()
    assert len(pad_rows(x.to(dtype))) == 67
    with torch.autocast("cpu", torch.bfloat16):
        assert alloc_accumulator(start).is_contiguous()
        assert len(pad_rows(x)) == 67


def test_matmul_nt_by_mkl_writes_to_the_scratch(monkeypatch):
    monkeypatch.setattr(matmul, "chosen", lambda: "mkl")
    a, b = torch.randn(67, 101), torch.randn(211, 101)
    scratch = alloc_scratch(a, 101, 211)
    found = matmul_nt(a, b, scratch)
    assert found.data_ptr() == scratch.data_ptr()
    torch.testing.assert_close(found, a @ b.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert alloc_scratch(a, 101, 211) is None


def test_linear_and_matmul_nt_leave_small_products_and_bf16_to_torch(calls):
    small = torch.randn(31, 17)
    assert torch.equal(linear(small, small), F.linear(small, small))
    assert torch.equal(matmul_nt(small, small), small @ small.T)
    large = torch.randn(1024, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(large, large).dtype == torch.bfloat16
        assert matmul_nt(large, large).dtype == torch.bfloat16
    assert not calls
