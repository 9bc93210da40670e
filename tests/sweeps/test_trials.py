"""The trials of a sweep, and which results are valid for a trial."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.checksums import write_sums
from pipeline.common.settings import load_settings
from pipeline.training.run import WEIGHTS_CODE, run_folder, run_key
from pipeline.training.siblings import trajectory_of
from sweeps.trials import EVALUATION_CODE, SweepPlan, Trial, load_sweep
from tests.support.imports import does_something, reached
from tests.support.settings_files import NANO, REPOSITORY, copy_settings, edit

CODE = (*EVALUATION_CODE, *WEIGHTS_CODE)


def write_meta(root: Path, sha256: str = "0" * 64) -> None:
    counts = {split: {"src": 7, "tgt": 11} for split in ("train", "valid", "test")}
    pairs = {split: 3 for split in counts}
    info = {
        "src": "en",
        "tgt": "de",
        "vocab_size": 29,
        "pairs": pairs,
        "words": counts,
        "texts": {},
        "sha256": sha256,
    }
    (root / "data/encoded/meta.json").write_text(json.dumps(info))
    write_sums(root / "data/encoded", ["meta.json"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a project after the tokenize stage that the trials' names and keys depend on."""
    copy_settings(tmp_path)
    edit(tmp_path, "model", **NANO)
    for file in CODE:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, tmp_path / file)
    (tmp_path / "data/encoded").mkdir(parents=True)
    write_meta(tmp_path)
    (tmp_path / "data/clean").mkdir()
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            (tmp_path / f"data/clean/{split}.{language}").write_text(f"{split} {language}\n")
    edit(tmp_path, "sweep", rows=["heads", "d_k"], seeds=[3, 5])
    return tmp_path


def sweep_with(root: Path, **values: Any) -> SweepPlan:
    edit(root, "sweep", **values)
    return load_sweep(root)


def keys(sweep: SweepPlan) -> dict[str, str]:
    return {trial.id: trial.key for trial in sweep.trials}


def workers(sweep: SweepPlan) -> dict[str, int]:
    return {trial.row.id: trial.settings.hardware.num_workers for trial in sweep.trials}


def first(root: Path) -> Trial:
    return load_sweep(root).trials[0]


# --- the trials of a sweep


def test_load_sweep_has_every_row_that_can_be_built_with_every_seed(root):
    sweep = sweep_with(root, rows=["A", "d_k"], seeds=[3, 5, 7])
    rows = ["base", "A-h1", "A-h4", "A-h16", "A-h32", "B-dk16", "B-dk32"]
    assert [row.id for row in sweep.rows] == rows
    assert [trial.id for trial in sweep.trials] == [f"{row}.{seed}" for row in rows for seed in (3, 5, 7)]
    assert {trial.settings.seed for trial in sweep.trials if trial.row.id == "A-h4"} == {3, 5, 7}
    assert sweep.trials[6].name == "A: 4 heads, seed 3"


def test_load_sweep_gives_every_trial_a_folder_and_a_key_of_its_own(root):
    trials = load_sweep(root).trials
    assert len({trial.folder for trial in trials}) == len({trial.key for trial in trials}) == len(trials) == 14
    assert all(trial.folder.parent == root / "checkpoints" for trial in trials)
    assert all(trial.folder.name.startswith(f"grammar-{trial.settings.model_name}-{trial.seed}-") for trial in trials)


def test_load_sweep_has_no_trial_of_a_row_that_cannot_be_built(root):
    edit(root, "model", num_heads=4, d_k=16, d_v=16)
    sweep = load_sweep(root)
    skipped = {row.id: row.skipped for row in sweep.rows if row.skipped}
    assert skipped == {"A-h1": "4 heads x 1/8 is 0.5 heads"}
    assert "A-h1" not in {trial.row.id for trial in sweep.trials}


def test_load_sweep_runs_the_first_of_rows_with_equal_settings(root):
    edit(root, "model", d_model=64, d_ff=128, num_heads=8, dropout=0.0)
    edit(root, "train", max_steps=100)
    big = {"model.d_model": [128], "model.d_ff": [256], "model.num_heads": [16], "train.max_steps": [300, 299]}
    sweep = sweep_with(root, rows=["big"], grid=big)
    assert [(row.group, row.skipped) for row in sweep.rows] == [
        ("base", None), ("big", None), ("grid", "trains the same weights as big"), ("grid", None),
    ]  # fmt: skip
    assert [trial.row.group for trial in sweep.trials] == ["base", "base", "big", "big", "grid", "grid"]


def test_load_sweep_trains_rows_that_only_end_elsewhere_each_in_its_folder(root):
    grid = {"train.max_steps": [100, 200], "train.log_every": [5, 7]}
    sweep = sweep_with(root, rows=[], seeds=[3], grid=grid)
    assert [(row.label, row.skipped) for row in sweep.rows if row.skipped] == [
        (f"grid: max_steps {steps}, log_every 7", f"trains the same weights as grid: max_steps {steps}, log_every 5")
        for steps in (100, 200)
    ]
    folders = [trial.folder for trial in sweep.trials]
    assert len(set(folders)) == 3
    assert len({trajectory_of(folder) for folder in folders}) == 1


