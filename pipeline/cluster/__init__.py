"""Ray: the cluster, the check before a run, the workers of Ray Train, their progress, the accounting of their time.

Imports tracking/, training/, data/, common/ and Ray.
"""
