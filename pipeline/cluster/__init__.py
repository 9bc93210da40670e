"""Train on Ray: join or start a cluster, check it, run Ray Train's workers, show their progress, record their time.

Imports tracking/, training/, data/, common/ and Ray.
"""
