"""The project files that a file imports, read from syntax trees."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BY_PATH = {"pipeline/inference/evaluation.py": ["pipeline/inference/serving.py"]}
"""Files that MLflow runs for a file, which no import shows."""


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the full names of all modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports, which show the direction"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def project_files(path: Path) -> set[str]:
    """Return the files of this project that a file imports directly."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        candidates = ["/".join(parts) + ".py"] + [
            "/".join(parts[: i + 1]) + "/__init__.py" for i in range(len(parts))
        ]
        found |= {file for file in candidates if (REPOSITORY / file).is_file()}
    return found


def reached(files: Iterable[str]) -> set[str]:
    """Return these files and all project files that they import or run, directly or not."""
    seen: set[str] = set()
    todo = list(files)
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += [*project_files(REPOSITORY / file), *BY_PATH.get(file, [])]
    return seen


def does_something(file: str) -> bool:
    """Return whether a file has more than a docstring."""
    body = ast.parse((REPOSITORY / file).read_text(encoding="utf-8")).body
    return not all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
