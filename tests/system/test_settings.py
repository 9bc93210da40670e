"""Settings through the command lines: what a change reruns, and what a mistake says."""

import json

import pytest

DATA, MODEL, HARDWARE = "conf/data/micro.yaml", "conf/model/micro.yaml", "conf/hardware/micro.yaml"


@pytest.mark.parametrize(
    ("path", "key", "value", "stages"),
    [
        (DATA, "download.seed", 6, {"download"}),
        (DATA, "download.tgt", "fr", {"download", "validate", "tokenize", "evaluate"}),
        (DATA, "validate.max_words", 49, {"validate"}),
        (DATA, "tokenize.vocab_size", 401, {"tokenize"}),
        (MODEL, "model.dropout", 0.2, {"train"}),
        (MODEL, "train.max_steps", 401, {"train"}),
        (HARDWARE, "hardware.max_failures", 4, {"train"}),
        ("params.yaml", "seed", 2, {"train"}),
        ("params.yaml", "evaluate.beam", 3, {"evaluate"}),
        ("params.yaml", "tracking.experiment", "other", {"train", "evaluate"}),
    ],
)
def test_changed_parameter_reruns_the_stages_that_read_it(trained, tmp_path, path, key, value, stages):
    project = trained.copy(tmp_path / "project", without=("checkpoints",))
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
