"""The logged model is loaded as by a stranger: in another process and an empty folder, without this repository."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from mlflow import MlflowClient
from mlflow.models import Model
from mlflow.types import DataType

from model.config import BOS, EOS, PAD, UNK, TransformerConfig
from model.transformer import Transformer
from pipeline.common.checksums import write_sums
from pipeline.common.settings import Evaluate, Settings, load_settings
from pipeline.inference import serving
from pipeline.inference.trained_model import load_trained
from pipeline.inference.translate import translate
from pipeline.tracking.results import log_evaluation, log_model
from pipeline.tracking.runs import open_run
from pipeline.training.checkpoint import save_model
from tests.support.damage import flip_a_bit

SENTENCES = ["the dog sees a cat", "", "two cats sleep here"]
SEARCH = {"beam": 3, "alpha": 0.6, "max_extra": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tokenizer and a model of random weights."""
    root = tmp_path_factory.mktemp("project")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dog sees a cat", "two cats sleep here", "ein Hund sieht eine Katze"] * 20),
        model_writer=trained,
        vocab_size=47,
        model_type="bpe",
        pad_id=PAD,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        minloglevel=2,
    )
    config = TransformerConfig(
        vocab_size=47,
        num_layers=1,
        d_model=22,
        d_ff=29,
        num_heads=2,
        d_k=7,
        d_v=5,
        dropout=0.1,
        positions="sinusoidal",
        norm="post",
        max_length=31,
    )
    torch.manual_seed(11)  # outputs are not empty and differ
    model = Transformer(config)
    (root / "final").mkdir()
    save_model(root / "final", model.state_dict(), config)
    (root / "final" / "spm.model").write_bytes(trained.getvalue())
    write_sums(root / "final", ["spm.model"])
    return root


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(Path(__file__).parents[3])


@pytest.fixture(scope="module")
def logged(root: Path, settings: Settings) -> tuple[str, str, str]:
    """Log a model. Returns the URI of the store, the run's id, and the model's URI."""
    uri = f"sqlite:///{root / 'mlflow.db'}"
    run_id = open_run(uri, settings, "key", {}, root)
    return uri, run_id, log(uri, run_id, root)


def log(uri: str, run_id: str, root: Path) -> str:
    return log_model(uri, run_id, root / "final", SEARCH)


def test_logged_model_translates_without_this_repository(logged, root: Path, tmp_path: Path) -> None:
    uri, _, model_uri = logged
    script = (
        "import json, sys, mlflow\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "print(json.dumps(model.predict(json.loads(sys.argv[2]))))\n"
        "import model, pipeline\n"
        "print(model.__file__, pipeline.__file__)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    output = subprocess.run(
        [sys.executable, "-B", "-I", "-c", script, model_uri, json.dumps(SENTENCES)],
        cwd=tmp_path,
        env={**environment, "MLFLOW_TRACKING_URI": uri},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()

    model, tokenizer = load_trained(root / "final")
    evaluate = Evaluate(**SEARCH, engine="torch", batch_tokens=64, num_samples=0)
    ours = translate(model, tokenizer, tokenizer.encode(SENTENCES), evaluate, progress=False)
    assert json.loads(output[0]) == [ours[0].text, "", ours[2].text]
    assert ours[0].text
    assert ours[0].text != ours[2].text
    assert all("/code/" in path for path in output[1].split())


def test_logged_model_has_no_pickle_and_names_exact_versions(logged) -> None:
    uri, _, model_uri = logged
    model = MlflowClient(uri).get_logged_model(model_uri.removeprefix("models:/"))
    folder = Path(model.artifact_location.removeprefix("file://"))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"weights.safetensors", "config.json", "spm.model", "SHA256SUMS", "serving.py"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    requirements = (folder / "requirements.txt").read_text().split()
    assert "torch==2.13.0" in requirements
    assert all("==" in line and "+" not in line for line in requirements)
    signature = Model.load(folder).signature
    assert [signature.inputs.input_types(), signature.outputs.input_types()] == [[DataType.string]] * 2


def test_logged_model_is_in_its_run_once_with_its_scores(logged, root: Path, settings: Settings) -> None:
    uri, run_id, model_uri = logged
    assert log(uri, run_id, root) == model_uri
    log_evaluation(uri, settings, run_id, {"test_bleu": 12.5}, {}, [], [])
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    (output,) = run.outputs.model_outputs
    assert model_uri == f"models:/{output.model_id}"
    model = client.get_logged_model(output.model_id)
    assert model.source_run_id == run_id
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("test_bleu", 12.5, 0)]
    assert [point.value for point in client.get_metric_history(run_id, "test_bleu")] == [12.5]


def serve(folder: Path) -> serving.Translator:
    """Load a model's artifacts as MLflow's server does."""
    served = serving.Translator()
    artifacts = {"weights": str(folder / "weights.safetensors")}
    served.load_context(SimpleNamespace(artifacts=artifacts, model_config=SEARCH))
    return served


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "spm.model", "SHA256SUMS"])
def test_translator_refuses_a_damaged_model(logged, tmp_path: Path, name: str) -> None:
    uri, _, model_uri = logged
    model = MlflowClient(uri).get_logged_model(model_uri.removeprefix("models:/"))
    folder = shutil.copytree(Path(model.artifact_location.removeprefix("file://")) / "artifacts", tmp_path / "model")
    serve(folder)
    flip_a_bit(folder / name)
    with pytest.raises(ValueError, match=r"is damaged"):
        serve(folder)


def test_translator_logs_what_is_too_long_and_leaves_what_is_empty(root: Path, caplog) -> None:
    served = serve(root / "final")
    long = "The dog sees a cat. " * 5
    found = served.predict(["", "The dog sees a cat.", long, "\u200b \u2060"])
    assert found[0] == found[3] == ""
    assert found[2] == " ".join([found[1]] * 5)
    [message] = caplog.messages
    assert re.fullmatch(r"sentence 3 of 4 has \d+ tokens, more than the model's 30: translated in 5 parts", message)


def test_translator_answers_one_request_at_a_time_with_all_threads(root: Path, own_threads) -> None:
    torch.set_num_threads(3)
    served = serve(root / "final")
    expected = served.predict(SENTENCES)
    threads: list[int] = []
    translate = served.translate

    def slow(*arguments):
        threads.append(torch.get_num_threads())
        found = translate(*arguments)
        time.sleep(0.05)
        return found

    served.translate = slow
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(served.predict, [SENTENCES] * 8)) == [expected] * 8
    assert threads == [3] * 8
