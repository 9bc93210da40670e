"""Shared by every part of the pipeline: settings, paths, command-line conventions, atomic files, storage.

Imports only model.config and libraries, no other part of the pipeline.
"""