def test_load_sweep_takes_the_main_run_for_its_base(root):
    main = load_settings(root)
    sweep = sweep_with(root, seeds=[main.seed, 97])
    base = sweep.trials[0].settings
    assert (base.model, base.train) == (main.model, main.train)
    assert sweep.trials[0].folder == run_folder(main, root, run_key(main, root))
    assert sweep.base.tracking.experiment == f"table3-grammar-{main.model_name}"


def test_load_sweep_takes_its_own_cpus_or_the_hardwares(root):
    edit(root, "hardware", cpus_per_worker=7)
    assert sweep_with(root, cpus_per_worker=2).base.hardware.cpus_per_worker == 2
    assert sweep_with(root, cpus_per_worker=0).base.hardware.cpus_per_worker == 7


def test_load_sweep_gives_rows_their_workers_by_axis_before_group(root):
    edit(root, "hardware", num_workers=2)
    found = workers(sweep_with(root, rows=["A", "B", "C"], num_workers={"B": 3, "C": 5, "d_ff": 7}))
    assert found == {
        **{id: 2 for id in ("base", "A-h1", "A-h4", "A-h16", "A-h32")},
        **{id: 3 for id in ("B-dk16", "B-dk32")},
        **{id: 5 for id in ("C-dmodel256", "C-dmodel1024")},  # a third of 2 layers is no whole number
        **{id: 7 for id in ("C-dff1024", "C-dff4096")},
    }


# --- valid results


def test_record_is_found_by_its_own_trial_alone(root):
    trial, other = load_sweep(root).trials[:2]
    assert trial.record() is None
    trial.write_record({"status": "finished", "metrics": {"test_bleu": 31.7}})
    assert first(root).record() == {"key": trial.key, "status": "finished", "metrics": {"test_bleu": 31.7}}
    assert other.record() is None


def test_record_of_another_key_is_none(root):
    trial = first(root)
    trial.write_record({"status": "finished"})
    edit(root, "evaluate", beam=13)
    changed = first(root)
    assert changed.folder == trial.folder  # the weights do not change
    assert changed.record() is None
    edit(root, "evaluate", beam=4)
    assert first(root).record() is not None


def test_record_that_is_damaged_is_none(root):
    trial = first(root)
    trial.write_record({"status": "finished"})
    path = trial.folder / "trial.json"
    for content in (path.read_bytes()[:-5], b"\xff", b""):
        path.write_bytes(content)
        assert trial.record() is None


def test_result_key_changes_with_the_average_the_training_stays(root):
    before = load_sweep(root)
    edit(root, "train", average_checkpoints=2)
    after = load_sweep(root)
    assert [trial.folder for trial in before.trials] == [trial.folder for trial in after.trials]
    assert not set(keys(before).values()) & set(keys(after).values())


@pytest.mark.parametrize(
    ("key", "value"), [("beam", 13), ("alpha", 1.1), ("max_extra", 7), ("engine", "ctranslate2-int8")]
)
def test_result_key_changes_with_the_search_the_training_stays(root, key, value):
    before = load_sweep(root)
    edit(root, "evaluate", **{key: value})
    after = load_sweep(root)
    assert [trial.folder for trial in before.trials] == [trial.folder for trial in after.trials]
    assert not set(keys(before).values()) & set(keys(after).values())


DECIDES_NO_SCORES = {
    "pipeline/__init__.py": "turns off usage reports of libraries",
    "pipeline/common/atomic_io.py": "how files are written; checksums detect other bytes",
    "pipeline/common/checksums.py": "refuses damaged data, and changes none",
    "pipeline/common/cli.py": "how a command ends",
    "pipeline/common/dvc_lock.py": "what MLflow shows",
    "pipeline/common/environment.py": "names of environment variables",
    "pipeline/common/paths.py": "where files are",
    "pipeline/common/presets.py": "only names presets",
    "pipeline/common/retry.py": "when a request to a store is repeated",
    "pipeline/common/settings.py": "its values are in the key",
    "pipeline/common/storage.py": "where files are; checksums detect other bytes",
    "pipeline/common/text.py": "finds empty lines, but not for evaluation.py",
    "pipeline/common/yaml_files.py": "reads settings, which are in the key",
    "pipeline/inference/lines.py": "translates lines, but not for evaluation.py",
    "pipeline/inference/reports.py": "writes scores to files and MLflow",
    "pipeline/inference/serving.py": "the served model, which gives no scores",
    "pipeline/tracking/database.py": "where MLflow's store is",
    "pipeline/tracking/names.py": "what MLflow shows",
    "pipeline/tracking/notes.py": "what MLflow shows",
    "pipeline/tracking/provenance.py": "what MLflow shows",
    "pipeline/tracking/results.py": "what MLflow shows",
    "pipeline/tracking/runs.py": "what MLflow shows",
    "pipeline/tracking/store.py": "what MLflow shows",
}
"""Files that evaluation.py imports, directly or not, but that the key of a trial's result does not depend on."""


