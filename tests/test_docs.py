"""Commands in README, CONTRIBUTING, docs/ and infra/README.md work, and the things that they name exist.

Every command of an indented or fenced block is run, checked as far as possible without running it, or listed in
ELSEWHERE. Blocks fenced as ```text are not commands. docs/log.md is history: files that it names may be deleted.
"""

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml
from dvc.cli import parse_args as parse_dvc
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

from pipeline.common.settings import SECTIONS, load_settings
from pipeline.preset import write_presets

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "infra/README.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")) if path.name != "log.md"]

RUN = ["dvc metrics show", "python -m pipeline.preset --list", "python -m pipeline.preset --show model=tiny"]
"""Commands that are run unchanged, because they only read."""
ELSEWHERE = {
    "docker": "needs Docker",
    "echo": "text for the command behind it",
    "for": "a loop over docker's commands",
    "do": "a loop over docker's commands",
    "done": "a loop over docker's commands",
    "kubectl": "needs Kubernetes",
    "pip": "installs; tests/infra checks what the image installs",
    "base64": "reads from kubectl",
    "aws": "needs an account",
    "gcloud": "needs an account",
    "ray": "needs a cluster; options of `ray start` are checked by tests/infra",
    "mlflow": "serves until it is stopped; tests/pipeline/inference/test_serving.py loads the model",
    "curl": "needs that server",
    "pre-commit": "the user's own installation; tests/test_hosting.py checks its configuration",
    "openssl": "part of kubectl's commands",
    "infra/make-secrets.sh": "run by tests/infra",
    "source": "the environment that `make .venv/installed` makes",
    "export": "sets variables",
    "mkdir": "a folder of the user",
    "chmod": "files of the user",
    "${EDITOR:-vi}": "the user's editor",
    "git": "commits of the user's own",
}
"""First words of commands that are not run here, with the reason. Project files that they name must exist."""


NAMES_OF_OTHERS = {"PIP_EXTRA_INDEX_URL", "SCHED_BATCH", "SecurityGroupIds", "preload_python_modules"}
"""Names of pip, Linux, AWS and Ray that are in no file of this project."""


class ParsedError(BaseException):
    """Raised once a command has accepted its arguments."""


def blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the lines of each indented block and of each fence other than ```text."""
    lines, number = text.splitlines(), 0
    while number < len(lines):
        first, fence = number, re.fullmatch(r"```(\w*)", lines[number])
        if fence:
            number = lines.index("```", number + 1)
            if fence[1] != "text":
                yield first + 2, lines[first + 1 : number]
        elif lines[number].startswith("    ") and not (first and lines[first - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            yield first + 1, [line[4:] for line in lines[first:number]]
            continue  # `number` is already the line after the block
        number += 1


def commands(document: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each command, which ends with a line unless a backslash or quote is open."""
    for first, lines in blocks((REPOSITORY / document).read_text(encoding="utf-8")):
        command = ""
        for number, line in enumerate(lines, start=first):
            command = f"{command}\n{line}" if command else line
            try:
                open_end = command.endswith("\\") or not shlex.split(command, comments=True)
            except ValueError:  # a quote is open
                open_end = True
            if not open_end:
                yield number, command
            if not open_end or not command.strip() or command.lstrip().startswith("#"):
                command = ""
        assert not command, f"{document}:{first}: the command is incomplete: {command}"


def simple_commands(command: str) -> Iterator[list[str]]:
    """Yield the words of each part between `&&`, `|`, `;` and `&`, without assignments and redirections."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set("&|;"):
            words.append(word)
            continue
        if ">" in words:
            words = words[: words.index(">")]
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words and words[0] == "eval":
            yield from simple_commands(words[1].removeprefix("$(").removesuffix(")"))
        elif words:
            yield words
        words = []


COMMANDS = [(f"{document}:{number}", text) for document in DOCUMENTS for number, text in commands(document)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a copy of the project's settings."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    return tmp_path


@cache
def stages() -> set[str]:
    return set(yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def check_dvc(words: list[str], project: Path) -> None:
    """Check that the command takes these options, that stages exist, and that settings changed by -S are valid."""
    arguments = parse_dvc(words[1:])
    options = {"set_param": None, "queue": False} | vars(arguments)
    if words[1] in ("exp", "repro"):
        assert set(options.get("targets") or ()) <= stages()
    overrides = to_path_overrides(options["set_param"] or ())
    for by_file in get_hydra_sweeps(overrides) if options["queue"] else [overrides]:
        for file, of_file in by_file.items():
            apply_overrides(project / file, of_file)
        load_settings(project)


def check_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the module accepts these arguments."""
    name = words[2]
    if name == "pytest":
        assert all((REPOSITORY / word).exists() for word in words[3:] if "/" in word)
        return
    file = REPOSITORY / name.replace(".", "/")
    module = importlib.import_module(f"{name}.__main__" if (file / "__main__.py").exists() else name)
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, *arguments):
        parse_args(self, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words[2:])
    with pytest.raises(ParsedError):
        module.main()


def test_blocks_finds_a_fence_directly_after_an_indented_block():
    assert [*blocks("    one\n\n```\ntwo\n```\n")] == [(1, ["one", ""]), (4, ["two"])]


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_commands_of_the_documents_work(where, command, project, monkeypatch):
    for words in simple_commands(command):
        if shlex.join(words) in RUN:
            python = {"python": sys.executable, "dvc": Path(sys.executable).with_name("dvc")}[words[0]]
            subprocess.run([python, *words[1:]], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        elif words[0] == "dvc":
            check_dvc(words, project)
        elif words[:3] == ["python", "-m", "pipeline.preset"]:
            assert write_presets(words[3:], project)
        elif words[:2] == ["python", "-m"]:
            check_module(words, monkeypatch)
        elif words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        elif words[:2] == ["git", "restore"]:
            assert {*words[2:]} <= set(tracked()) | {str(Path(name).parent) for name in tracked()} | {"conf"}
        elif words[0] == "sed":
            assert (REPOSITORY / words[-1]).is_file()
        else:
            assert words[0] in ELSEWHERE, "neither run nor checked: add it to ELSEWHERE if that is intended"
            named = [word for word in words if re.match(r"(infra|docs|conf|pipeline|sweeps|tools|tests)/", word)]
            assert [word for word in named if not exists(word)] == []


@cache
def tracked() -> tuple[str, ...]:
    done = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return tuple(done.stdout.splitlines())


def exists(path: str) -> bool:
    """Return whether a path is in the repository, or is made by its commands (git ignores it) or its user."""
    if path.rstrip("/") == "data/own":
        return True
    ignored = ["git", "check-ignore", "--quiet", path]
    return bool(list(REPOSITORY.glob(path.rstrip("/")))) or not subprocess.run(ignored, cwd=REPOSITORY).returncode


def prose(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def quoted(document: str) -> list[str]:
    """Return the texts in backticks, outside of fences."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", prose(document), flags=re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_the_documents_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(document)):
        path, _, heading = target.partition("#")
        file = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_of_the_documents_exist(document):
    folders = {Path(name).parts[0] for name in tracked() if "/" in name}
    names = {Path(name).name for name in tracked()}
    paths = [text for text in quoted(document) if re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", text)]
    files = [text for text in quoted(document) if re.fullmatch(r"\w[\w-]*\.(py|ya?ml|sh|txt|toml|md|png|ini)", text)]
    missing = [path for path in paths if path.partition("/")[0] in folders and not exists(path)]
    assert missing + [file for file in files if file not in names] == []


def tree_of(text: str) -> list[str]:
    """Return the paths of an indented tree. A line is `name` or `name, name`. Two spaces may start a comment."""
    found, above = [], [(-1, "")]
    for line in text.splitlines():
        entry = re.match(r"( *)(\S+(?:, \S+)*)(?:  |$)", line)
        if entry:
            indent = len(entry[1])
            above = [(other, folder) for other, folder in above if other < indent]
            found += [above[-1][1] + name for name in entry[2].split(", ")]
            above.append((indent, found[-1]))
    return found


def test_tree_of_the_architecture_has_every_module_and_nothing_else():
    paths = tree_of(re.search(r"```text\n(.*?)```", prose("docs/architecture.md"), re.DOTALL)[1])
    whole = ("model/cpu/", "tools/benchmarks/")  # one line stands for all their modules
    modules = [
        path
        for path in tracked()
        if re.match(r"(model|pipeline|sweeps|tools)/", path) and not path.endswith("__init__.py")
    ]
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    assert [path for path in modules if path not in paths and not path.startswith(whole)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_the_documents_are_in_the_code(document):
    """A `Name` in `path` is in that file. Other names of classes, constants and functions are in some file."""
    for name, path in re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/.-]+\.(?:py|yaml))`", prose(document)):
        assert name in words_of(path), (name, path)
    known = NAMES_OF_OTHERS.union(*map(words_of, tracked()))
    camel_case, with_underscores = r"[A-Z]+[a-z]+[A-Z]\w+", r"_?[A-Za-z\d]+(_[A-Za-z\d]+)+"
    names = [text for text in quoted(document) if re.fullmatch(f"{camel_case}|{with_underscores}", text)]
    assert [name for name in names if name not in known] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_of_the_documents_exist(document):
    settings = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in fields(section)}
    sections = {key.partition(".")[0] for key in settings}
    named = [text for text in quoted(document) if re.fullmatch(r"[a-z]+\.(?!(py|en|fr)$)[a-z_0-9]+", text)]
    assert [name for name in named if name.partition(".")[0] in sections and name not in settings] == []


def test_badges_of_readme_are_true():
    """Badges are files of the project: they need no network, but no service updates them."""
    project = tomllib.loads(prose("pyproject.toml"))["project"]
    expected = {"licence": project["license"], "python": project["requires-python"].removeprefix(">=") + "+"}
    for name, value in expected.items():
        assert f"{value}</text>" in prose(f"docs/badges/{name}.svg")
        assert f"docs/badges/{name}.svg" in prose("README.md")


def test_readme_is_short_and_leads_to_every_page():
    words = re.findall(r"\S*\w\S*", prose("README.md"))  # not the bars of tables
    assert len(words) <= 1300
    pages = [path for path in tracked() if re.fullmatch(r"docs/[\w-]+\.md|CONTRIBUTING\.md|infra/README\.md", path)]
    assert len(pages) > 10
    assert [page for page in pages if f"({page})" not in prose("README.md")] == []


@cache
def words_of(path: str) -> frozenset[str]:
    """Return the words of a file that is not a document."""
    file = REPOSITORY / path
    text = "" if file.suffix in (".md", ".png") or file == Path(__file__) else file.read_text(encoding="utf-8")
    return frozenset(re.findall(r"\w+", text))
