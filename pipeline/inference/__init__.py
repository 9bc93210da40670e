"""Use a trained model: search in batches (torch or CTranslate2), translate lines, compute scores, evaluate, serve.

Imports tracking/, training/ (to load a model), data/, common/ and model/. Only serving.py, which MLflow runs, imports
MLflow itself.
"""
