"""The page that compares models on one data set: what it is told, its pieces, its frame."""

__all__: list[str] = []
