"""The pipeline: one module per command, in folders what they share.

Two things happen when it is imported, before anything else is. Usage reports are turned off: MLflow reads its switch
while it is being imported. And `python -m pipeline.train` prepares for being stopped.
"""

import sys

from pipeline.common import cli
from pipeline.common.environment import TELEMETRY, set_defaults

set_defaults(TELEMETRY)
if sys.argv[0] == "-m":  # Python looks for the module that it was told to run
    cli.begin()
