"""Which trainer is made. What it starts: tests/system."""

import sys

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline.cluster.lean_trainer import RAY_VERSION, LeanTrainer
from pipeline.cluster.torch_trainer import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about settings of its own


def made() -> type:
    return type(make_trainer(lambda config: None, private=True, scaling_config=ScalingConfig(num_workers=1)))


def test_make_trainer_is_lean_with_the_ray_that_is_installed() -> None:
    """After an upgrade: compare lean_trainer.py with Ray's new internals, then set its RAY_VERSION."""
    assert ray.__version__.startswith(f"{RAY_VERSION}.")
    assert made() is LeanTrainer


def test_make_trainer_is_plain_with_another_ray(monkeypatch, caplog) -> None:
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    assert made() is TorchTrainer
    assert "Ray is 2.61.0" in caplog.text


def test_make_trainer_is_plain_if_rays_internals_cannot_be_imported(monkeypatch, caplog) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.cluster.lean_trainer")
    monkeypatch.setitem(sys.modules, "ray.train.v2._internal.execution.controller", None)
    assert made() is TorchTrainer
    assert "takes some seconds more" in caplog.text


def test_make_trainer_is_plain_if_an_overridden_method_is_gone(monkeypatch, caplog) -> None:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    monkeypatch.delitem(sys.modules, "pipeline.cluster.lean_trainer")
    monkeypatch.delattr(WorkerGroup, "_init_train_context_on_workers")
    assert made() is TorchTrainer
    assert "_init_train_context_on_workers" in caplog.text


def test_make_trainer_is_plain_if_the_user_asks_for_it(monkeypatch) -> None:
    monkeypatch.setenv("PLAIN_RAY_TRAIN", "1")
    assert made() is TorchTrainer
