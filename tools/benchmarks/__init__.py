"""How fast training, decoding, data, start and orchestration are, compared with other toolkits.

`python -m tools.benchmarks` runs all comparisons. training.py and decoding.py also run in an environment that has
other toolkits instead of this project's dependencies: at import they and harness.py use nothing but torch and numpy.
"""
