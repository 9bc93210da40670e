"""Write presets into params.yaml: a corpus, a model with its training, hardware.

    python -m pipeline.preset --list
    python -m pipeline.preset --show model=tiny
    python -m pipeline.preset data=multi30k model=tiny

Reads conf/, where each file is a preset. Writes its values into params.yaml,
keeps the comments there, and prints what changed. `data=own` also makes
data/own a dependency of the download stage in dvc.yaml; any other corpus
removes it.
"""

import shutil
import textwrap
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

from pipeline.common import cli
from pipeline.common.paths import OWN
from pipeline.common.presets import PRESETS, find_preset, preset_files
from pipeline.common.settings import load_settings, optional_keys, shown
from pipeline.common.yaml_files import read_with_comments, write_yaml

PARAMS, PIPELINE = Path("params.yaml"), Path("dvc.yaml")


def write_presets(names: list[str], root: Path = Path()) -> list[str]:
    """Write these presets into `root`/params.yaml; return a line for each value that changed.

    Raises ValueError for an unknown preset, before anything is written.
    """
    presets = [_kind_and_name(name) for name in names]
    files = [find_preset(root, kind, name) for kind, name in presets]
    params = read_with_comments(root / PARAMS)
    lines = []
    for (kind, _), path in zip(presets, files, strict=True):
        preset = read_with_comments(path)
        for section in PRESETS[kind]:
            lines += _replace_section(params, section, preset[section])
    write_yaml(root / PARAMS, params)
    return lines + _depend_on_own(root, params["data"]["corpus"] == "own")


def _kind_and_name(preset: str) -> tuple[str, str]:
    kind, equals, name = preset.partition("=")
    if not equals:
        raise ValueError(f"a preset must be KIND=NAME, such as model=tiny, got {preset!r}; --list shows all")
    return kind, name


def _replace_section(params: CommentedMap, name: str, preset: CommentedMap) -> list[str]:
    """Write the preset's values into the section; return a line for each change. A key that the preset lacks is
    removed if it is optional, and kept otherwise."""
    old = params.get(name)
    if not isinstance(old, CommentedMap):
        params[name] = preset
        return [_line(f"{name}.{key}", None, value) for key, value in preset.items()]
    below = _cut_below(old)
    obsolete = [key for key in old if key in optional_keys(name) and key not in preset]
    lines = [_line(f"{name}.{key}", old.pop(key), None) for key in obsolete]
    for key, value in preset.items():
        if key in old and old[key] == value:
            continue
        lines.append(_line(f"{name}.{key}", old.get(key), value))
        if key not in old and key in preset.ca.items:
            old.ca.items[key] = preset.ca.items[key]
        old[key] = value
    _put_below(old, below)
    return lines


def _cut_below(section: CommentedMap) -> str:
    """Remove and return the blank lines and comments before the next section, which ruamel.yaml keeps with the last
    key of this one."""
    token = _comment_of(section, list(section)[-1])
    if token is None:
        return ""
    own, _, below = token.value.partition("\n")
    token.value = f"{own}\n"
    return below


def _put_below(section: CommentedMap, below: str) -> None:
    last = list(section)[-1]
    token = _comment_of(section, last)
    if token is None:
        section.ca.items[last] = [None, None, CommentToken("\n", CommentMark(0), None), None]
        token = section.ca.items[last][2]
    token.value = token.value.partition("\n")[0] + "\n" + below


def _comment_of(section: CommentedMap, key: str) -> CommentToken | None:
    return section.ca.items[key][2] if key in section.ca.items else None


def _depend_on_own(root: Path, own: bool) -> list[str]:
    """Add data/own to the download stage's dependencies in dvc.yaml if `own`, else remove it, because DVC refuses a
    dependency that does not exist. Return lines that say what changed."""
    pipeline = read_with_comments(root / PIPELINE)
    deps = pipeline["stages"]["download"]["deps"]
    if own == (str(OWN) in deps):
        return []
    if own:
        deps.append(str(OWN))
    else:
        deps.remove(str(OWN))
    write_yaml(root / PIPELINE, pipeline)
    lines = [f"dvc.yaml: the download stage {'now' if own else 'no longer'} depends on {OWN}"]
    missing = own and not (root / OWN).exists()
    return lines + [f"{OWN} does not exist yet: put your texts there"] * missing


def _line(key: str, old: Any, new: Any) -> str:
    before, after = ("(none)" if value is None else shown(value).strip("'") for value in (old, new))
    return f"{key:32} {before} -> {after}"


def describe(path: Path) -> str:
    """Return the comment at the head of a preset as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    return " ".join(line.lstrip("# ") for line in head)


def main() -> None:
    parser = cli.parser("pipeline.preset", __doc__)
    parser.add_argument("presets", nargs="*", metavar="KIND=NAME", help="data=..., model=... or hardware=...")
    parser.add_argument("--list", action="store_true", help="list all presets, write nothing")
    parser.add_argument("--show", action="store_true", help="print the values of these presets, write nothing")
    options = parser.parse_args()
    if not options.list and not options.presets:
        parser.error("name a preset, such as model=tiny, or --list")
    with cli.exit_on_error("preset"):
        if options.list:
            for kind in PRESETS:
                for name, path in preset_files(Path(), kind).items():
                    first, other = f"{kind + '=' + name:20} ", " " * 21
                    width = shutil.get_terminal_size().columns
                    print(textwrap.fill(describe(path), width, initial_indent=first, subsequent_indent=other))
        elif options.show:
            for kind, name in map(_kind_and_name, options.presets):
                print(find_preset(Path(), kind, name).read_text(encoding="utf-8"), end="")
        else:
            lines = write_presets(options.presets)
            print("\n".join(lines) if lines else "params.yaml already has these values")
            try:
                load_settings()
            except ValueError as error:  # an older error in params.yaml, or presets that do not fit each other
                raise ValueError(f"the values were written, but {error}") from None


if __name__ == "__main__":
    main()
