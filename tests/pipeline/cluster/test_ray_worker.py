from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    create_scaling_policy,
)

from pipeline.cluster import lean_trainer, ray_worker
from pipeline.common.settings import load_settings


@pytest.fixture
def out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker (not rank 0) whose device has too little memory, of as many workers as it is called with."""

    def refuse(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def run(num_workers: int) -> str | None:
        context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: num_workers)
        monkeypatch.setattr(ray_worker.ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray_worker, "get_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(ray_worker, "train_rank", refuse)
        settings = load_settings(Path(__file__).parents[3])
        (tmp_path / "settings.json").write_text("{}")
        cpus = torch.get_num_threads()
        job = ray_worker.Job(settings, tmp_path, None, tmp_path, "", "", cpus=cpus, gpu=False, reports_to_ray=False)
        return ray_worker.work({"job": job})

    return run


def test_a_worker_alone_that_has_too_little_memory_says_so_and_is_not_started_again(out_of_memory):
    assert out_of_memory(1) == (
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; "
        "lower hardware.micro_batch_tokens, or take more workers"
    )


def test_a_worker_that_does_not_see_the_drivers_storage_names_the_setting(out_of_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_worker, "settings_file", lambda run_folder: tmp_path / "none")
    with pytest.raises(OSError, match=r"lacks what the driver wrote: is RUN_STORAGE the same on this node\?"):
        out_of_memory(1)


def test_one_of_several_workers_dies_of_it_because_the_others_wait_for_it(out_of_memory):
    with pytest.raises(torch.OutOfMemoryError):
        out_of_memory(2)


@pytest.mark.parametrize(("num_workers", "grouped"), [(1, False), (2, True), (3, True)])
def test_only_workers_that_have_another_to_reach_form_a_process_group(num_workers, grouped, monkeypatch):
    asked = []
    monkeypatch.setattr(lean_trainer._TorchBackend, "on_start", lambda self, group, config: asked.append(len(group)))

    class Group(list):
        execute = staticmethod(asked.append)

    backend_class = lean_trainer.ReachableTorch().backend_cls
    backend_class().on_start(Group(range(num_workers)), lean_trainer.ReachableTorch())
    assert asked == ([lean_trainer._name_interface, num_workers] if grouped else [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about settings of its own
@pytest.mark.parametrize("num_workers", [2, (1, 3)])
@pytest.mark.parametrize("private", [True, False])
def test_rays_processes_that_have_nothing_to_do_are_not_started(private, num_workers, monkeypatch):
    started = {}

    class ControllerHere:
        def __init__(self, **parts):
            started.update(parts, where="in the driver")

        async def run(self):
            started.update(result="of training")

        def get_result(self):
            return started["result"]

    def start_actor(self, **parts):
        started.update(parts, where="in a process of its own")
        return "of training"

    monkeypatch.setattr(lean_trainer, "_ControllerHere", ControllerHere)
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", start_actor)
    config = ScalingConfig(num_workers=num_workers)
    trainer = lean_trainer.LeanTrainer(lambda: None, private=private, scaling_config=config)
    everything = trainer._create_default_callbacks()
    parts = {"callbacks": everything, "scaling_policy": create_scaling_policy(config)}
    assert trainer._initialize_and_run_controller(**parts) == "of training"
    assert started["where"] == ("in the driver" if private else "in a process of its own")
    left_out = {type(callback).__name__ for callback in everything} - {
        type(callback).__name__ for callback in started["callbacks"]
    }
    assert left_out == {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if private else set())
    policy = started["scaling_policy"]
    if private and num_workers == 2:
        policy.after_controller_start(None)  # Ray's own would start an actor
        assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    else:
        assert type(policy) is (FixedScalingPolicy if num_workers == 2 else ElasticScalingPolicy)
