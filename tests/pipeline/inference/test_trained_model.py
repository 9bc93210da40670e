"""A model's folder is loaded if complete and undamaged, or refused in one line."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.common.checksums import write_sums
from pipeline.inference.trained_model import load_trained
from pipeline.training.checkpoint import save_model
from tests.support.damage import DAMAGES
from tests.support.random_models import random_model, random_tokenizer

TOKENIZER = random_tokenizer()


@pytest.fixture
def final(tmp_path: Path) -> Path:
    model = random_model(2, "learned")
    folder = tmp_path / "final"
    folder.mkdir()
    save_model(folder, model.state_dict(), model.config)
    (folder / "spm.model").write_bytes(TOKENIZER.serialized_model_proto())
    write_sums(folder, ["spm.model"])
    return folder


def test_load_trained_gives_the_model_and_its_own_tokenizer(final: Path):
    model, tokenizer = load_trained(final)
    expected = random_model(2, "learned").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert tokenizer.serialized_model_proto() == TOKENIZER.serialized_model_proto()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_load_trained_detects_damage_of_any_file(final: Path, tmp_path: Path, damage):
    load_trained(final)
    for path in sorted(final.iterdir()):
        copy = shutil.copytree(final, tmp_path / "copy")
        load_trained(copy)
        damage(copy / path.name)
        with pytest.raises(ValueError, match=r"(is damaged|is not a file|does not exist).*: run the train stage"):
            load_trained(copy)
        shutil.rmtree(copy)
