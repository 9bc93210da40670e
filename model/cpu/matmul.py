"""Matrix products, nine tenths of a Transformer's arithmetic, by MKL or oneDNN. library.py explains the choice.

oneDNN multiplies in single precision on a CPU, if the product is large enough: its call takes 10 microseconds longer.
All other products are torch's own. oneDNN computes a b^T of row-major a and b, and all three products of a linear
layer y = x W^T + b, with x [rows, inputs] and W [outputs, inputs], are written in that form:

    y         x W^T              a = x, b = W
    grad x    grad W             a = grad, b = W^T
    grad W    grad^T x           a = grad^T, b = x^T, or the transpose of this: oneDNN divides columns among its
                                 threads, so the larger of outputs and inputs becomes the columns

oneDNN compiles code for each new shape, which takes a millisecond, so rows are padded with zeros to a small set of
numbers. torch offers oneDNN's product without a gradient; `linear` adds one.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.cpu.library import chosen, onednn_matmul

ROW_MULTIPLE = 64
SMALL = 1 << 20
"""With fewer multiplications, oneDNN's longer call does not pay."""


class Linear(nn.Linear):
    """torch.nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: [..., inputs] -> [..., outputs]."""
    rows = x.shape[:-1].numel()
    if not _by_onednn(x, weight, rows):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(rows, x.size(-1)), weight, bias).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        rows, x = len(x), pad_rows(x)
        ctx.save_for_backward(x, weight)
        return onednn_matmul(x, weight, bias)[:rows]  # [rows, outputs]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rows, grad = len(grad), pad_rows(grad)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_nt(grad, weight.T)[:rows]  # [rows, inputs]
        if ctx.needs_input_grad[1]:
            wide = grad.size(1) > x.size(1)
            grad_weight = matmul_nt(x.T, grad.T).T if wide else matmul_nt(grad.T, x.T)  # [outputs, inputs]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)  # [outputs]
        return grad_x, grad_weight, grad_bias


def matmul_nt(a: Tensor, b: Tensor, scratch: Tensor | None = None) -> Tensor:
    """a b^T without a gradient: [m, k], [n, k] -> [m, n]. The result may be in the memory of `scratch`."""
    if _by_onednn(a, b, len(a)):
        return onednn_matmul(a, b)
    return a @ b.T if scratch is None else torch.mm(a, b.T, out=scratch[: len(a)])


def alloc_scratch(a: Tensor, rows: int, columns: int) -> Tensor | None:
    """An output buffer [rows, columns] for a sequence of `matmul_nt` on parts of `a`. It avoids the page faults of
    fresh memory. None under autocast, which does not apply to a product with an `out`."""
    return None if _is_autocast(a) else a.new_empty(rows, columns)


def accumulate_tn(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b without a gradient: [rows, m], [rows, n] -> [m, n]. `total` is from `alloc_accumulator`."""
    if _by_onednn(b.T, a.T, b.size(1)):
        total += matmul_nt(b.T, a.T).T
    elif _is_autocast(a):
        total += a.T @ b
    else:
        torch.addmm(total, a.T, b, out=total)


def alloc_accumulator(start: Tensor) -> Tensor:
    """A copy of `start` for `accumulate_tn` to add to: column-major for oneDNN, row-major for MKL."""
    layout = torch.contiguous_format
    return start.T.clone(memory_format=layout).T if _onednn_takes(start) else start.clone(memory_format=layout)


def pad_rows(x: Tensor) -> Tensor:
    """x [rows, any] with rows of zeros added, to a power of two or a multiple of ROW_MULTIPLE, if oneDNN takes x."""
    missing = -len(x) % min(ROW_MULTIPLE, 1 << (len(x) - 1).bit_length()) if _onednn_takes(x) else 0
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _by_onednn(a: Tensor, b: Tensor, rows: int) -> bool:
    if torch.compiler.is_compiling() or rows * b.numel() < SMALL:
        return False
    return _onednn_takes(a) and a.dtype == b.dtype


def _onednn_takes(x: Tensor) -> bool:
    suits = x.device.type == "cpu" and x.dtype == torch.float32 and not _is_autocast(x)
    return suits and chosen() == "onednn"


def _is_autocast(a: Tensor) -> bool:
    return torch.is_autocast_enabled(a.device.type)
