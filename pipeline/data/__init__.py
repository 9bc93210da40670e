"""The corpus: the catalogue of public corpora, the built-in grammar and its lexicon, the encoded dataset, batches.

Of the project, it imports only common/ and model.config.
"""
