"""Descriptions of runs in MLflow."""

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.common.settings import Settings
from pipeline.tracking.notes import LONGEST, NOTE, shortened
from pipeline.tracking.results import log_comparison, log_evaluation
from pipeline.tracking.runs import end_run_of, open_run

EXPERIMENT = "transformer"


def note(uri: str, run_id: str) -> dict[str, str]:
    """Return the description's parts by name."""
    text = MlflowClient(uri).get_run(run_id).data.tags[NOTE]
    return dict(line.removeprefix("**").split(":** ") for line in text.split("\n\n"))


def test_note_of_a_new_run_has_model_data_change_and_command(
    uri: str, root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_COMMIT", "0123456789abcdef")
    monkeypatch.setenv("GIT_DIRTY", "true")
    changed = replace(settings.with_seed(7), changes={"model.dropout": 0.15})
    run_id = open_run(uri, changed, "new", {}, root)
    parts = note(uri, run_id)
    assert list(parts) == ["Model", "Changes", "Command", "Links"]
    model = settings.model
    assert parts["Model"].startswith(f"num_layers {model.num_layers}, d_model {model.d_model}, d_ff {model.d_ff}, ")
    assert parts["Model"].endswith(f"{settings.train.max_steps} steps of {settings.train.batch_tokens} tokens on "
                                   "grammar, en to de; seed 7")  # fmt: skip
    assert parts["Changes"] == "dropout 0.15"
    assert parts["Command"] == "`python -m pipeline.train`, at commit 0123456789 with uncommitted changes"
    page = f"#/experiments/{MlflowClient(uri).get_run(run_id).info.experiment_id}/runs/{run_id}"
    assert parts["Links"] == f"[settings]({page}/artifacts/settings.yaml)"


def test_note_of_a_trial_has_its_result_and_how_it_differs_from_base(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    trial = open_run(uri, settings, "trial", {"mlflow.parentRunId": run_id, "change": "A: 1 head"}, root)
    scores = {
        "test_bleu": 41.256,
        "valid_averaged_bleu": 42.5,
        "valid_averaged_ppl": 1.25,
        "valid_averaged_chrf": 7.0,
    }
    log_evaluation(uri, settings, trial, scores, {}, [], [])
    comparison = {"bleu": -1.5, "low": -2.25, "high": -0.5, "p": 0.01, "ppl": 0.5}
    log_comparison(uri, trial, comparison, "worse")
    parts = note(uri, trial)
    assert parts["Changes"] == "A: 1 head"
    assert parts["Result"] == "validation BLEU 42.50, test BLEU 41.26, validation perplexity 1.250"
    assert parts["Compared with base"] == "-1.50 BLEU (95% interval -2.25 to -0.50): worse"
    assert f"/runs/{trial}/artifacts/evaluation), [parent run](#/experiments/" in parts["Links"]
    assert parts["Links"].endswith(f"/runs/{run_id})")


def test_note_of_a_run_that_was_ended_has_the_reason(uri: str, root: Path, settings: Settings, run_id: str) -> None:
    end_run_of(uri, "key", EXPERIMENT, "FINISHED", "ended by ASHA at step 100")
    assert note(uri, run_id)["Result"] == "ended by ASHA at step 100"


def test_note_that_the_caller_gives_is_kept(uri: str, root: Path, settings: Settings) -> None:
    run_id = open_run(uri, settings, "sweep", {NOTE: "a sweep"}, root)
    assert MlflowClient(uri).get_run(run_id).data.tags[NOTE] == "a sweep"


def test_shortened_leaves_whole_lines_out_and_marks_it() -> None:
    line = "x" * 99
    short = "\n".join([line] * 75)
    assert shortened(short) == short
    cut = shortened("\n".join([line] * 80))
    assert cut == "\n".join([line] * 75) + "\n\nThe rest is in the artifacts."
    assert len(short) <= LONGEST
