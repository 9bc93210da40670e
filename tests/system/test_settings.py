"""Settings: which stages DVC runs again after a change, and what a bad value prints."""

import pytest
from dvc.repo import Repo

pytestmark = pytest.mark.slow

DATA, MODEL, HARDWARE = "conf/data/micro.yaml", "conf/model/micro.yaml", "conf/hardware/micro.yaml"
SETTINGS = ("params.yaml", DATA, MODEL, HARDWARE)


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


@pytest.fixture
def restored():
    """restored(project): the project, whose settings are the same again after the test."""
    files = {}

    def remember(project):
        files.update({project.root / path: (project.root / path).read_bytes() for path in SETTINGS})
        return project

    yield remember
    for file, content in files.items():
        file.write_bytes(content)


def stages_to_run(project):
    with Repo(str(project.root)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}  # "the/path/to/dvc.yaml:train"


def test_status_is_empty_without_a_change(all_stages):
    assert stages_to_run(all_stages) == set()


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
def test_status_names_the_stages_that_read_a_changed_setting(all_stages, restored, path, key, value, stages):
    project = restored(all_stages)
    project.edit(path, key, value)
    assert stages_to_run(project) == stages


@pytest.mark.parametrize(
    ("command", "path", "key", "value", "message"),
    [
        ("download", "params.yaml", "data", "multi31k", "params.yaml: data must be one of files, grammar, "),
        ("validate", DATA, "validate.max_words", 0, f"{DATA}: validate.max_words must be >= 1, got 0"),
        (
            "train_tokenizer",
            DATA,
            "tokenize.vocab_size",
            "8k",
            f"{DATA}: tokenize.vocab_size must be a whole number, got '8k'",
        ),
        ("train", MODEL, "model.positions", "polar", f"{MODEL}: model.positions must be one of sinusoidal, "),
        (
            "evaluate",
            "params.yaml",
            "evaluate.beam",
            0,
            "params.yaml: evaluate.beam must be >= 1, got 0",
        ),
    ],
)
def test_command_with_a_bad_value_ends_with_one_line_and_exit_code_1(
    untouched, restored, command, path, key, value, message
):
    project = restored(untouched)
    project.edit(path, key, value)
    output = project.run("python", "-m", f"pipeline.{command}", code=1)
    assert message in output
    assert output.count("\n") == 1


def test_exp_run_names_a_bad_value(new_project):
    output = new_project.run("dvc", "exp", "run", "--set-param", f"{MODEL}:model.dropout=2", code=255)
    assert f"{MODEL}: model.dropout must be in [0, 1), got 2" in " ".join(output.split())
    assert "Traceback" not in output


def test_download_names_a_mirror_that_is_not_there(untouched, restored):
    project = restored(untouched)
    project.edit("params.yaml", "data", "multi30k")
    output = project.run("python", "-m", "pipeline.download", code=1, CORPUS_MIRROR="/no/such/mirror")
    assert output == "download: CORPUS_MIRROR must be a folder or an http(s) address, got '/no/such/mirror'\n"
