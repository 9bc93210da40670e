"""MLflow: the store, runs, the metric writer, results, views, and the provenance of a run.

Imports data/, common/ and MLflow, which no other package imports (inference/serving.py is the exception).
"""
