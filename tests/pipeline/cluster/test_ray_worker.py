from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.cluster import ray_worker
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
