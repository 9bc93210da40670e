"""Data parallelism by the threads of one process: each computes the gradient of micro-batches of its own.

On a CPU, two threads at one micro-batch wait for each other at every operator; with a micro-batch each they wait
once, at the end of the step. torch.nn.parallel.DistributedDataParallel is no substitute: it connects processes, and
wants equally many micro-batches on each. The hazards, and what is done about them:

- Gradients. A parameter has one `.grad`, which two threads must not write to. Each thread has a replica of the
  model: parameters of its own that share the memory of the weights, so that the optimizer changes all at once.
- Random numbers. torch's default generator belongs to all threads: which numbers dropout draws would depend on who is
  first. Each thread has a generator of its own, which the loop seeds for every micro-batch.
- Determinism. Which replica takes which micro-batch, and the order of sums, depend only on the numbers of threads and
  micro-batches. With the same number of threads a run has the same weights bit for bit; with another number, the same
  up to rounding.
- torch.set_num_threads. The number belongs to a thread, but a new thread starts with the number that any thread has
  set last. Each thread sets its share before it computes, and the caller's number is set again afterwards.
- Faults. The first exception is raised when every thread is done, so none is still at work in the caller's model.
- Memory. A replica adds a gradient and the activations of a micro-batch: there are MAX_REPLICAS at most.
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
"""Share of the threads' time that replicas must use; otherwise there are fewer, with more threads each."""

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
    """A model and its gradient over micro-batches, by threads on a CPU; elsewhere, and compiled, by the caller alone.

    A context manager, which ends the threads.
    """

    def __init__(self, model: Transformer, *, compile: bool = False) -> None:
        self.replicas = [Replica(model)]
        self._compiled = torch.compile(model, dynamic=True) if compile else None
        self._threads = ThreadPoolExecutor(
            MAX_REPLICAS, "replica", initializer=dropout.use_own_generator
        )  # started as needed

    def __enter__(self) -> "ThreadedDataParallel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    @property
    def gradient(self) -> Tensor:
        """That of the last `backward`, as one vector: the parameters' .grad are views of it."""
        return self.replicas[0].gradient

    def backward(self, micro_batches: Iterable[T], loss_of: Callable[[Transformer, T], Tensor]) -> Tensor:
        """Set `gradient` to that of the sum of `loss_of(model, micro_batch)`, and return the sum.

        `loss_of` is called in several threads at once, each time with the replica (or compiled model) to use.
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
            model = cast(Transformer, self._compiled)  # it has the attributes of the model, too
        replica.gradient.zero_()
        total = torch.zeros((), device=replica.gradient.device)
        for micro_batch in micro_batches:
            loss = loss_of(model, micro_batch)
            loss.backward()
            total += loss.detach()
        return total


def number_of_replicas(num_threads: int, num_micro_batches: int) -> int:
    """The most replicas that keep the threads busy, MIN_EFFICIENCY of their time; one if none do."""
    for number in range(min(num_threads, num_micro_batches, MAX_REPLICAS), 1, -1):
        used = (num_threads // number) * number / num_threads
        if used * parallel_efficiency(num_micro_batches, number) >= MIN_EFFICIENCY:
            return number
    return 1


def parallel_efficiency(num_micro_batches: int, num_workers: int) -> float:
    """Of micro-batches that are dealt round-robin: the mean load of a worker over the largest."""
    return num_micro_batches / (num_workers * -(-num_micro_batches // num_workers))
