"""Environment variables are named in one file, set for a block, and restored."""

import ast
import importlib
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

import pipeline
from model.cpu import library
from pipeline.common.environment import (
    FORWARDED,
    RAY_LOOPBACK,
    TELEMETRY,
    environment,
    forwarded,
    without_passwords,
)

REPOSITORY = Path(__file__).parents[3]
OF_TOOLS = re.compile(
    r"(RAY|TUNE|MLFLOW|DVC|GIT|OMP|GLOO|NCCL|TORCH)_\w+|RUN_STORAGE|PLAIN_RAY_TRAIN|CORPUS_MIRROR|DO_NOT_TRACK"
)


def test_environment_sets_for_the_block_and_restores_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "mine")
    monkeypatch.setenv("FORCED", "mine")
    monkeypatch.setenv("REMOVED", "mine")
    monkeypatch.delenv("NEW", raising=False)
    before = dict(os.environ)
    during = None
    with suppress(KeyError), environment({"KEPT": "1", "NEW": "2"}, {"FORCED": "3", "REMOVED": None}):
        during = [os.environ.get(name) for name in ("KEPT", "NEW", "FORCED", "REMOVED")]
        raise KeyError
    assert during == ["mine", "2", "3", None]
    assert dict(os.environ) == before


def test_forwarded_variables_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("RUN_STORAGE", "/shared")
    assert forwarded()["RUN_STORAGE"] == "/shared"
    assert "secret" not in forwarded().values()


def test_forwarded_variables_have_the_choice_of_the_matrix_product() -> None:
    assert library.ENVIRONMENT in FORWARDED


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://us:secret@mlflow:5000/x", "https://mlflow:5000/x"),
        ("http://us:se@cret@mlflow:5000", "http://mlflow:5000"),
        ("http://secret@mlflow:5000", "http://mlflow:5000"),
        ("http://mlflow:5000/@x", "http://mlflow:5000/@x"),
        ("postgresql://us:s/e:c?ret@db:5432/runs", "postgresql://db:5432/runs"),
        ("postgresql://db/runs?user=us&password=secret&x=1", "postgresql://db/runs?user=us&password=&x=1"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("sqlite:////srv/us:secret@x.db", "sqlite:////srv/us:secret@x.db"),
        ("GET http://us:secret@a/x and ftp://us:secret@b: refused", "GET http://a/x and ftp://b: refused"),
    ],
)
def test_without_passwords_hides_those_of_all_addresses(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_forwarded_variables_have_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://us:secret@mlflow:5000")
    assert forwarded()["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_telemetry_is_off_when_the_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TELEMETRY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "0")  # a user's own value is kept
    importlib.reload(pipeline)
    assert {name: os.environ[name] for name in TELEMETRY} == TELEMETRY | {"DO_NOT_TRACK": "0"}


@pytest.mark.parametrize(("address", "expected"), [(None, "0"), ("head:6379", None)])
def test_ray_started_here_listens_on_this_machine_alone(address, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = RAY_LOOPBACK
    for variable in (name, "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    importlib.reload(pipeline)
    assert os.environ.get(name) == expected


@pytest.mark.parametrize("folder", ["model", "pipeline", "sweeps"])
def test_environment_variables_are_named_in_one_file(folder: str) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}: {node.value}"
        for path in (REPOSITORY / folder).rglob("*.py")
        if path != REPOSITORY / "pipeline/common/environment.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OF_TOOLS.fullmatch(node.value)
    ]
    assert not found, "name them in pipeline/common/environment.py, with their purpose"
