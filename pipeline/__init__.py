"""One module per DVC stage, and what the stages share.

Ray, MLflow and DVC report usage to their makers unless told otherwise: told here, before any of them is imported.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
