"""Rules between files: directions of imports, deps in dvc.yaml, pinned versions, no paths of one machine."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support.imports import REPOSITORY, imports, packages, project_files, reached


def modules(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


MODEL, PIPELINE, SWEEPS, TOOLS = modules("model"), modules("pipeline"), modules("sweeps"), modules("tools")
EVERY_MODULE = [*MODEL, *PIPELINE, *SWEEPS, *TOOLS]
LAYERS = [
    ("model",),
    ("pipeline.common",),
    ("pipeline.data",),
    ("pipeline.training",),
    ("pipeline.tracking",),
    ("pipeline.inference",),
    ("pipeline.cluster",),
    ("pipeline",),
    ("sweeps",),
    ("tools",),
]
"""Layers from the bottom up. A module may import its own layer and those below it. The commands in pipeline/ itself
are above all its folders."""
COMMANDS = {path for path in (*PIPELINE, *SWEEPS) if "__main__" in path.read_text(encoding="utf-8")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int | None:
    """Return the number of a module's layer, by the longest prefix of its name, or None outside the project."""
    found = [
        (len(package), number)
        for number, packages in enumerate(LAYERS)
        for package in packages
        if f"{module}.".startswith(f"{package}.")
    ]
    return max(found)[1] if found else None


def id_of(path: Path) -> str:
    return name_of(path)


@pytest.mark.parametrize("path", EVERY_MODULE, ids=id_of)
def test_imports_point_down(path):
    """model <- common <- data <- training <- tracking <- inference <- cluster <- commands <- sweeps <- tools."""
    own = layer(name_of(path))
    above = {
        name
        for file in project_files(path)
        if not file.endswith("__init__.py")
        for name in [name_of(REPOSITORY / file)]
        if (layer(name) or 0) > own
    }
    assert not above


@pytest.mark.parametrize("path", MODEL, ids=id_of)
def test_imports_of_the_model_are_torch_and_itself_alone(path):
    assert packages(path) <= {"model", "torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", modules("pipeline/training"), ids=id_of)
def test_imports_of_training_are_neither_ray_nor_mlflow(path):
    assert not packages(path) & {"ray", "mlflow", "dvc"}


@pytest.mark.parametrize("path", EVERY_MODULE, ids=id_of)
def test_imports_are_never_commands_or_tests(path):
    if not path.is_relative_to(REPOSITORY / "tools"):
        assert not imports(path) & {name_of(command) for command in COMMANDS}
    assert "tests" not in packages(path)


def test_imports_of_mlflow_are_in_tracking_and_the_served_model_alone():
    importing = {name_of(path) for path in EVERY_MODULE if "mlflow" in packages(path)}
    assert {name for name in importing if not name.startswith(("pipeline.tracking.", "tools."))} == {
        "pipeline.inference.serving"
    }


def test_imports_of_ray_are_in_the_cluster_and_the_commands_that_start_it_alone():
    importing = {name_of(path) for path in EVERY_MODULE if "ray" in packages(path)}
    assert {name for name in importing if not name.startswith(("pipeline.cluster.", "tools."))} == {
        "pipeline.submit",
        "sweeps.run",
    }


@pytest.mark.parametrize("path", [*MODEL, *PIPELINE, *SWEEPS], ids=id_of)
def test_imports_are_never_private_modules_of_ray_mlflow_or_dvc(path):
    names = [name.split(".") for name in imports(path)]
    assert not [
        name for name in names if name[0] in {"ray", "mlflow", "dvc"} and any(p.startswith("_") for p in name)
    ]


def stages() -> dict[str, dict]:
    return yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def commands(stage: dict) -> list[str]:
    """Return the files that a stage runs."""
    lines = stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]
    found = [re.findall(r"python -m (pipeline|sweeps)\.(\w+)", line) for line in lines]
    return [f"{package}/{name}.py" for names in found for package, name in names]


def test_stages_are_those_of_the_pipeline_and_run_its_commands():
    assert list(stages()) == ["check", "download", "validate", "tokenize", "train", "evaluate", "sweep", "report"]
    assert {REPOSITORY / file for stage in stages().values() for file in commands(stage)} <= COMMANDS


@pytest.mark.parametrize("name", stages())
def test_deps_of_a_stage_have_every_project_file_that_it_runs(name):
    stage = stages()[name]
    deps = set(stage["deps"])
    needed = reached(commands(stage))
    assert needed
    missing = {file for file in needed if file not in deps and not deps & {str(p) for p in Path(file).parents}}
    assert not missing, f"dvc.yaml: deps of {name} lack {sorted(missing)}"


@pytest.mark.parametrize("name", stages())
def test_deps_of_a_stage_have_no_code_that_it_does_not_run(name):
    stage = stages()[name]
    run = reached(commands(stage))
    code = [dep for dep in stage["deps"] if dep.partition("/")[0] in {"model", "pipeline", "sweeps"}]
    unused = [dep for dep in code if dep not in run and not any(file.startswith(f"{dep}/") for file in run)]
    assert not unused, "a change in these files would rerun the stage needlessly"


def texts(path: Path) -> str:
    """Return a file's text, or of a Python file its strings, including docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = ast.walk(ast.parse(text))
    return "\n".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_tokens_are_never_called_pieces():
    documents = [path for folder in (".", "docs", "infra") for path in (REPOSITORY / folder).glob("*.md")]
    settings = [REPOSITORY / "params.yaml", *(REPOSITORY / "conf").rglob("*.yaml")]
    assert [path for path in (*EVERY_MODULE, *documents, *settings) if re.search(r"\bpieces?\b", texts(path))] == []


def test_versions_are_pinned_exactly():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    pins = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        pins += extra
    assert len(pins) > 10
    loose = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z0-9,]+\])?==\d[\w.]*( *;.*)?", pin)]
    assert not loose


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path.stat().st_size < 1_000_000]


# Concatenated, so that this file does not contain the names itself.
HOSTS = [
    "pypi" + ".org",
    "python" + "hosted",
    "conda" + ".anaconda",
    "docker" + ".io",
    "gh" + "cr.io",
    "quay" + ".io",
]
MACHINE_PATH = re.compile(rb"(?<![\w.}/-])/(?:work|root|tmp/w)(?:/|\b)(?![\w-]*\()")


def test_tracked_files_name_no_package_registry():
    found = [(path, host) for path in tracked() for host in HOSTS if host.encode() in path.read_bytes()]
    assert not found


def test_tracked_files_name_no_path_of_one_machine():
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.decode(errors='replace').strip()}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found
