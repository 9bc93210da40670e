"""Usual commands of DVC's users: experiments, queued grids, comparisons, a corpus of their own, a remote."""

import json
import shutil

import pytest
from mlflow import MlflowClient

from pipeline.data import grammar
from tests.system.conftest import ROOT, Project

pytestmark = pytest.mark.slow

PARAMS = "params.yaml"


@pytest.fixture
def project(trained, tmp_path) -> Project:
    """`trained` with its checkpoints but without its MLflow store. DVC's site cache is where `make` puts it."""
    project = trained.copy(tmp_path / "project", without=())
    shutil.copy(ROOT / "Makefile", project.root)
    project.run("make", "site-cache", XDG_CACHE_HOME=str(tmp_path / "cache"))
    (project.root / "Makefile").unlink()
    return project


def runs_of(project: Project) -> list:
    client = MlflowClient(project.tracking_uri)
    experiment = client.get_experiment_by_name("transformer")
    return client.search_runs([experiment.experiment_id])


def test_experiments_are_compared_by_what_differs(project):
    project.run("dvc", "exp", "run", "--set-param", "evaluate.beam=1", "evaluate")
    diff = json.loads(project.run("dvc", "exp", "diff", "--json"))
    assert diff["params"] == {PARAMS: {"evaluate.beam": {"old": 2, "new": 1, "diff": -1}}}
    assert json.loads(project.run("dvc", "params", "diff", "--json"))[PARAMS]["evaluate.beam"] == {
        "old": 2,
        "new": 1,
        "diff": -1,
    }
    recipe = ("dvc", "exp", "show", "--only-changed", "--drop", "models|State|Executor", "--no-pager")
    shown = project.run(*recipe, COLUMNS="160")
    assert max(map(len, shown.splitlines())) <= 160
    assert "…" not in shown
    assert "evaluate.beam" in shown
    assert "model.d_k" not in shown
    assert "model.d_k" not in project.run("dvc", "exp", "show", "--drop", "model.*", "--no-pager", COLUMNS="160")


def test_params_diff_shows_what_a_preset_has_changed(project):
    project.run("python", "-m", "pipeline.preset", "model=tiny")
    diff = json.loads(project.run("dvc", "params", "diff", "--json"))[PARAMS]
    assert diff["model.d_model"] == {"old": 16, "new": 128, "diff": 112}
    assert "evaluate.beam" not in diff


def test_queued_grid_runs_every_value_and_its_runs_stay_in_mlflow(project, tmp_path):
    project.run("dvc", "exp", "run", "--set-param", "evaluate.beam=1,3", "--queue", "evaluate")
    settings = (project.root / PARAMS).read_text()
    project.run("dvc", "queue", "start")
    project.wait_for(lambda: project.run("dvc", "queue", "status").count("Success") == 2, "two finished experiments")
    assert (project.root / PARAMS).read_text() == settings
    beams = {params["evaluate"]["beam"] for params in project.experiments().values()}
    assert beams == {1, 2, 3}
    assert {run.data.params["beam"] for run in runs_of(project)} >= {"1", "3"}
    # The project and the two copies for the experiments.
    assert len(list((tmp_path / "cache/attention-pipeline/dvc/repo").iterdir())) == 3


def test_experiment_in_a_copy_goes_by_the_checkpoints_of_the_project(project):
    before = project.checkpoints()
    output = project.run("dvc", "exp", "run", "--temp", "--set-param", "hardware.max_failures=2", "train")
    assert "already trained" in output
    assert project.checkpoints() == before


def write_corpus(project: Project) -> None:
    """Write some sentences of the built-in grammar as a user's own corpus."""
    (project.root / "data/own").mkdir()
    grammar.generate(project.root / "data/own", seed=5, train_pairs=700, valid_pairs=37, test_pairs=23)
    for path in (project.root / "data/own").iterdir():
        if path.suffix not in (".en", ".de"):
            path.unlink()


def test_own_corpus_goes_through_a_remote_to_a_clone_where_nothing_is_left_to_do(new_project, tmp_path):
    new_project.run("python", "-m", "pipeline.preset", "data=own")
    for key, value in (("tokenize.vocab_size", 400), ("train.max_steps", 20), ("validate.max_dropped_share", 1.0)):
        new_project.edit(PARAMS, key, value)
    new_project.commit()
    write_corpus(new_project)
    new_project.run("dvc", "repro", "evaluate")
    assert new_project.run("git", "status", "--porcelain") == "?? data/own/\n?? dvc.lock\n"
    new_project.run("dvc", "add", "data/own")
    new_project.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    assert "up to date" in new_project.run("dvc", "repro", "evaluate")
    new_project.commit()
    new_project.run("dvc", "push")

    new_project.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    clone.run("dvc", "pull", "--allow-missing")
    output = clone.run("dvc", "repro", "evaluate")
    assert "up to date" in output
    assert "Running" not in output
    assert (clone.root / "data/own/train.en").read_bytes() == (new_project.root / "data/own/train.en").read_bytes()
    with (clone.root / "data/own/train.en").open("a") as text, (clone.root / "data/own/train.de").open("a") as other:
        text.write("one more sentence\n")
        other.write("noch ein Satz\n")
    assert "download" in clone.run("dvc", "status")


def test_dvc_lock_cut_by_a_kill_is_named_with_a_way_out_that_works(project):
    lock, whole = project.root / "dvc.lock", (project.root / "dvc.lock").read_text()
    for left in ("", whole[: len(whole) // 2].rpartition("\n")[0] + "\n    outs:"):
        lock.write_text(left)
        for command in ("check", "train"):
            output = project.run("python", "-m", f"pipeline.{command}", code=1)
            assert f"{command}: dvc.lock is " in output.replace(f"{project.root}/", "")
            assert "git restore dvc.lock" in output
            assert "Traceback" not in output
    project.run("git", "restore", "dvc.lock")
    assert "up to date" in project.run("dvc", "repro", "evaluate")
    project.run("git", "rm", "--quiet", "--cached", "dvc.lock")
    lock.write_text("")
    assert "rm dvc.lock; dvc repro then finds" in project.run("python", "-m", "pipeline.check", code=1)
    lock.unlink()
    output = project.run("dvc", "repro", "evaluate")
    assert "Running" not in output
    assert lock.read_text() == whole
