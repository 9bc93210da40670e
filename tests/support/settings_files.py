"""Copies of the project's params.yaml and conf/ that a test can edit."""

import shutil
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]

NANO = {"num_layers": 1, "d_model": 64, "d_ff": 128, "num_heads": 8, "d_k": 8, "d_v": 8, "dropout": 0.1}
MINI = {"num_layers": 2, "d_model": 128, "d_ff": 256, "num_heads": 4, "d_k": 32, "d_v": 32, "dropout": 0.1}
"""Sizes of small models, for tests that must not depend on the presets."""


def copy_settings(root: Path) -> None:
    shutil.copy(REPOSITORY / "params.yaml", root)
    shutil.copytree(REPOSITORY / "conf", root / "conf")


def edit(root: Path, section: str, **values: Any) -> None:
    """Set these values in a section of params.yaml."""
    path = root / "params.yaml"
    content = yaml.safe_load(path.read_text())
    content[section] |= values
    path.write_text(yaml.safe_dump(content))
