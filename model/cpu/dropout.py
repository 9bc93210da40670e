"""Dropout for a CPU, where torch draws one random number for each element, which takes long beside a small model.

Here each 64-bit draw serves four elements. Threads that train at the same time have a generator each, so that what
one draws depends on its own seed alone.
"""

import threading

import torch
from torch import Tensor
from torch.nn import functional as F


class _Thread(threading.local):
    generator: torch.Generator | None = None


_thread = _Thread()


def use_own_generator() -> None:
    """Let dropout in this thread draw from a generator of its own, instead of torch's, which all threads share."""
    _thread.generator = torch.Generator()


def generator() -> torch.Generator:
    """The generator that dropout on a CPU draws from in this thread."""
    return _thread.generator or torch.default_generator


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p, and divide the others by 1 - p (section 5.4).

    On a CPU p is rounded to a multiple of 2^-16 below 1. Elsewhere, and in a compiled model, it is torch's dropout.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of 2^16 values
    if not dropped:
        return x
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator())
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))
