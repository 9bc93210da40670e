"""`dvc repro` of a miniature from raw text to BLEU, later commands of a user, and a kill during training.

All system tests of the default run are in this file: making `trained` takes a minute, and pytest-xdist distributes
whole files, so each process would make its own.
"""

import csv
import json
import re
import subprocess
import sys

import psutil
import pytest
import sacrebleu
import yaml

STAGES = ("download", "validate", "tokenize", "train", "evaluate")
REPORTS = (
    "bleu_by_length.csv",
    "bleu_by_length.png",
    "evaluation.json",
    "tokenization.json",
    "train.json",
    "training_curve.csv",
    "training_curve.png",
    "translations.tsv",
    "translations_valid.tsv",
    "validation.json",
    "validation_curve.csv",
    "validation_curve.png",
)


def translations(project):
    """Return the rows of reports/translations.tsv."""
    with (project.root / "reports/translations.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_repro_runs_every_stage_and_leaves_all_reports(trained):
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in trained.output] == list(STAGES)
    assert sorted(path.name for path in trained.root.glob("reports/[!.]*")) == sorted(REPORTS)
    assert len(translations(trained)) == trained.json("reports/tokenization.json")["pairs"]["test"] == 23


def test_repro_scores_its_translations_as_sacrebleu_does(trained):
    rows = translations(trained)
    outputs, references = [row["translation"] for row in rows], [row["reference"] for row in rows]
    expected = sacrebleu.corpus_bleu(outputs, [references], force=True).score
    assert 0 < expected < 100
    assert trained.json("reports/evaluation.json")["test"]["bleu"] == pytest.approx(expected, abs=0.01)
    test = (trained.root / "data/clean/test.de").read_text().splitlines()
    assert references == test


def test_repro_prints_its_results_and_no_warning(trained):
    assert re.search(r"train: done in \d+ s: trained to step 400, models/final/weights", trained.output)
    assert "tok/s" in trained.output
    assert "sacreBLEU" in trained.output
    for noise in ("Traceback", "WARNING", "Warning", "ray::", "TrainController", "RayTrainWorker", "TrainingReport"):
        assert noise not in trained.output


def test_repro_leaves_one_finished_mlflow_run_with_its_sources(trained):
    run = trained.only_run()
    assert run.info.status == "FINISHED"
    assert run.data.params["d_model"] == "16"
    assert run.data.params["max_steps"] == "400"
    assert run.data.params["beam"] == "2"
    lock = yaml.safe_load((trained.root / "dvc.lock").read_text())
    md5 = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    assert run.data.tags["run.data_md5"] == md5["data/clean"]
    assert run.data.tags["run.tokenizer_md5"] == md5["data/tokenizer"]
    assert run.inputs.dataset_inputs[0].dataset.digest == md5["data/clean"]
    assert run.data.tags["git_commit"] == trained.run("git", "rev-parse", "HEAD~1").strip()
    assert run.data.tags["git_dirty"] == "false"
    evaluation = trained.json("reports/evaluation.json")
    assert run.data.metrics["test_bleu"] == evaluation["test"]["bleu"]
    assert run.data.metrics["test_chrf"] == evaluation["test"]["chrf"]
    assert trained.json("models/final/run.json")["mlflow_run_id"] == run.info.run_id


@pytest.mark.parametrize(
    ("metric", "report"),
    [(name, "training_curve") for name in ("train_loss", "learning_rate", "tokens_per_second", "grad_norm")]
    + [(f"valid_{name}", "validation_curve") for name in ("loss", "ppl", "ppl_word", "bleu", "chrf")],
)
def test_mlflow_curve_equals_the_report(trained, metric, report):
    with (trained.root / f"reports/{report}.csv").open() as file:
        rows = [(int(row["step"]), float(row[metric])) for row in csv.DictReader(file)]
    assert rows[-1][0] == 400
    assert trained.curve(metric) == rows


def test_logged_model_translates_the_same_in_another_process(trained, tmp_path):
    rows = translations(trained)
    program = (
        "import json, mlflow, sys; model = mlflow.pyfunc.load_model(sys.argv[1]); "
        "print(json.dumps(model.predict(json.loads(sys.argv[2]))))"
    )
    sources = json.dumps([row["source"] for row in rows])
    done = subprocess.run(
        [sys.executable, "-c", program, f"models:/{trained.only_run().data.tags['run.model_id']}", sources],
        cwd=tmp_path,
        env=trained.environment | {"MLFLOW_TRACKING_URI": trained.tracking_uri},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [row["translation"] for row in rows]


def test_repro_again_runs_nothing(trained):
    output = trained.run("dvc", "repro", "evaluate")
    assert "Running" not in output
    assert "Data and pipelines are up to date" in output


def test_dvc_metrics_show_fits_a_screen_and_agrees_with_the_reports(trained):
    printed = trained.run("dvc", "metrics", "show").splitlines()
    assert max(map(len, printed)) <= 100
    metrics = json.loads(trained.run("dvc", "metrics", "show", "--json").splitlines()[-1])[""]["data"]
    train, test = (metrics[f"metrics/{name}.json"]["data"] for name in ("train", "test"))
    assert train["steps"] == trained.json("reports/train.json")["steps"]
    assert train["valid_ppl"] == pytest.approx(trained.json("reports/train.json")["valid_ppl"], abs=1e-3)
    assert test["bleu"] == pytest.approx(trained.json("reports/evaluation.json")["test"]["bleu"], abs=1e-3)


def test_dvc_plots_show_the_curves(trained, tmp_path):
    trained.run("dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots/index.html").read_text()
    for title in ("Training loss", "Validation perplexity", "BLEU by length"):
        assert title in page
    for name in ("training_curve", "validation_curve", "bleu_by_length"):  # visible without a network
        (image,) = re.findall(rf'src="(static/[^"]*_{name}.png)"', page)
        assert (tmp_path / "plots" / image).read_bytes() == (trained.root / f"reports/{name}.png").read_bytes()


def test_exp_run_with_another_beam_runs_evaluate_alone(trained, tmp_path):
    project = trained.copy(tmp_path / "project", without=("checkpoints",))
    output = project.run("dvc", "exp", "run", "--name", "narrow", "--set-param", "evaluate.beam=1", "evaluate")
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in output] == ["evaluate"]
    beams = {name: params["evaluate"]["beam"] for name, params in project.experiments().items()}
    assert (beams["main"], beams["narrow"]) == (2, 1)


def test_repro_killed_resumes_and_ends_with_the_same_weights(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    with project.started("dvc", "repro", "train") as repro:
        project.wait_for(project.checkpoints, "checkpoint")
        orphans = repro.children(recursive=True)
        repro.kill()
    output = project.run("dvc", "repro", "train")
    assert "continuing from the checkpoint of step" in output
    assert not [process for process in orphans if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert project.weights() == trained.weights()
    assert project.only_run().info.status == "FINISHED"
    assert project.curve("train_loss") == trained.curve("train_loss")
