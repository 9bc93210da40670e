"""Presets: the files of conf/, each with values for some sections of params.yaml, and a comment that says what it is.

They are starting points: `python -m pipeline.preset` writes one into params.yaml. Besides, they lend names to runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.common.yaml_files import read_yaml

PRESETS = {"data": ("data", "validate", "tokenize"), "model": ("model", "train"), "hardware": ("hardware",)}
"""The kinds of presets, folders of conf/, and the sections of params.yaml that each has values for."""
FAR = 4
"""A model that differs from every preset in more than so many of its sizes has no preset's name."""
CORPUS = {"data.corpus", "data.src", "data.tgt"}
"""A preset that differs in one of these is not near, however much else is equal."""


def preset_files(root: Path, kind: str) -> dict[str, Path]:
    """{name: file}, sorted."""
    return {path.stem: path for path in sorted((root / "conf" / kind).glob("*.yaml"))}


def find_preset(root: Path, kind: str, name: str) -> Path:
    """Its file. Raises ValueError that lists what there is."""
    if kind not in PRESETS:
        kinds = ", ".join(f"{kind}=NAME" for kind in PRESETS)
        raise ValueError(f"a preset must be one of {kinds}, got {kind}={name}")
    files = preset_files(root, kind)
    if name not in files:
        raise ValueError(f"{kind} must be one of {', '.join(files)}, got {name!r}")
    return files[name]


def nearest_preset(root: Path, kind: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the preset that these sections differ least from, the first section most of all, and what differs.

    Of data, another corpus or language is another name; of a model that is far from all, the name is "custom".
    """
    first = PRESETS[kind][0]
    found = []
    for name, path in preset_files(root, kind).items():
        changes = _changes(values, read_yaml(path))
        in_first = sum(key.startswith(f"{first}.") for key in changes)
        found.append((len(CORPUS & changes.keys()), in_first, len(changes), name, changes))
    other, in_first, _, name, changes = min(found, key=lambda item: item[:3], default=(1, FAR + 1, 0, "", {}))
    if kind == "data" and other:
        data = values["data"]
        return f"{data['corpus']}-{data['src']}-{data['tgt']}", {}
    return ("custom", {}) if in_first > FAR else (name, changes)


def _changes(values: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """{"model.d_k": 4, ...}: the values that differ from the preset's, where it has one."""
    return {
        f"{section}.{key}": values[section][key]
        for section, of_section in preset.items()
        for key, value in of_section.items()
        if key in values[section] and values[section][key] != value
    }
