"""The ablations of Table 3: their rows, how they are run, and the report."""

import pipeline  # noqa: F401  # first: it sets variables that Ray and MLflow read when imported
