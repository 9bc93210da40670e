"""One module per DVC stage, and what the stages share.

Ray, MLflow and DVC report usage to their makers unless told otherwise: told here, before any of them is imported.
So is CTranslate2, that MKL is to multiply in 8 bits where the processor has AVX2 alone. On AMD's it would have oneDNN
do it, which adds up pairs of products in 16 bits then, where they overflow.
"""

import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

_PROCESSOR = Path("/proc/cpuinfo")
_FEATURES = _PROCESSOR.read_text() if _PROCESSOR.exists() else ""
if "avx2" in _FEATURES and "avx512" not in _FEATURES:
    os.environ.setdefault("CT2_USE_MKL", "1")
