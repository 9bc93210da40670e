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


def main() -> None:
    cli.parser("pipeline.check", __doc__).parse_args()
    with cli.exit_on_error("check"):
        settings = load_settings()
        read_lock(Path())
        if settings.data.corpus == "own":
            check_own()
        write_text(CHECKED, "params.yaml is complete and valid.\n")


def check_own() -> None:
    """Raise ValueError if neither data/own nor data/own.dvc (from which `dvc pull` fetches it) exists."""
    if not OWN.exists() and not OWN.with_suffix(".dvc").exists():
        raise ValueError(f"data.corpus is own, but {OWN} does not exist: put your texts there")


if __name__ == "__main__":
    main()
