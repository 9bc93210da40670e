"""Dropout for a CPU.

torch draws one random number for each element, which took 14% of a small model's step (docs/log.md). Here each 64-bit
draw serves four elements. Threads that train at the same time have a generator each, so that what a thread draws
depends on its own seed alone.
"""

import threading

import torch
from torch import Tensor
from torch.nn import functional as F


class _Thread(threading.local):
    generator: torch.Generator | None = None


_thread = _Thread()


def use_own_generator() -> None:
    """Make dropout in this thread draw from its own generator, instead of torch's, which all threads share."""
    _thread.generator = torch.Generator()


def generator() -> torch.Generator:
    """The generator that dropout on a CPU uses in this thread."""
    return _thread.generator or torch.default_generator


def dropout(x: Tensor, p: float) -> Tensor:
    """Set each element to 0 with probability p, and divide the others by 1 - p (section 5.4).

    On a CPU p is rounded to a multiple of 2^-16 below 1. On other devices, and in a compiled model, this is torch's
    dropout.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2^16 values that 16 bits have
    if not dropped:
        return x
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator())
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))
