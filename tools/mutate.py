"""Break lines of the code, one at a time, and check that a test notices.

    python -m tools.mutate                               # 30 lines: 20 minutes on two cores
    python -m tools.mutate --number 4 --folders sweeps   # a few lines in one folder
    python -m tools.mutate --all                         # what escapes meets all other tests

A mutation flips a comparison or a condition, swaps + and - or * and /, changes a
constant, or deletes a statement. Texts, messages and plots are left alone.
Mutations are made in copies of the repository; the working tree is only read.

For each mutation, the test file that mirrors the mutated file runs, then the
other tests of its folder, until a test fails. A test run that does not end counts
as caught. Prints each mutation with the test that caught it, or ESCAPED. The code
and --seed decide which mutations are made.
"""

import argparse
import ast
import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from queue import SimpleQueue

import pytest

from pipeline.common import cli

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ["model", "pipeline/training", "pipeline/inference", "sweeps"]
PAGES = re.compile(r"^(?:import|from) (?:matplotlib|jinja2)\b", re.MULTILINE)
"""Modules that import these lay out pages. Their numbers are a matter of taste."""
MESSAGES = re.compile(r"(?:log|print|say|warn\w*|debug|info|tqdm|setLevel|add_argument)$")
PATHS = re.compile(r"root|folder|path|parent|REPOSITORY", re.IGNORECASE)
HABITS = {"check", "daemon", "exist_ok", "flush", "indent", "parents", "strict"}
"""Keyword arguments that change results only if something else is wrong."""
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A change of one place in a file, from `old` to `new`."""

    file: str
    line: int
    function: str
    kind: str
    old: str
    new: str
    code: str  # the whole mutated file

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        in_line = f", in {self.code.splitlines()[self.line - 1].strip()}" if self.kind == "constant" else ""
        return f"{self.file}:{self.line} {self.function}: {old}  ->  {new}{in_line}"


def is_text(node: ast.AST) -> bool:
    """Whether a node is a path, string, message or error, or a call or sum that contains a string."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and (is_text(node.value) or any(map(has_string, node.value.args)))
    if isinstance(node, ast.Call):
        return bool(MESSAGES.search(ast.unparse(node.func)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and PATHS.search(ast.unparse(node.left)):
        return True
    if isinstance(node, ast.BinOp | ast.AugAssign):
        return has_string(node)
    return isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert)


def has_string(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node))


def broken(node: ast.AST) -> tuple[str, ast.AST] | None:
    """(kind of mutation, the mutated node), or None if this node has no mutation."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            new.ops = [COMPARISONS[type(op)]()]
            return "comparison", new
        case ast.BoolOp():
            new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
            return "condition", new
        case ast.UnaryOp(op=ast.Not()):
            return "condition", new.operand
        case ast.BinOp() | ast.AugAssign() if type(new.op) in OPERATORS:
            new.op = OPERATORS[type(new.op)]()
            return "arithmetic", new
        case ast.Constant(value=bool(value)):
            return "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            return "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            return "constant", ast.Constant(2 * value or 1.0)
        case ast.Expr(value=ast.Call()) | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Continue():
            return "deletion", ast.Pass()
    return None


def mutations_of(file: str) -> Iterator[Mutation]:
    """All mutations in the functions of a file, except in `main`, __str__ and __repr__."""
    code = (REPOSITORY / file).read_text(encoding="utf-8")
    data = code.encode()  # ast counts columns in bytes
    starts = [0, *accumulate(map(len, data.splitlines(keepends=True)))]

    def below(parent: ast.AST, function: str) -> Iterator[Mutation]:
        unread = [getattr(parent, "annotation", None), getattr(parent, "returns", None)]
        for node in ast.iter_child_nodes(parent):
            if is_text(node) or node in unread or getattr(node, "name", "") in ("main", "__str__", "__repr__"):
                continue
            if isinstance(node, ast.keyword) and node.arg in HABITS:
                continue
            wrong = broken(node)
            if (
                function
                and wrong
                and isinstance(node, ast.expr | ast.stmt)
                and node.end_lineno
                and node.end_col_offset
            ):
                start = starts[node.lineno - 1] + node.col_offset
                end = starts[node.end_lineno - 1] + node.end_col_offset
                new = ast.unparse(wrong[1]) if isinstance(node, ast.stmt) else f"({ast.unparse(wrong[1])})"
                whole = (data[:start] + new.encode() + data[end:]).decode()
                yield Mutation(file, node.lineno, function, wrong[0], data[start:end].decode(), new, whole)
            yield from below(node, node.name if isinstance(node, ast.FunctionDef) else function)

    if not PAGES.search(code):
        yield from below(ast.parse(code), "")


def choose(folders: list[str], number: int, seed: int) -> list[Mutation]:
    """`number` mutations, round-robin over the folders, of random kinds. No function gets a second one while others
    of its folder have none."""
    draw = random.Random(seed)
    left: dict[str, list[Mutation]] = {}
    for folder in folders:
        files = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / folder).rglob("*.py"))]
        found = [mutation for file in files for mutation in mutations_of(file)]
        left[folder] = draw.sample(found, len(found))
    taken: list[Mutation] = []
    for folder in cycle(folders):
        if len(taken) == number or not any(left.values()):
            return taken
        if not left[folder]:
            continue
        kind = draw.choice(sorted({mutation.kind for mutation in left[folder]}))
        used = {(mutation.file, mutation.function) for mutation in taken}
        mutation = min(left[folder], key=lambda m: ((m.file, m.function) in used, m.kind != kind))
        left[folder].remove(mutation)
        taken.append(mutation)
    return taken


def copy_tree(to: Path) -> Path:
    """Copy the files that Git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if (REPOSITORY / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, to / name)
    return to


