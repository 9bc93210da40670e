"""Check the settings and dvc.lock: what `dvc repro` would stop at without saying the way out.

    python -m pipeline.check

Reads params.yaml, conf/ and dvc.lock; writes nothing, not even a line if all is well. `make repro` begins with it.
"""

from pathlib import Path

from pipeline.common import cli
from pipeline.common.dvc_lock import read_lock
from pipeline.common.settings import load_settings


def main() -> None:
    cli.parser("pipeline.check", __doc__).parse_args()
    with cli.exit_on_error("check"):
        load_settings()
        read_lock(Path())


if __name__ == "__main__":
    main()
