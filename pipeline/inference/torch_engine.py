"""The beam search of model/decoding.py on batches of sources."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from model.decoding import Hypothesis, beam_search
from model.kv_cache import BeamKVCache
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.data.bucketing import pad, search_batches

LEAST_WORK = 1 << 15
"""Positions times d_model of a batch below which two threads at half a batch each take longer than one at the whole:
most of what they do is to start operators."""


class TorchEngine:
    """A pipeline.inference.translate.Engine, on the model's device.

    On a CPU, as many batches are searched at once as torch has threads; they share batch_tokens, and each has a
    thread to itself: two at work on one batch would wait for one another at every operator.
    """

    def __init__(self, model: Transformer, settings: Evaluate, num_best: int = 1) -> None:
        self._model, self._settings, self._num_best = model, settings, num_best
        self._device = model.embedding.weight.device
        self._num_workers = torch.get_num_threads() if self._device.type == "cpu" else 1

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        return search_batches(
            lengths,
            max(1, self._settings.batch_tokens // self._num_workers),
            self._settings.max_extra,
            self._num_workers,
            least_tokens=LEAST_WORK // self._model.config.d_model,
        )

    @contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """In each of them an operator of torch uses one thread."""
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self._num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)  # other threads may have followed the workers

    def search(self, sources: list[np.ndarray]) -> list[list[Hypothesis]]:
        lengths = np.array([len(source) for source in sources])
        src = pad(np.concatenate(sources), lengths)  # [sentences, longest + 1]
        max_lengths = torch.from_numpy(lengths + self._settings.max_extra).clamp(
            max=self._model.config.max_length - 1
        )
        with torch.inference_mode():
            decoder = BeamKVCache(self._model, src.to(self._device))
        return beam_search(
            decoder,
            max_lengths.to(self._device),
            beam=self._settings.beam,
            alpha=self._settings.alpha,
            num_best=self._num_best,
        )
