"""Beam search in torch (model/decoding.py) on batches of sources."""

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
"""The smallest batch worth splitting between threads, in positions times d_model. On smaller batches most of the time
goes into starting operators, so two threads with half a batch each take longer than one with all of it."""


class TorchEngine:
    """A pipeline.inference.translate.Engine that runs on the model's device.

    On a CPU it searches as many batches at once as torch has threads, with one thread each, because two threads on
    one batch would wait for each other at every operator. The batches share batch_tokens.
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
        """Yield the worker threads; in each of them, torch uses one thread per operator."""
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self._num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)  # the workers' value may have reached other threads

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
