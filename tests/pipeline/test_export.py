"""CTranslate2 computes from an export what our model computes."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import ctranslate2
import numpy as np
import pytest
import torch
from ctranslate2.specs import transformer_spec

from model.config import BOS, EOS, UNK, Positions, TransformerConfig
from model.transformer import Transformer
from pipeline import export
from pipeline.common.checksums import write_sums
from pipeline.inference.ctranslate2_export import write_export
from pipeline.training.checkpoint import save_model
from tests.support.damage import flip_a_bit
from tests.support.random_models import MAX_LENGTH, VOCAB, random_model, random_tokenizer

TOKENIZER = random_tokenizer()
PIECES = [TOKENIZER.id_to_piece(i) for i in range(VOCAB)]
GENERATOR = np.random.default_rng(13)
LENGTHS = [(5, 3), (1, MAX_LENGTH - 1), (MAX_LENGTH - 1, 1), (19, 23)]
PAIRS = [tuple(GENERATOR.choice([UNK, *range(4, VOCAB)], length).tolist() for length in pair) for pair in LENGTHS]


def log_probs(model: Transformer, src: list[int], tgt: list[int]) -> torch.Tensor:
    """Return the log-probability of each token of `tgt` and of EOS, given `src`."""
    with torch.inference_mode():
        found = model.logits(model(torch.tensor([[*src, EOS]]), torch.tensor([[BOS, *tgt]])))[0].log_softmax(-1)
    return found.gather(1, torch.tensor([*tgt, EOS])[:, None])[:, 0]


def exported_log_probs(folder: Path) -> list[torch.Tensor]:
    translator = ctranslate2.Translator(str(folder), "cpu", inter_threads=1, intra_threads=1)
    sides = [[[PIECES[piece] for piece in pair[side]] for pair in PAIRS] for side in (0, 1)]
    return [torch.tensor(scored.log_probs) for scored in translator.score_batch(*sides)]


@pytest.mark.parametrize("positions", get_args(Positions))
@pytest.mark.parametrize("seed", range(5))
def test_write_export_keeps_every_probability_of_every_model(tmp_path: Path, positions: Positions, seed: int):
    model = random_model(seed, positions)
    write_export(model, TOKENIZER, tmp_path, "float32")
    found = exported_log_probs(tmp_path)
    for (src, tgt), theirs in zip(PAIRS, found, strict=True):
        torch.testing.assert_close(theirs, log_probs(model, src, tgt), rtol=1e-4, atol=1e-4)


def test_random_models_have_all_norms_and_larger_keys_and_values():
    configs = [random_model(seed, "none").config for seed in range(5)]
    assert {config.norm for config in configs} == {"pre", "post"}
    assert {np.sign(config.d_k - config.d_v) for config in configs} >= {1, -1}
    assert all(config.num_heads * config.d_k != config.d_model for config in configs)


@pytest.mark.parametrize("positions", get_args(Positions))
def test_write_export_int8_is_close_and_leaves_our_weights_alone(tmp_path: Path, positions: Positions):
    model = random_model(3, positions)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    write_export(model, TOKENIZER, tmp_path, "int8")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)  # CTranslate2 quantizes in place
    ours = torch.cat([log_probs(model, *pair) for pair in PAIRS])
    error = (torch.cat(exported_log_probs(tmp_path)) - ours).abs()
    assert 1e-3 < error.mean() < 0.3


def test_write_export_int8_products_fit_into_16_bits(tmp_path: Path, monkeypatch):
    saved = []
    monkeypatch.setattr(transformer_spec.TransformerSpec, "save", lambda spec, folder: saved.append(spec.variables()))
    write_export(model := random_model(2, "none"), TOKENIZER, tmp_path, "int8")
    (variables,) = saved
    weights = {name: value.array.astype(int) for name, value in variables.items() if f"{name}_scale" in variables}
    assert len(weights) > 10 * model.config.num_layers
    for name, weight in weights.items():
        assert 2 * 255 * np.abs(weight).max() < 2**15, name
        assert (np.abs(weight).max(axis=1) == 64).any(), name
    embeddings = "decoder/embeddings/weight"
    found = weights[embeddings] / variables[f"{embeddings}_scale"].array[:, None]
    ours = model.embedding.weight.detach().numpy()
    assert np.abs(found - ours).max() <= 0.76 * np.abs(ours).max() / 63.5  # rounded to 8 bits, then to 7


def test_write_export_writes_the_shared_embeddings_once(tmp_path: Path):
    model = random_model(1, "sinusoidal")
    write_export(model, TOKENIZER, tmp_path, "float32")
    embeddings = model.embedding.weight.detach().numpy().tobytes()
    assert (tmp_path / "model.bin").read_bytes().count(embeddings) == 1


def save(model: Transformer, folder: Path) -> None:
    """Write the model as the train stage does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model.state_dict(), model.config)
    (folder / "spm.model").write_bytes(TOKENIZER.serialized_model_proto())
    write_sums(folder, ["spm.model"])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project after training, which is the current folder."""
    save(random_model(2, "rotary"), tmp_path / "models/final")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    export.main()


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function that runs the command and returns its one error line."""

    def ends(*arguments: str) -> str:
        with pytest.raises(SystemExit, match=r"^1$"):
            run(monkeypatch, *arguments)
        [line] = capsys.readouterr().err.splitlines()
        return line

    return ends


