"""Data parallelism over the threads of one process: each thread computes the gradient of its own micro-batches.

On a CPU, two threads that share a micro-batch synchronise at every operator. With a micro-batch each, they
synchronise once, at the end of the step. torch.nn.parallel.DistributedDataParallel is no substitute: it connects
processes, and needs the same number of micro-batches on each. The hazards and their remedies:

- Gradients. Two threads must not write to the `.grad` of one parameter. Each thread has a replica of the model with
  its own parameters, which share the memory of the weights, so that one optimizer step updates all replicas.
- Random numbers. torch's default generator is shared by all threads, so dropout would depend on their timing. Each
  thread has its own generator, which the loop seeds for every micro-batch.
- Determinism. The assignment of micro-batches to replicas and the order of sums depend only on the numbers of threads
  and micro-batches. With the same number of threads, a run gives the same weights bit for bit; with another number,
  the same up to rounding.
- torch.set_num_threads. The number is a property of the calling thread, but a new thread inherits the number that was
  set last by any thread. Each thread sets its share before it computes, and the caller's number is restored
  afterwards.
- Exceptions. The first exception is raised when every thread is done, so that none still uses the caller's model.
- Memory. A replica needs a gradient and the activations of a micro-batch. There are at most MAX_REPLICAS.
"""

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from model.cpu import dropout
from model.transformer import Transformer

MAX_REPLICAS = 8
MIN_EFFICIENCY = 0.85
"""The least share of the threads' time that must be used. Otherwise there are fewer replicas, with more threads."""

T = TypeVar("T")


class Replica:
    """A model whose gradients are views into one flat buffer, so that adding or reducing them is one call."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradient = parameters[0].new_zeros(sum(p.numel() for p in parameters))
        for p, part in zip(parameters, self.gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)


class ThreadedDataParallel:
    """A model whose gradient over micro-batches is computed by threads on a CPU.

    On another device, or with `compile`, the calling thread computes it alone. Use it as a context manager, which
    ends the threads.
    """

    def __init__(self, model: Transformer, *, compile: bool = False) -> None:
        self.replicas = [Replica(model)]
        self._compiled = torch.compile(model, dynamic=True) if compile else None
        self._threads = ThreadPoolExecutor(
            MAX_REPLICAS, "replica", initializer=dropout.use_own_generator
        )  # starts threads only when they are needed

    def __enter__(self) -> "ThreadedDataParallel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    @property
    def gradient(self) -> Tensor:
        """The gradient of the last `backward` as one vector. The `.grad` of the parameters are views into it."""
        return self.replicas[0].gradient

    def backward(self, micro_batches: Iterable[T], loss_of: Callable[[Transformer, T], Tensor]) -> Tensor:
        """Compute the sum of `loss_of(model, micro_batch)` and its gradient. Returns the sum; sets `gradient`.

        `loss_of` is called in several threads at once, with the replica (or compiled model) to use.
        """
        if self._compiled is not None or self.gradient.device.type != "cpu":
            return self._backward(self.replicas[0], micro_batches, loss_of)
        parts, num_threads = list(micro_batches), torch.get_num_threads()
        num_replicas = number_of_replicas(num_threads, len(parts))
        if num_replicas == 1:
            return self._backward(self.replicas[0], parts, loss_of)
        while len(self.replicas) < num_replicas:
            model = self.replicas[0].model
            same_weights = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
            self.replicas.append(Replica(copy.deepcopy(model, same_weights)))

        def share(i: int) -> Tensor:
            torch.set_num_threads(num_threads // num_replicas)
            return self._backward(self.replicas[i], parts[i::num_replicas], loss_of)

        try:
            shares = [self._threads.submit(share, i) for i in range(num_replicas)]
            wait(shares)
        finally:
            torch.set_num_threads(num_threads)
        losses = [share.result() for share in shares]
        for replica in self.replicas[1:num_replicas]:
            self.gradient.add_(replica.gradient)
        return torch.stack(losses).sum()

    def _backward(
        self, replica: Replica, micro_batches: Iterable[T], loss_of: Callable[[Transformer, T], Tensor]
    ) -> Tensor:
        model = replica.model.train()
        if self._compiled is not None:
            model = cast(Transformer, self._compiled)  # it also has the model's attributes
        replica.gradient.zero_()
        total = torch.zeros((), device=replica.gradient.device)
        for micro_batch in micro_batches:
            loss = loss_of(model, micro_batch)
            loss.backward()
            total += loss.detach()
        return total


def number_of_replicas(num_threads: int, num_micro_batches: int) -> int:
    """The largest number of replicas that uses at least MIN_EFFICIENCY of the threads' time; 1 if there is none."""
    for number in range(min(num_threads, num_micro_batches, MAX_REPLICAS), 1, -1):
        used = (num_threads // number) * number / num_threads
        if used * parallel_efficiency(num_micro_batches, number) >= MIN_EFFICIENCY:
            return number
    return 1


def parallel_efficiency(num_micro_batches: int, num_workers: int) -> float:
    """Parallel efficiency of dealing micro-batches round-robin: mean load of a worker / largest load, in (0, 1]."""
    return num_micro_batches / (num_workers * -(-num_micro_batches // num_workers))
