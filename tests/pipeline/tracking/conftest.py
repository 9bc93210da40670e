"""A project with its own MLflow store and a run in it."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.common.settings import Settings, load_settings
from pipeline.common.storage import tracking_uri
from pipeline.tracking.runs import open_run

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, to be copied: making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with its own store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def uri(root: Path) -> str:
    return tracking_uri(root)


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings(REPOSITORY)


@pytest.fixture
def run_id(uri: str, root: Path, settings: Settings) -> str:
    return open_run(uri, settings, "key", {}, root)
