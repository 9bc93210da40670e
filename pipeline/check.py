"""Check params.yaml and dvc.lock before any other stage runs.

    python -m pipeline.check

Reads params.yaml, conf/ and dvc.lock. Writes data/checked.txt, whose text never
changes. DVC runs this stage whenever params.yaml has changed. The download
stage depends on data/checked.txt, so an error in params.yaml stops the pipeline
here, and changing the settings of a later stage does not repeat the download.
"""

from pathlib import Path

from pipeline.common import cli
from pipeline.common.atomic_io import write_text
from pipeline.common.dvc_lock import read_lock
from pipeline.common.paths import CHECKED, OWN
from pipeline.common.settings import load_settings
from pipeline.common.yaml_files import read_yaml


def main() -> None:
    cli.parser("pipeline.check", __doc__).parse_args()
    with cli.exit_on_error("check"):
        settings = load_settings()
        read_lock(Path())
        check_own(settings.data.corpus == "own")
        write_text(CHECKED, "params.yaml is complete and valid.\n")


def check_own(own: bool) -> None:
    """Raise ValueError unless the download stage depends on data/own exactly if the corpus is `own`, and data/own or
    data/own.dvc (from which `dvc pull` fetches it) exists then."""
    depends = str(OWN) in read_yaml(Path("dvc.yaml"))["stages"]["download"]["deps"]
    if depends and not own:
        raise ValueError(f"dvc.yaml depends on {OWN}, which is not data.corpus: run git restore dvc.yaml")
    if own and not depends:
        raise ValueError(f"dvc.yaml does not depend on {OWN}: run python -m pipeline.preset data=own")
    if own and not OWN.exists() and not OWN.with_suffix(".dvc").exists():
        raise ValueError(f"data.corpus is own, but {OWN} does not exist: put your texts there")


if __name__ == "__main__":
    main()
