"""MLflow: the store, runs with their names and descriptions, the metric writer, results, views, provenance.

Imports common/ and MLflow, which nothing else of the pipeline imports but inference/serving.py.
"""
