"""The pipeline: one module per command, in folders what they share.

Importing it turns usage reports off. This is the one thing that happens at import, because MLflow reads its switch
while it is being imported.
"""

from pipeline.common.environment import TELEMETRY, set_defaults

set_defaults(TELEMETRY)