def test_export_help_example_translates_by_the_folder_alone(project: Path, monkeypatch, capsys):
    run(monkeypatch)
    assert re.fullmatch(
        r"models/ctranslate2: float32, 0\.0 MB; --help shows how to translate with it\n", capsys.readouterr().out
    )
    names = {"config.json", "model.bin", "shared_vocabulary.json", "spm.model", "SHA256SUMS"}
    assert {path.name for path in (project / "models/ctranslate2").iterdir()} == names
    assert json.loads((project / "models/ctranslate2/shared_vocabulary.json").read_text()) == PIECES

    shutil.rmtree("models/final")
    assert export.__doc__
    [example] = re.findall(r"To translate with it:\n\n(.*?)\n\n", export.__doc__, re.DOTALL)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(textwrap.dedent(example), {})
    assert shown.getvalue().strip()


def test_export_has_checksums_that_detect_any_damage(project: Path, monkeypatch):
    run(monkeypatch)
    folder = project / "models/ctranslate2"
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    for path in [path for path in folder.iterdir() if path.name != "SHA256SUMS"]:
        content = path.read_bytes()
        flip_a_bit(path)
        done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout == f"{path.name}: FAILED\n"
        path.write_bytes(content)


def test_export_replaces_the_one_before(project: Path, monkeypatch):
    run(monkeypatch)
    run(monkeypatch, "--quantization", "int8")
    translator = ctranslate2.Translator(str(project / "models/ctranslate2"))
    assert translator.compute_type.startswith("int8")


def test_export_that_fails_leaves_the_one_before(project: Path, refusal, monkeypatch):
    run(monkeypatch)
    before = {path: path.read_bytes() for path in (project / "models").rglob("*") if path.is_file()}

    def full(model, tokenizer, folder: Path, quantization: str) -> None:
        (folder / "model.bin").write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_export", full)
    assert refusal() == ("export: models/ctranslate2: No space left on device: free some space and run again")
    assert {path: path.read_bytes() for path in (project / "models").rglob("*") if path.is_file()} == before


def test_export_does_not_replace_a_folder_that_is_no_export(project: Path, refusal):
    for output in ("models", "models/final", ".", "models/final/spm.model"):
        line = refusal("--output", output)
        assert line == f"export: {output} exists and is not an export, so it is not replaced: name another --output"
    assert (project / "models/final/weights.safetensors").is_file()


def test_export_reports_what_is_missing_or_does_not_match_in_one_line(project: Path, refusal):
    assert refusal("--model", "models/other") == (
        "export: models/other/weights.safetensors does not exist: run the train stage first (dvc repro train)"
    )
    broken = random_model(2, "rotary")
    with torch.no_grad():
        broken.encoder[0].feed_forward.w_1.weight[1, 1] = torch.nan
    save(broken, project / "models/broken")
    assert refusal("--model", "models/broken") == (
        "export: the model has weights that are not finite: train it again with a lower train.lr_scale"
    )
    config = json.loads((project / "models/final/config.json").read_text())
    model = Transformer(TransformerConfig(**config | {"vocab_size": 43}))
    save(model, project / "models/final")
    assert refusal() == (
        "export: models/final has a tokenizer with 41 tokens, but a model with 43: run the train stage again"
    )
    (project / "models/final/spm.model").unlink()
    assert refusal() == ("export: models/final/spm.model does not exist: run the train stage first (dvc repro train)")
    assert not (project / "models/ctranslate2").exists()
