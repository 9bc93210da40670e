"""Presets: the files of conf/, each with values for some sections of params.yaml and a comment about its purpose.

A preset is a starting point: `python -m pipeline.preset` writes its values into params.yaml. Runs are named after the
nearest preset.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.common.yaml_files import read_yaml

PRESETS = {"data": ("data", "validate", "tokenize"), "model": ("model", "train"), "hardware": ("hardware",)}
"""The kinds of presets (folders of conf/), with the sections of params.yaml that each kind sets."""
FAR = 4
"""A model is "custom" if it differs from every preset in more than this many values of the section `model`."""
CORPUS = {"data.corpus", "data.src", "data.tgt"}
"""A preset that differs in one of these is far, even if all other values are equal."""


def preset_files(root: Path, kind: str) -> dict[str, Path]:
    """The presets of a kind, {name: file}, sorted by name."""
    return {path.stem: path for path in sorted((root / "conf" / kind).glob("*.yaml"))}


def find_preset(root: Path, kind: str, name: str) -> Path:
    """The file of a preset. Raises ValueError that lists the presets if there is none of this name."""
    if kind not in PRESETS:
        kinds = ", ".join(f"{kind}=NAME" for kind in PRESETS)
        raise ValueError(f"a preset must be one of {kinds}, got {kind}={name}")
    files = preset_files(root, kind)
    if name not in files:
        raise ValueError(f"{kind} must be one of {', '.join(files)}, got {name!r}")
    return files[name]


def nearest_preset(root: Path, kind: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the preset nearest to these sections, and the values that differ from it.

    The nearest preset has the fewest differences in the kind's first section, then the fewest in all. For data,
    another corpus or language gives a name of its own; a model far from all presets is "custom".
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
    """The values that differ from the preset's, {"model.d_k": 4, ...}. Keys that it does not set are left out."""
    return {
        f"{section}.{key}": values[section][key]
        for section, of_section in preset.items()
        for key, value in of_section.items()
        if key in values[section] and values[section][key] != value
    }
