"""Imported first, so that what `pipeline` tells its libraries is told before a test imports one of them."""

import pipeline  # noqa: F401
