"""Estimators on frozen features, and what the release's evaluation commands share.

Each method is a function from `Features` to `Result` rows; models, data sets and files belong to the callers.
"""

__all__: list[str] = []
