"""Training on one worker: the loop, threads, checkpoints, the identity of a run and its results.

Imports data/, common/ and model/, but neither Ray nor MLflow.
"""
