"""`dvc repro` from raw text to BLEU on a miniature, and what a user does next."""

import csv
import json
import subprocess
import sys

import pytest
import yaml

STAGES = ("download", "validate", "tokenize", "train", "evaluate")
REPORTS = (
    "bleu_by_length.csv",
    "evaluation.json",
    "tokenization.json",
    "train.json",
    "training_curve.csv",
    "translations.tsv",
    "validation.json",
    "validation_curve.csv",
)


def test_repro_runs_every_stage_and_leaves_all_reports(trained):
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in trained.output] == list(STAGES)
    assert sorted(path.name for path in trained.root.glob("reports/[!.]*")) == sorted(REPORTS)
    lines = (trained.root / "reports/translations.tsv").read_text().splitlines()
    assert len(lines) == 1 + trained.json("reports/tokenization.json")["pairs"]["test"] == 24
    assert 0 <= trained.json("reports/evaluation.json")["test"]["bleu"] <= 100


def test_repro_says_what_people_ask_for_and_nothing_else(trained):
    assert "train: done in" in trained.output
    assert "tokens/s" in trained.output
    assert "sacreBLEU" in trained.output
    for noise in ("Traceback", "WARNING", "Warning", "ray::", "TrainController", "RayTrainWorker", "TrainingReport"):
        assert noise not in trained.output


def test_repro_leaves_one_finished_run_with_all_that_made_the_model(trained):
    run = trained.only_run()
    assert run.info.status == "FINISHED"
    assert run.data.params["d_model"] == "16"
    assert run.data.params["max_steps"] == "400"
    assert run.data.params["beam"] == "2"
    lock = yaml.safe_load((trained.root / "dvc.lock").read_text())
    md5 = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    assert run.data.tags["data_md5"] == md5["data/clean"]
    assert run.data.tags["tokenizer_md5"] == md5["data/tokenizer"]
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
    + [(name, "validation_curve") for name in ("valid_loss", "valid_ppl", "valid_ppl_word")],
)
def test_curve_in_mlflow_is_the_report(trained, metric, report):
    with (trained.root / f"reports/{report}.csv").open() as file:
        rows = [(int(row["step"]), float(row[metric])) for row in csv.DictReader(file)]
    assert rows[-1][0] == 400
    assert trained.curve(metric) == rows


def test_logged_model_translates_in_a_process_of_its_own(trained, tmp_path):
    program = (
        "import json, mlflow, sys; model = mlflow.pyfunc.load_model(sys.argv[1]); "
        "print(json.dumps(model.predict(['the dog sleeps', 'Anna sees 7 birds'])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"models:/{trained.only_run().data.tags['model_id']}"],
        cwd=tmp_path,
        env=trained.environment | {"MLFLOW_TRACKING_URI": trained.tracking_uri},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    translations = json.loads(done.stdout.splitlines()[-1])
    assert [type(text) for text in translations] == [str, str]


def test_second_repro_does_nothing(trained):
    output = trained.run("dvc", "repro", "evaluate")
    assert "Running" not in output
    assert "Data and pipelines are up to date" in output


def test_metrics_and_plots_show(trained, tmp_path):
    shown = trained.run("dvc", "metrics", "show", "--json").splitlines()  # a first line says that no sweep has run
    metrics = json.loads(shown[-1])[""]["data"]
    assert metrics["reports/evaluation.json"]["data"]["test"]["bleu"] >= 0
    assert metrics["reports/train.json"]["data"]["steps"] == 400
    trained.run("dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots/index.html").read_text()
    for title in ("Training loss", "Validation perplexity", "BLEU by length"):
        assert title in page


def test_experiment_with_another_beam_evaluates_and_no_more(trained, tmp_path):
    project = trained.copy(tmp_path / "project", without=("checkpoints",))
    output = project.run("dvc", "exp", "run", "--name", "narrow", "--set-param", "evaluate.beam=1", "evaluate")
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in output] == ["evaluate"]
    beams = {name: params["evaluate"]["beam"] for name, params in project.experiments().items()}
    assert (beams["main"], beams["narrow"]) == (2, 1)
