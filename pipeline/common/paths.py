"""Paths of the project's files, relative to its root folder."""

from pathlib import Path

CHECKED = Path("data/checked.txt")
"""Written by the first stage when params.yaml is valid."""
OWN = Path("data/own")
"""The user's texts, for the corpus "own"."""
DOWNLOADS = Path("data/downloads")
RAW = Path("data/raw")
CLEAN = Path("data/clean")
TOKENIZER = Path("data/tokenizer")
ENCODED = Path("data/encoded")
SWEEP = Path("data/sweep")
"""Trials and translations of the last sweep."""
CHECKPOINTS = Path("checkpoints")
FINAL = Path("models/final")
"""The averaged model of the last training run."""
CTRANSLATE2 = Path("models/ctranslate2")
REPORTS = Path("reports")
METRICS = Path("metrics")
"""The few numbers that `dvc metrics show` prints; the reports have all of them."""
