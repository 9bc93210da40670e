"""The ablations of Table 3: which rows, how they run, what they show."""

import pipeline  # noqa: F401  # first, for what it does when it is imported
