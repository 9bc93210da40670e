"""The pipeline: each module is a command, and the folders contain what the commands share.

Importing this package does two things before any other import. It sets the variables that Ray and MLflow read while
they are imported (no usage reports, no open ports). If it is imported by `python -m ...`, it also installs the signal
handlers of a command (`cli.begin`), or exits with a one-line message if the project's packages are not installed.
"""

import sys

from pipeline.common.environment import set_at_import

set_at_import()
if sys.argv[0] == "-m":  # Python sets this while it looks for the module to run
    try:
        from pipeline.common import cli
    except ModuleNotFoundError as error:
        sys.exit(f"{error} for {sys.executable}: make .venv/installed && source .venv/bin/activate")
    cli.begin()
