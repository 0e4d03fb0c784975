"""Images of a data set through a frozen model: tokens, streams of features, features on disk."""

__all__: list[str] = []
