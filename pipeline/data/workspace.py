"""Where a run finds its data and leaves its results: computed once by a command, and passed on as one value."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.common.dvc_lock import read_lock
from pipeline.common.settings import Settings
from pipeline.common.storage import AnyPath, run_storage, tracking_uri
from pipeline.data.published import ensure_local_data, fetch


@dataclass(frozen=True)
class Workspace:
    """The places of a run. All are absolute: its processes work in folders of their own, some on other machines."""

    root: Path
    """The project's folder, on the machine of the command."""
    storage: AnyPath
    """For checkpoints and published data: `root`, or what RUN_STORAGE names."""
    published: AnyPath | None
    """The corpus, for machines that do not see `root`; None if it is not published."""
    tracking_uri: str
    """Of MLflow's store."""

    def data_root(self) -> Path:
        """The folder with data/ on this machine: the project's, or a copy of what is published."""
        return fetch(self.published) if self.published else self.root


def open_workspace(settings: Settings, root: Path) -> Workspace:
    """The workspace of the project in `root`, whose data/ is linked to the published corpus if need be. Raises
    ValueError or OSError, as `read_lock`, `run_storage` and `ensure_local_data`."""
    root = root.resolve()
    read_lock(root)  # a run is tagged with its hashes: no hours before a fault in it is found
    storage = run_storage(root)
    return Workspace(root, storage, ensure_local_data(settings, root, storage), tracking_uri(root))
