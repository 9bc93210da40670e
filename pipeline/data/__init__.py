"""The corpus: the catalogue of public corpora, the built-in grammar and its lexicon, the encoded dataset, batches.

Imports common/ and model.config.
"""
