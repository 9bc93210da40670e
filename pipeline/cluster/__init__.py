"""Ray: the cluster, the check before a run, the workers of Ray Train, their progress and what they used.

Imports tracking/, training/, data/, common/ and Ray.
"""
