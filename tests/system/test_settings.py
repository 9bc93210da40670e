"""Settings through the command lines: what a change reruns, and what a mistake says."""

import json

import pytest

DATA, MODEL, HARDWARE = "conf/data/micro.yaml", "conf/model/micro.yaml", "conf/hardware/micro.yaml"


@pytest.fixture(scope="module")
def all_stages(trained, tmp_path_factory):
    """`trained`, with all of DVC's stages up to date: empty files stand in for what sweep and report would leave."""
    project = trained.copy(tmp_path_factory.mktemp("settings") / "project", without=("checkpoints",))
    for path in (
        "data/sweep/trials.json",
        *(f"reports/table3.{kind}" for kind in ("html", "md", "csv", "json", "png")),
    ):
        project.write(path, "{}")
    project.run("dvc", "commit", "--force", "sweep", "report")
    return project


def test_nothing_is_to_do_without_a_change(all_stages):
    assert json.loads(all_stages.run("dvc", "status", "--json")) == {}


@pytest.mark.parametrize(
    ("path", "key", "value", "stages"),
    [
        (DATA, "download.seed", 6, {"download"}),
        (DATA, "download.tgt", "fr", {"download", "validate", "tokenize", "evaluate", "sweep"}),
        (DATA, "validate.max_words", 49, {"validate"}),
        (DATA, "tokenize.vocab_size", 401, {"tokenize"}),
        (MODEL, "model.dropout", 0.2, {"train", "sweep"}),
        (MODEL, "train.max_steps", 401, {"train", "sweep"}),
        (HARDWARE, "hardware.max_failures", 4, {"train", "sweep"}),
        ("params.yaml", "seed", 2, {"train"}),
        ("params.yaml", "evaluate.beam", 3, {"evaluate", "sweep"}),
        ("params.yaml", "tracking.experiment", "other", {"train", "evaluate"}),
        ("params.yaml", "sweep.seeds", [3, 4], {"sweep"}),
    ],
)
def test_changed_parameter_reruns_the_stages_that_read_it(all_stages, tmp_path, path, key, value, stages):
    project = all_stages.copy(tmp_path / "project", without=())
    project.edit(path, key, value)
    assert set(json.loads(project.run("dvc", "status", "--json"))) == stages


@pytest.mark.parametrize(
    ("command", "path", "key", "value", "message"),
    [
        ("download", "params.yaml", "data", "multi31k", "params.yaml: data is 'multi31k': one of files, grammar, "),
        ("validate", DATA, "validate.max_words", 0, f"{DATA}: validate.max_words is 0: a number from 1 up is needed"),
        (
            "train_tokenizer",
            DATA,
            "tokenize.vocab_size",
            "8k",
            f"{DATA}: tokenize.vocab_size is '8k': a whole number",
        ),
        ("train", MODEL, "model.positions", "polar", f"{MODEL}: model.positions is 'polar': one of sinusoidal, "),
        (
            "evaluate",
            "params.yaml",
            "evaluate.beam",
            0,
            "params.yaml: evaluate.beam is 0: a number from 1 up is needed",
        ),
    ],
)
def test_bad_value_is_one_line_and_exit_code_1(new_project, command, path, key, value, message):
    new_project.edit(path, key, value)
    output = new_project.run("python", "-m", f"pipeline.{command}", code=1)
    assert message in output
    assert output.count("\n") == 1


def test_bad_value_of_an_experiment_is_named(new_project):
    output = new_project.run("dvc", "exp", "run", "--set-param", f"{MODEL}:model.dropout=2", code=255)
    assert f"{MODEL}: model.dropout is 2" in " ".join(output.split())
    assert "Traceback" not in output


def test_mirror_that_is_not_there_is_named(new_project):
    new_project.edit("params.yaml", "data", "multi30k")
    output = new_project.run("python", "-m", "pipeline.download", code=1, CORPUS_MIRROR="/no/such/mirror")
    assert output == "download: CORPUS_MIRROR is '/no/such/mirror': a folder or an http(s) address is needed\n"