def test_evaluation_code_is_what_evaluation_imports_but_for_what_decides_no_scores():
    imported = {file for file in reached(["pipeline/inference/evaluation.py"]) if does_something(file)}
    counted = {*EVALUATION_CODE, *WEIGHTS_CODE}
    assert not counted & set(DECIDES_NO_SCORES)
    assert not set(EVALUATION_CODE) & set(WEIGHTS_CODE)
    missing = imported - counted - set(DECIDES_NO_SCORES)
    assert not missing, "add it to EVALUATION_CODE of sweeps/trials.py, or to DECIDES_NO_SCORES with a reason"
    superfluous = ({*EVALUATION_CODE} | set(DECIDES_NO_SCORES)) - imported
    assert not superfluous, "evaluation does not import this: remove it from the list"


@pytest.mark.parametrize(
    "file",
    [*EVALUATION_CODE, *(f"data/clean/{split}.{code}" for split in ("test", "valid") for code in ("en", "de"))],
)
def test_result_key_changes_with_texts_and_scoring_code_the_training_stays(root, file):
    before = load_sweep(root)
    with (root / file).open("a") as changed:
        changed.write("EXTRA = 1\n")
    after = load_sweep(root)
    assert [trial.folder for trial in before.trials] == [trial.folder for trial in after.trials]
    assert not set(keys(before).values()) & set(keys(after).values())


def test_result_key_ignores_comments(root):
    before = keys(load_sweep(root))
    for file in EVALUATION_CODE:
        with (root / file).open("a") as changed:
            changed.write("# a remark\n")
    assert keys(load_sweep(root)) == before


def test_result_key_ignores_where_and_on_how_many_workers_a_trial_runs(root):
    before = load_sweep(root)
    edit(root, "hardware", num_workers=2, device="cpu", max_failures=11)
    edit(root, "evaluate", batch_tokens=97, num_samples=1)
    after = sweep_with(root, num_workers={"heads": 3}, cpus_per_worker=5, price_per_device_hour=1.5)
    assert workers(after)["A-h4"] == 3
    assert (keys(after), after.run_key) == (keys(before), before.run_key)
    assert [trial.folder for trial in after.trials] == [trial.folder for trial in before.trials]


def test_run_key_of_a_sweep_differs_from_those_of_its_trials(root):
    sweep = sweep_with(root, seeds=[0, 1])
    names = [sweep.run_key, *(trial.run_key for trial in sweep.trials)]
    assert len(set(names)) == len(names) == 1 + 14


def test_run_key_changes_with_the_search_the_folder_stays(root):
    before = load_sweep(root)
    edit(root, "evaluate", beam=1)
    after = load_sweep(root)
    assert after.run_key != before.run_key
    assert after.trials[0].run_key != before.trials[0].run_key
    assert after.trials[0].folder == before.trials[0].folder


def test_run_key_of_a_sweep_stays_with_more_rows_and_seeds(root):
    before = load_sweep(root)
    grid = {"model.d_ff": [97], "train.warmup_steps": [31, 250]}
    after = sweep_with(root, rows=["positions", "d_k", "A"], seeds=[7, 5, 3], grid=grid)
    assert len(after.trials) > len(before.trials)
    assert after.run_key == before.run_key
    assert keys(before).items() <= keys(after).items()
    folders = {trial.id: trial.folder for trial in after.trials}
    assert all(folders[trial.id] == trial.folder for trial in before.trials)


@pytest.mark.parametrize("change", ["base", "data", "model/transformer.py", "pipeline/training/loop.py"])
def test_run_key_of_a_sweep_changes_with_base_data_and_code(root, change):
    before = load_sweep(root)
    if change == "base":
        edit(root, "train", lr_scale=0.7)
    elif change == "data":
        write_meta(root, "1" * 64)
    else:
        (root / change).write_text("# another\n")
    after = load_sweep(root)
    assert after.run_key != before.run_key
    assert not {trial.folder for trial in before.trials} & {trial.folder for trial in after.trials}
    assert not set(keys(before).values()) & set(keys(after).values())


def test_run_key_of_a_sweep_ignores_the_seed_of_params_yaml(root):
    before = load_sweep(root)
    edit(root, "train", seed=97)
    assert (load_sweep(root).run_key, keys(load_sweep(root))) == (before.run_key, keys(before))


def test_load_sweep_names_the_stage_that_writes_a_missing_text(root):
    (root / "data/clean/test.de").unlink()
    with pytest.raises(ValueError, match=r"^data/clean/test\.de does not exist: run the tokenize stage first"):
        load_sweep(root)
