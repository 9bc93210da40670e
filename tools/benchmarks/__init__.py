"""Benchmarks of training, decoding, data stages, start and orchestration, compared with other toolkits.

`python -m tools.benchmarks` runs all comparisons. training.py and decoding.py also run in a Python environment that
has the other toolkits instead of this project's dependencies. At import, they and harness.py need only torch and
numpy.
"""
