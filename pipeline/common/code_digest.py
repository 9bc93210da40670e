"""A digest of the code in Python files, without comments, docstrings and formatting."""

import ast
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


def code_digest(root: Path, files: Iterable[str]) -> str:
    """SHA-256 of the names and syntax trees of `files`, which are relative to `root`. Their order does not matter.

    Bare strings have no effect and are left out: these are docstrings, also those of attributes. A syntax tree
    depends on the Python version, so the digest changes with an upgrade of Python. All nodes of a cluster have the
    same version, as pipeline/cluster/preflight.py checks. Raises ValueError if a file is missing or is not Python.
    """
    digest = hashlib.sha256()
    for name in sorted(files):
        try:
            tree = _syntax_tree((root / name).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{root / name} does not exist: run from the project's root folder") from None
        except SyntaxError as error:
            raise ValueError(f"{root / name} is not valid Python: {error}") from None
        digest.update(f"{name}\n{tree}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=128)  # every trial of a sweep needs the same files
def _syntax_tree(source: bytes) -> str:
    return ast.dump(_WithoutBareStrings().visit(ast.parse(source)))


class _WithoutBareStrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if bare else node
