"""The workspace of a run: the locations of its data and results, computed once by a command and passed on."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.common.dvc_lock import read_lock
from pipeline.common.settings import Settings
from pipeline.common.storage import AnyPath, run_storage, tracking_uri
from pipeline.data.published import ensure_local_data, fetch


@dataclass(frozen=True)
class Workspace:
    """The locations of a run. They are absolute: its processes have other working folders, some on other machines."""

    root: Path
    """The project's folder on the machine of the command."""
    storage: AnyPath
    """The folder of checkpoints and published data: RUN_STORAGE, or `root`."""
    published: AnyPath | None
    """The published corpus, for machines without access to `root`; None if it is not published."""
    tracking_uri: str
    """The URI of MLflow's store."""

    def data_root(self) -> Path:
        """The folder with data/ on this machine: the project's folder, or a copy of the published corpus."""
        return fetch(self.published) if self.published else self.root


def open_workspace(settings: Settings, root: Path) -> Workspace:
    """The workspace of the project in `root`. Links its data/ to the published corpus if needed.

    Raises ValueError or OSError, as `read_lock`, `run_storage` and `ensure_local_data`.
    """
    root = root.resolve()
    read_lock(root)  # runs are tagged with its hashes: find errors in it before hours of training
    storage = run_storage(root)
    return Workspace(root, storage, ensure_local_data(settings, root, storage), tracking_uri(root))
