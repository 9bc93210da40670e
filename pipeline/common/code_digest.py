"""A digest of what Python files do. Comments, docstrings and formatting leave it as it is."""

import ast
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


def code_digest(root: Path, files: Iterable[str]) -> str:
    """SHA-256 of the names and syntax trees of `files`, which are relative to `root`, in whatever order.

    A bare string does nothing: docstrings, of attributes too, do not count. A syntax tree depends on Python's
    version, so the same files give another digest after an upgrade; all nodes of a cluster have one version, as
    pipeline/cluster/preflight.py checks. Raises ValueError for a file that is missing or is not Python.
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


@lru_cache(maxsize=128)  # a sweep asks for the same files again for every trial
def _syntax_tree(source: bytes) -> str:
    return ast.dump(_WithoutBareStrings().visit(ast.parse(source)))


class _WithoutBareStrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if bare else node
