"""Check the settings and dvc.lock: a typo ends the pipeline at its start, before any other stage runs.

    python -m pipeline.check

Reads params.yaml, conf/ and dvc.lock. Writes data/checked.txt, always the same: DVC runs this stage whenever
params.yaml has changed, and the download stage, which depends on that file, not for that reason.
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
    """Raise ValueError if there is neither data/own nor the data/own.dvc that `dvc pull` gets it by."""
    if not OWN.exists() and not OWN.with_suffix(".dvc").exists():
        raise ValueError(f"data.corpus is own, and {OWN} does not exist: put the texts there")


if __name__ == "__main__":
    main()
