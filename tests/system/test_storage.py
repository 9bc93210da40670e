"""Checkpoints and data outside the project: in an object store (moto's S3 server) and on a full disk."""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest
from upath import UPath

from pipeline.training import checkpoint
from tests.support.locks import most_inside
from tests.support.stores import S3

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    with server.started():
        server.make_bucket("bucket")
        yield server


def objects(s3: S3, pattern: str) -> list[str]:
    return [name for name in s3.sizes("bucket", "runs/") if re.fullmatch(pattern, name)]


def test_train_killed_with_run_storage_on_s3_ends_with_the_same_weights(trained, s3, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    environment = s3.environment | {"RUN_STORAGE": "s3://bucket/runs"}
    project.run("python", "-m", "pipeline.publish", **environment)
    with project.started("python", "-m", "pipeline.train", **environment) as training:
        project.wait_for(lambda: objects(s3, "checkpoints/.*/step_.*/SHA256SUMS"), "checkpoint in the bucket")
        training.kill()
    output = project.run("python", "-m", "pipeline.train", **environment)
    assert "continuing from the checkpoint of step" in output
    last = trained.checkpoints()[-1].name
    (tensors,) = objects(s3, f"checkpoints/.*/{last}/tensors.safetensors")
    with s3.client() as client:
        stored = client.get_object(Bucket="bucket", Key=f"runs/{tensors}")["Body"].read()
    final, expected = trained.weights()
    assert stored == expected
    assert (project.root / "models/final/weights.safetensors").read_bytes() == final
    assert not (project.root / "checkpoints").exists()
    assert project.only_run().info.status == "FINISHED"
    assert project.curve("train_loss") == trained.curve("train_loss")


def test_one_at_a_time_on_s3_lets_one_into_the_block(s3, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    folder = UPath("s3://bucket/one at a time", use_listings_cache=False)
    assert most_inside(folder, 4, seconds=0.1) == [1, 1, 1, 1]


def test_sweep_with_run_storage_on_s3_ends_and_again_starts_no_ray(trained, s3, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    project.edit("params.yaml", "sweep.rows", [])
    project.edit("params.yaml", "sweep.grid", {"model.d_ff": [32]})
    environment = s3.environment | {"RUN_STORAGE": "s3://bucket/runs"}
    project.run("python", "-m", "pipeline.publish", **environment)
    project.run("python", "-m", "sweeps.run", **environment)
    first = project.json("data/sweep/trials.json")["trials"]
    assert [trial["status"] for trial in first] == ["finished"] * 2
    assert len(objects(s3, r"checkpoints/[^/]*/trial\.json")) == 2
    assert len(objects(s3, r"checkpoints/[^/]*/model/weights\.safetensors")) == 2
    project.run("python", "-m", "sweeps.run", RAY_ADDRESS="127.0.0.1:9", **environment)  # no cluster answers
    assert project.json("data/sweep/trials.json")["trials"] == first


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_train_on_a_full_disk_stops_with_one_line_and_resumes_later(trained, tmp_path, figures):
    project = trained.untrained_copy(tmp_path / "project")
    size = sum(file.stat().st_size for file in trained.checkpoints()[0].iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={1_000_000 + int(3.5 * size)}", "tmpfs", disk], check=True)
    try:
        environment = {"RUN_STORAGE": str(disk)}
        project.run("python", "-m", "pipeline.publish", **environment)
        output = project.run("python", "-m", "pipeline.train", code=1, **environment)
        (run_folder,) = disk.glob("checkpoints/*")
        step = 10 * (1 + len(checkpoint.folders(run_folder)))
        assert output.strip().splitlines()[-1] == (
            f"train: checkpoint of step {step} not written to {run_folder}: "
            "No space left on device; earlier ones are kept: free some space and run again"
        )
        assert [checkpoint.load(path).state.step for path in checkpoint.folders(run_folder)][-1] == step - 10
        assert not list(run_folder.glob(".step_*"))
        subprocess.run(["mount", "-o", "remount,size=1G", disk], check=True)
        output = project.run("python", "-m", "pipeline.train", **environment)
        assert f"continuing from the checkpoint of step {step - 10}" in output
        last = checkpoint.folders(run_folder)[-1] / "tensors.safetensors"
        assert last.read_bytes() == trained.weights()[1]
        figures("the disk is full", **{"steps lost": 10})
    finally:
        subprocess.run(["umount", disk], check=True)
