"""The project's own params.yaml and conf/ in a folder of a test's, to be edited there."""

import shutil
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]


def copy_settings(root: Path) -> None:
    shutil.copy(REPOSITORY / "params.yaml", root)
    shutil.copytree(REPOSITORY / "conf", root / "conf")


def edit(root: Path, file: str, section: str, **values: Any) -> None:
    content = yaml.safe_load((root / file).read_text())
    content[section] |= values
    (root / file).write_text(yaml.safe_dump(content))
