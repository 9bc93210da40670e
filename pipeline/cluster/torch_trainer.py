"""The trainer to use: LeanTrainer with the Ray that it was written for, else Ray's own."""

import logging
import os
from collections.abc import Callable
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from pipeline.common.environment import PLAIN_RAY_TRAIN_ENV

logger = logging.getLogger(__name__)


def make_trainer(train_loop: Callable[[dict[str, Any]], Any], *, private: bool, **options: Any) -> TorchTrainer:
    """A TorchTrainer with these options. `private`: Ray was started by this driver and ends with it."""
    if os.environ.get(PLAIN_RAY_TRAIN_ENV):
        return TorchTrainer(train_loop, **options)
    try:
        from pipeline.cluster.lean_trainer import RAY_VERSION, LeanTrainer

        if not ray.__version__.startswith(f"{RAY_VERSION}."):
            raise ImportError(f"Ray is {ray.__version__}, lean_trainer.py was written for {RAY_VERSION}")
    except (ImportError, AttributeError) as error:  # Ray's internals are others
        logger.warning("Training takes some seconds more to start: %s", error)
        return TorchTrainer(train_loop, **options)
    return LeanTrainer(train_loop, private=private, **options)
