"""MLflow: the store, runs, the metric writer, results, views, and the provenance of a run.

Imports common/ and MLflow, which nothing else of the pipeline imports but inference/serving.py.
"""
