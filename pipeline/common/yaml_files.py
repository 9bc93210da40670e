"""YAML files as DVC reads and writes them: YAML 1.2, where 1e-9 is a number, `no` a text and 0400 four hundred. A key
that is there twice is refused. Comments are kept."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.atomic_io import write_text

MAX_BYTES = 1 << 18
"""Of a settings file: ours has 5 thousand."""


def parse_yaml(text: str) -> Any:
    """The one document in `text`. Raises ValueError, one line."""
    return _parse(text, YAML(typ="safe", pure=True))


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
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path} has {size:,} bytes: settings have {MAX_BYTES:,} at most")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run from the project's root folder") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    try:
        values = _parse(text, yaml)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections of `key: value` lines")
    return values


def _parse(text: str, yaml: YAML) -> Any:
    try:
        return yaml.load(text)
    except RecursionError:
        raise ValueError("lists or sections are nested too deeply") from None
    except (YAMLError, ValueError) as error:  # ValueError: of a number with thousands of digits, or a month 13
        raise ValueError(" ".join(str(error).split())) from None
