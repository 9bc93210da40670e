"""Training on one worker: batches through the loop, threads, checkpoints, the identity of a run and its results.

Imports data/, common/ and model/; no Ray, no MLflow.
"""
