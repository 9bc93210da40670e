"""Settings: which stages DVC runs again after a change, and what a bad value prints."""

import pytest
from dvc.repo import Repo

from tests.system.conftest import ROOT

pytestmark = pytest.mark.slow

PARAMS = "params.yaml"


@pytest.fixture(scope="module")
def all_stages(trained, tmp_path_factory):
    """`trained` with all DVC stages up to date. Empty files replace the outputs of sweep and report."""
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
    """restored(project) returns the project and restores its settings after the test."""
    files = {}

    def remember(project):
        files.update({project.root / path: (project.root / path).read_bytes() for path in (PARAMS,)})
        return project

    yield remember
    for file, content in files.items():
        file.write_bytes(content)


def stages_to_run(project):
    with Repo(str(project.root)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}  # from "the/path/to/dvc.yaml:train"


def test_status_is_empty_without_a_change(all_stages):
    assert stages_to_run(all_stages) == set()


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("data.seed", 6, {"download"}),
        ("data.tgt", "fr", {"download", "validate", "tokenize", "evaluate", "sweep"}),
        ("validate.max_words", 49, {"validate"}),
        ("tokenize.vocab_size", 401, {"tokenize"}),
        ("model.dropout", 0.2, {"train", "sweep"}),
        ("train.max_steps", 401, {"train", "sweep"}),
        ("hardware.max_failures", 4, {"train", "sweep"}),
        ("train.seed", 2, {"train", "sweep"}),
        ("evaluate.beam", 3, {"evaluate", "sweep"}),
        ("tracking.experiment", "other", {"train", "evaluate"}),
        ("sweep.seeds", [3, 4], {"sweep"}),
    ],
)
def test_status_names_the_stages_that_read_a_changed_setting(all_stages, restored, key, value, stages):
    project = restored(all_stages)
    project.edit(PARAMS, key, value)
    assert stages_to_run(project) == stages | {"check"}


@pytest.mark.parametrize("command", ["download", "validate", "train_tokenizer", "encode", "train", "evaluate"])
def test_commands_check_all_settings_first(untouched, restored, command):
    project = restored(untouched)
    project.edit(PARAMS, "sweep.rows", ["Z"])
    output = project.run("python", "-m", f"pipeline.{command}", code=1)
    name = {"train_tokenizer": "tokenize", "encode": "tokenize"}.get(command, command)
    rows = "A, B, C, D, E, big, heads, d_k, layers, d_model, d_ff, dropout, label_smoothing, positions, norm"
    assert output == f"{name}: params.yaml: sweep.rows must be one of {rows}, got 'Z'\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dropout=2", "params.yaml: model.dropout must be in [0, 1), got 2"),
        (
            "model=tiny",
            "params.yaml: model must be a section of `key: value` lines, got 'tiny'; for a preset's values, "
            "run python -m pipeline.preset model=tiny",
        ),
        ("+train.colour=3", "params.yaml: train.colour is unknown: it must be one of "),
    ],
)
def test_exp_run_names_a_bad_value(new_project, override, message):
    output = new_project.run("dvc", "exp", "run", "--set-param", override, code=255)
    assert message in " ".join(output.split())
    assert "Traceback" not in output


@pytest.mark.parametrize("stage", [(), ("evaluate",)])
def test_exp_run_names_a_section_that_no_stage_reads(all_stages, restored, stage):
    project = restored(all_stages)
    output = project.run("dvc", "exp", "run", "--set-param", "+modle.d_k=4", *stage, code=255)
    assert "check: params.yaml: modle is unknown: did you mean model?" in " ".join(output.split())


def test_exp_run_changes_only_the_line_of_the_setting(new_project):
    """Uses a copy of the project's params.yaml with its comments and lists."""
    before = (ROOT / PARAMS).read_text()
    new_project.write(PARAMS, before)
    new_project.run("git", "commit", "--all", "--quiet", "--message", "settings")
    overrides = ("model.d_k=4", "train.eps=1e-8", "sweep.seeds=[2]", "data.seed=7")
    set_all = [part for override in overrides for part in ("--set-param", override)]
    new_project.run("dvc", "exp", "run", *set_all, "download")
    now = (new_project.root / PARAMS).read_text()
    changed = [(a, b) for a, b in zip(before.splitlines(), now.splitlines(), strict=True) if a != b]
    assert [b.split("#")[0].split() for _, b in changed] == [
        ["seed:", "7"],
        ["d_k:", "4"],
        ["eps:", "1e-08"],
        ["-", "2"],
    ]


def test_download_names_a_mirror_that_does_not_exist(untouched, restored):
    project = restored(untouched)
    project.run("python", "-m", "pipeline.preset", "data=multi30k")
    output = project.run("python", "-m", "pipeline.download", code=1, CORPUS_MIRROR="/no/such/mirror")
    assert output == "download: CORPUS_MIRROR must be a folder or an http(s) address, got '/no/such/mirror'\n"
