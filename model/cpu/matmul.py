"""Matrix products, which are nine tenths of a Transformer's arithmetic, by the faster of a CPU's two libraries.

torch has single precision done by MKL, which leaves the wider half of AVX-512's registers to Intel's processors;
on AMD's Zen 5 oneDNN takes less than half the time. torch reaches it by an operator of its compiler, which has no
gradient: `linear` gives it one. oneDNN makes machine code for each new shape, which takes a millisecond: so rows
are filled up with zeros to a multiple of ROW_MULTIPLE.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
ROW_MULTIPLE = 64
SMALL = 1 << 20
"""Multiplications below which oneDNN's call, 10 microseconds longer, does not pay."""


def matmul_nt(a: Tensor, b: Tensor, scratch: Tensor | None = None) -> Tensor:
    """a b^T: [m, k], [n, k] -> [m, n]; without a gradient. Where there is `scratch`, it may lie there."""
    if _by_onednn(a, b, len(a)):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T if scratch is None else torch.mm(a, b.T, out=scratch[: len(a)])


def alloc_scratch(a: Tensor, rows: int, columns: int) -> Tensor | None:
    """Memory for one product after another of parts of `a`: the system has to clear the pages of fresh memory. None
    under autocast, which leaves alone what is written to an `out`."""
    return None if _autocast(a) else a.new_empty(rows, columns)


def alloc_accumulator(start: Tensor) -> Tensor:
    """A copy of `start` for accumulate_tn to add to, in the layout in which that is faster."""
    layout = torch.contiguous_format
    return start.T.clone(memory_format=layout).T if _onednn_takes(start) else start.clone(memory_format=layout)


def accumulate_tn(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b: [rows, m], [rows, n] -> [m, n]; without a gradient. See `alloc_accumulator`."""
    if _by_onednn(b.T, a.T, b.size(1)):
        total += matmul_nt(b.T, a.T).T
    elif _autocast(a):
        total += a.T @ b
    else:
        torch.addmm(total, a.T, b, out=total)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: [..., inputs] -> [..., outputs]."""
    rows = x.shape[:-1].numel()
    if not _by_onednn(x, weight, rows):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(rows, x.size(-1)), weight, bias).view(*x.shape[:-1], -1)


def pad_rows(x: Tensor) -> Tensor:
    """With rows of zeros, to a power of two or a multiple of ROW_MULTIPLE; as it is where oneDNN does not work."""
    missing = -len(x) % min(ROW_MULTIPLE, 1 << (len(x) - 1).bit_length()) if _onednn_takes(x) else 0
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class Linear(nn.Linear):
    """By `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        rows, x = len(x), pad_rows(x)
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[:rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rows, grad = len(grad), pad_rows(grad)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_nt(grad, weight.T)[:rows]
        if ctx.needs_input_grad[1]:  # oneDNN gives its threads columns: so let the longer side be these
            grad_weight = matmul_nt(x.T, grad.T).T if grad.size(1) > x.size(1) else matmul_nt(grad.T, x.T)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def _by_onednn(a: Tensor, b: Tensor, rows: int) -> bool:
    if torch.compiler.is_compiling() or rows * b.numel() < SMALL:
        return False
    return _onednn_takes(a) and a.dtype == b.dtype


def _onednn_takes(x: Tensor) -> bool:
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not _autocast(x)


def _autocast(a: Tensor) -> bool:
    return torch.is_autocast_enabled(a.device.type)
