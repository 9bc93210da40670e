"""dvc.lock, where DVC records the inputs and outputs of every stage.

DVC writes the file in place. If DVC is killed while it writes, the file is empty or incomplete, and every later
command fails with "validation failed" and no advice.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

from pipeline.common.yaml_files import parse_yaml

LOCK = "dvc.lock"
CONFLICT = re.compile(r"^(<{7}|={7}|>{7})( |$)", re.MULTILINE)


def read_lock(root: Path) -> dict[str, Any]:
    """The stages of `root`/dvc.lock by name; {} if there is no such file.

    Raises ValueError with a remedy for a file that DVC cannot read.
    """
    path = root / LOCK
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        text = "\0"
    if CONFLICT.search(text):
        way_out = f"keep one version (git checkout --ours {LOCK}, or --theirs) or remove the file"
        raise ValueError(f"{path} has merge conflict markers: {way_out}; stages missing from it run again")
    try:
        values = parse_yaml(text)
        if not _is_whole(values):
            raise ValueError("incomplete")
    except ValueError:
        fault = "is incomplete" if text.strip() else "is empty"
        raise ValueError(f"{path} {fault}, probably because dvc was killed: {_way_out(root)}") from None
    return values.get("stages", {})


def _is_whole(values: Any) -> bool:
    """Whether DVC accepts these values. In a truncated file the last value is missing or has another type."""
    if not isinstance(values, dict) or values.get("schema") != "2.0":
        return False
    stages = values.get("stages", {})
    return isinstance(stages, dict) and all(map(_is_whole_stage, stages.values()))


def _is_whole_stage(stage: Any) -> bool:
    if not isinstance(stage, dict) or not isinstance(stage.get("cmd"), str | list):
        return False
    files = [stage.get(kind, []) for kind in ("deps", "outs")]
    params = stage.get("params", {})
    return (
        all(isinstance(entries, list) and all(map(_is_whole_entry, entries)) for entries in files)
        and isinstance(params, dict)
        and all(isinstance(of_file, dict) for of_file in params.values())
    )


def _is_whole_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or "path" not in entry:
        return False
    others = dict(entry)
    md5 = others.pop("md5", None)
    return None not in others.values() and (md5 is None or (isinstance(md5, str) and len(md5) > 2))


def _way_out(root: Path) -> str:
    """The repair: git restore if Git has the file, else rm: DVC finds finished stages in its cache of runs."""
    command = ["git", "-C", str(root), "ls-files", "--error-unmatch", LOCK]
    try:
        in_git = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        in_git = False
    return f"git restore {LOCK}" if in_git else f"rm {LOCK}; dvc repro then finds finished stages in its cache"