def failure(tree: Path, *arguments: str, timeout_s: float = 3600) -> str | None:
    """Run pytest in `tree`. Returns the first test that fails, or None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"the time limit of {timeout_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"{' '.join(command)}: {output}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed.group(1) if failed else f"exit code {process.returncode}" if process.returncode else None


def main(arguments: list[str] | None = None) -> None:
    parser = cli.parser("tools.mutate", __doc__)
    parser.add_argument("--number", type=int, default=30, help="number of mutations (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other mutations (%(default)s)")
    parser.add_argument(
        "--folders", nargs="+", default=FOLDERS, help="folders to mutate, each with its tests in tests/"
    )
    parser.add_argument("--all", action="store_true", help="run all tests but gpu and host on what escapes")
    parser.add_argument("--processes", type=int, default=2, help="test runs at the same time (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    options = parser.parse_args(arguments)
    mutations = choose(options.folders, options.number, options.seed)
    if options.list:
        print(*mutations, sep="\n")
        return
    with cli.exit_on_error("mutate", RuntimeError):
        _run(mutations, options)


def _run(mutations: list[Mutation], options: argparse.Namespace) -> None:
    """Make each mutation, run its tests, and print the test that caught it."""
    trees: SimpleQueue[Path] = SimpleQueue()

    def unmutated(folder: str) -> float:
        """Seconds that the tests of the folder take without a mutation. Raises RuntimeError if one fails."""
        tree, start = trees.get(), time.monotonic()
        failed = failure(tree, f"tests/{folder}")
        trees.put(tree)
        if failed:
            raise RuntimeError(f"{failed} fails without a mutation")
        return time.monotonic() - start

    def caught_by(mutation: Mutation) -> str | None:
        folder = next(folder for folder in options.folders if mutation.file.startswith(f"{folder}/"))
        mirror = Path("tests", mutation.file).with_name(f"test_{Path(mutation.file).name}")
        tree = trees.get()
        file = tree / mutation.file
        before = file.read_text(encoding="utf-8")
        file.write_text(mutation.code, encoding="utf-8")
        limit = 2 * seconds[folder] + 60
        failed = failure(tree, str(mirror), timeout_s=limit) if (tree / mirror).is_file() else None
        failed = failed or failure(tree, f"tests/{folder}", timeout_s=limit)
        if options.all:
            failed = failed or failure(tree, "-m", "not gpu and not host", timeout_s=7200)
        file.write_text(before, encoding="utf-8")
        trees.put(tree)
        return failed

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.processes) as pool:
        for number in range(options.processes):
            trees.put(copy_tree(Path(scratch, str(number))))
        seconds = dict(zip(options.folders, pool.map(unmutated, options.folders), strict=True))
        escaped = 0
        for mutation, test in zip(mutations, pool.map(caught_by, mutations), strict=True):
            escaped += test is None
            print(f"{mutation}\n    {f'caught by {test}' if test else 'ESCAPED'}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{len(mutations)} mutations, {len(mutations) - escaped} caught, {escaped} escaped; {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
