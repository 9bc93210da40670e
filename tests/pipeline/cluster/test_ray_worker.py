from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import torch

from pipeline.cluster import ray_worker
from pipeline.cluster.ray_worker import WorkerConfig, run_worker
from pipeline.common.settings import load_settings
from pipeline.data.workspace import Workspace


@pytest.fixture
def out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run rank 1 of `num_workers` workers on a device with too little memory."""

    def refuse(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def run(num_workers: int) -> str | None:
        context = SimpleNamespace(
            get_world_rank=lambda: 1,
            get_world_size=lambda: num_workers,
            get_local_rank=lambda: 1,
            get_node_rank=lambda: 0,
        )
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray_worker, "get_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(ray_worker, "train_rank", refuse)
        settings = load_settings(Path(__file__).parents[3])
        (tmp_path / "settings.json").write_text("{}")
        cpus = torch.get_num_threads()
        workspace = Workspace(tmp_path, tmp_path, None, "")
        config = WorkerConfig(settings, workspace, tmp_path, "", cpus=cpus, gpu=False, on_validation=None)
        return run_worker({"worker": config})

    return run


def test_run_worker_alone_returns_that_memory_is_too_small(out_of_memory):
    assert out_of_memory(1) == (
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; "
        "lower hardware.micro_batch_tokens, or use more workers"
    )


def test_run_worker_without_the_drivers_storage_names_the_setting(out_of_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_worker, "settings_file", lambda run_folder: tmp_path / "none")
    with pytest.raises(OSError, match=r"lacks the driver's settings: give all nodes the same RUN_STORAGE"):
        out_of_memory(1)


def test_run_worker_among_others_raises_out_of_memory(out_of_memory):
    with pytest.raises(torch.OutOfMemoryError):
        out_of_memory(2)


def test_reports_hold_back_measured_times_until_a_checkpoint_has_them(tmp_path, monkeypatch):
    logged: list[tuple[dict[str, float], int]] = []
    writer = SimpleNamespace(log=lambda metrics, step: logged.append((metrics, step)), close=lambda patience_s: True)
    monkeypatch.setattr("pipeline.tracking.metric_writer.MetricWriter", lambda uri, run_id: writer)
    settings = load_settings(Path(__file__).parents[3])
    workspace = Workspace(tmp_path, tmp_path, None, "")
    reports = ray_worker._Reports(WorkerConfig(settings, workspace, tmp_path, "", 1, False, None), num_ranks=1)
    reports.log_metrics({"train_loss": 3.0, "tokens_per_second": 700.0}, 7)
    assert logged == [({"train_loss": 3.0}, 7)]
    reports.saved()
    assert logged[1:] == [({"tokens_per_second": 700.0}, 7)]
    reports.saved()
    reports.close(0)
    assert len(logged) == 2
