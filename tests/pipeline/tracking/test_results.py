"""Scores, reports and models, logged to the run that trained."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from pipeline.common.settings import Settings
from pipeline.tracking.results import (
    SERVED_WITH,
    find_training_run,
    log_comparison,
    log_evaluation,
    log_model,
    log_report,
)
from pipeline.tracking.runs import finish_run
from tests.support.imports import REPOSITORY, packages, reached


def test_served_model_names_all_packages_that_it_imports() -> None:
    files = reached(["pipeline/inference/serving.py"])
    found = set().union(*(packages(REPOSITORY / file) for file in files)) - set(sys.stdlib_module_names)
    for_others = {"ctranslate2", "upath", "psutil"}  # imported only for another engine, a store, `python -m`
    needed = {"ruamel.yaml" if name == "ruamel" else name for name in found - for_others - {"model", "pipeline"}}
    assert set(SERVED_WITH) == needed


def curve(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, key)]


def evaluate(uri: str, root: Path, settings: Settings, bleu: float, key: str = "key") -> str:
    translations = root / "translations.tsv"
    translations.write_text("Ein Mann\tA man\n")
    return log_evaluation(
        uri,
        settings,
        find_training_run(uri, settings, key, root),
        metrics={"test_bleu": bleu},
        tags={"bleu_signature": "nrefs:1"},
        files=[translations],
        samples=[{"source": "a man", "translation": "ein Mann"}],
    )


def test_log_evaluation_adds_to_the_run_that_trained(uri: str, root: Path, settings: Settings, run_id: str) -> None:
    finish_run(uri, run_id)
    assert evaluate(uri, root, settings, 41.0) == run_id
    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"test_bleu": 41.0}
    assert run.data.params["beam"] == str(settings.evaluate.beam)
    assert run.data.tags["bleu_signature"] == "nrefs:1"
    artifacts = root / "mlartifacts" / run_id / "artifacts" / "evaluation"
    assert (artifacts / "samples.csv").read_text().splitlines() == ["source,translation", "a man,ein Mann"]
    assert (artifacts / "translations.tsv").exists()


def test_log_evaluation_again_adds_only_what_differs(uri: str, root: Path, settings: Settings, run_id: str) -> None:
    for bleu in (41.0, 41.0, 40.5):
        assert evaluate(uri, root, settings, bleu) == run_id
    assert sorted(curve(uri, run_id, "test_bleu"), reverse=True) == [(0, 41.0), (0, 40.5)]


def test_log_evaluation_with_another_search_makes_a_child_run(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    wide = replace(settings, evaluate=replace(settings.evaluate, beam=13))
    evaluate(uri, root, settings, 41.0)
    child_id = evaluate(uri, root, wide, 41.5)
    assert evaluate(uri, root, wide, 41.5) == child_id != run_id
    client = MlflowClient(uri)
    parent, child = client.get_run(run_id), client.get_run(child_id)
    assert parent.data.metrics == {"test_bleu": 41.0}
    assert child.data.metrics == {"test_bleu": 41.5}
    assert child.data.tags["mlflow.parentRunId"] == run_id
    assert child.info.run_name == "mini on grammar, seed 1, beam 13, alpha 0.6, max_extra 50, engine torch"
    assert child.info.status == "FINISHED"
    assert child.data.params == {**parent.data.params, "beam": "13"}
    assert "settings.yaml" in [file.path for file in client.list_artifacts(child_id)]  # linked by its description


def test_log_evaluation_completes_the_child_of_a_killed_one(
    uri: str, root: Path, settings: Settings, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(settings, evaluate=replace(settings.evaluate, beam=13))
    evaluate(uri, root, settings, 41.0)

    def killed(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(uri, root, wide, 41.5)
    client = MlflowClient(uri)
    parent, child = client.get_run(run_id), client.get_run(evaluate(uri, root, wide, 41.5))
    assert len(client.search_runs([child.info.experiment_id])) == 2
    assert (child.info.status, child.data.metrics) == ("FINISHED", {"test_bleu": 41.5})
    assert child.data.params == {**parent.data.params, "beam": "13"}


def test_find_training_run_makes_one_for_a_model_of_another_store(uri: str, root: Path, settings: Settings) -> None:
    run = MlflowClient(uri).get_run(evaluate(uri, root, settings, 39.0, key="pulled"))
    assert run.data.params["num_heads"] == str(settings.model.num_heads)
    assert (run.data.metrics, run.info.status) == ({"test_bleu": 39.0}, "FINISHED")


def test_log_report_again_adds_only_what_differs(uri: str, root: Path, run_id: str) -> None:
    report, table = root / "report.md", root / "table.csv"
    table.write_text("row,bleu\n")
    for text, seconds in (("first", 7.0), ("first", 7.0), ("second", 11.0)):
        report.write_text(text)
        log_report(uri, run_id, [report, table], {"rows": 13, "seconds": seconds}, f"the {text} note")
    artifacts = root / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "report.md").read_text() == "second"
    assert (artifacts / "table.csv").read_text() == "row,bleu\n"
    assert curve(uri, run_id, "rows") == [(0, 13)]
    assert sorted(curve(uri, run_id, "seconds")) == [(0, 7.0), (0, 11.0)]
    data = MlflowClient(uri).get_run(run_id).data
    assert data.metrics == {"rows": 13, "seconds": 11.0}
    assert data.tags["mlflow.note.content"] == "the second note"
    log_report(uri, run_id, [], {})
    assert MlflowClient(uri).get_run(run_id).data.tags["mlflow.note.content"] == "the second note"


def test_log_report_names_a_run_that_is_gone(uri: str, run_id: str) -> None:
    with pytest.raises(ValueError, match=r"^sqlite:.* has no run nobody \(RESOURCE_DOES_NOT_EXIST\)$"):
        log_report(uri, "nobody", [], {})
    MlflowClient(uri).delete_run(run_id)
    with pytest.raises(ValueError, match=f"^run {run_id} was deleted in sqlite:.*: restore it there$"):
        log_report(uri, run_id, [], {})


def test_log_comparison_adds_metrics_and_verdict_once(uri: str, run_id: str) -> None:
    for low in (-2.0, -2.0, -1.0):
        log_comparison(uri, run_id, {"bleu": 1.5, "low": low, "high": 2.0}, "better")
    data = MlflowClient(uri).get_run(run_id).data
    assert data.tags["verdict"] == "better"
    assert data.metrics == {"vs_base/bleu": 1.5, "vs_base/low": -1.0, "vs_base/high": 2.0}
    assert curve(uri, run_id, "vs_base/bleu") == [(0, 1.5)]
    assert sorted(curve(uri, run_id, "vs_base/low")) == [(0, -2.0), (0, -1.0)]


def test_log_comparison_without_a_comparison_is_a_verdict_alone(uri: str, run_id: str) -> None:
    log_comparison(uri, run_id, {}, "base")
    data = MlflowClient(uri).get_run(run_id).data
    assert (data.tags["verdict"], data.metrics) == ("base", {})
    log_comparison(uri, "nobody", {}, "base")


@pytest.fixture
def final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder; saving it to MLflow writes a placeholder."""

    def save_model(path: str, **named: object) -> None:
        Path(path).mkdir()
        (Path(path) / "MLmodel").write_text("a model")

    monkeypatch.setattr("mlflow.pyfunc.save_model", save_model)
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "weights.safetensors").write_text("weights")
    return folder


@pytest.mark.parametrize(
    "killed_in", ["log_model_artifacts", "finalize_logged_model", "log_outputs", "log_batch", None]
)
def test_log_model_completes_what_a_killed_evaluation_has_begun(
    uri: str, run_id: str, final: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str | None
) -> None:
    def killed(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    if killed_in:
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, killed_in, killed)
            with pytest.raises(KeyboardInterrupt):
                log_model(uri, run_id, final, {})
    for _ in range(2):
        address = log_model(uri, run_id, final, {})
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (f"models:/{model.model_id}", model.status) == (address, LoggedModelStatus.READY)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert model.source_run_id == run_id


def test_log_model_ends_what_was_begun_with_other_weights(
    uri: str, run_id: str, final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", killed)
        with pytest.raises(KeyboardInterrupt):
            log_model(uri, run_id, final, {})
    (final / "weights.safetensors").write_text("other weights")
    address = log_model(uri, run_id, final, {})
    client = MlflowClient(uri)
    models = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    statuses = {f"models:/{model.model_id}": model.status for model in models}
    assert len(statuses) == 2
    assert statuses.pop(address) == LoggedModelStatus.READY
    assert [*statuses.values()] == [LoggedModelStatus.FAILED]
