"""The pipeline: one module per command, in folders what they share.

Two things happen when it is imported, before anything else is. Variables are set that Ray and MLflow read while they
are imported: no usage reports, no open ports. And `python -m pipeline.train` prepares for being stopped; where the
project's packages are not installed, it ends with one line.
"""

import sys

from pipeline.common.environment import set_at_import

set_at_import()
if sys.argv[0] == "-m":  # Python looks for the module that it was told to run
    try:
        from pipeline.common import cli
    except ModuleNotFoundError as error:
        sys.exit(f"{error} for {sys.executable}: make .venv/installed && source .venv/bin/activate")
    cli.begin()
