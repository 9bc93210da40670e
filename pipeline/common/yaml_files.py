"""Read and write YAML files as DVC does.

They are YAML 1.2, where 1e-9 is a number, `no` is a string and 0400 is four hundred. Duplicate keys are an error.
"""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.atomic_io import write_text

MAX_BYTES = 1 << 18
"""Limit for a settings file. params.yaml has 5 thousand bytes."""


def parse_yaml(text: str) -> Any:
    """Parse a single YAML document. Raises ValueError with one line."""
    return _parse(text, YAML(typ="safe", pure=True))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections. Raises ValueError that names the file."""
    return _read(path, YAML(typ="safe", pure=True))


def read_with_comments(path: Path) -> Any:
    """Read a YAML file so that `write_yaml` keeps its comments. Raises ValueError that names the file."""
    return _read(path, YAML())


def write_yaml(path: Path, values: Any) -> None:
    """Write in the layout of `dvc exp run -S`, so that neither of the two reformats the lines of the other."""
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
            raise ValueError(f"{path} must have at most {MAX_BYTES:,} bytes, got {size:,}")
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
        raise ValueError(f"{path} must contain sections of `key: value` lines")
    return values


def _parse(text: str, yaml: YAML) -> Any:
    try:
        return yaml.load(text)
    except RecursionError:
        raise ValueError("lists or sections are nested too deeply") from None
    except (YAMLError, ValueError) as error:  # ValueError: a number with thousands of digits, a month 13
        raise ValueError(" ".join(str(error).split())) from None
