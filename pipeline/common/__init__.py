"""What every part of the pipeline shares: settings, paths, command-line conventions, atomic files, storage.

Imports model.config and libraries, and no other part of the pipeline.
"""
