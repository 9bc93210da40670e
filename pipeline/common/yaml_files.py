"""YAML files as DVC reads and writes them: YAML 1.2, where 1e-9 is a number, with comments kept."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.atomic_io import write_text


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises ValueError that names the file."""
    return _read(path, YAML(typ="safe", pure=True))


def read_with_comments(path: Path) -> Any:
    """A dict that `write_yaml` writes with the comments it had. Raises ValueError that names the file."""
    return _read(path, YAML())


def write_yaml(path: Path, values: Any) -> None:
    """As `dvc exp run -S` writes, so that neither changes a line without need."""
    write_text(path, yaml_text(values))


def yaml_text(values: Any) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style, yaml.width = False, 4096
    yaml.dump(values, stream)
    return stream.getvalue()


def _read(path: Path, yaml: YAML) -> Any:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run from the project's root folder") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections of `key: value` lines")
    return values
