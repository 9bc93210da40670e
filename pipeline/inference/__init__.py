"""From a trained model to text and scores: search in batches, the CTranslate2 engine, metrics, serving, evaluation.

Imports tracking/, training/ (to load a model), data/, common/ and model/. Only serving.py, which MLflow runs, imports
MLflow itself.
"""
