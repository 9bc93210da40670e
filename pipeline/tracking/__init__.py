"""MLflow: the store, runs with their names and descriptions, the metric writer, results, views, provenance.

Of the pipeline, it imports only common/. Only this package and inference/serving.py import MLflow.
"""
