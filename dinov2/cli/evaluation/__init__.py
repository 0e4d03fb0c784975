"""The tasks of `dinov2 eval`, a module for each kind."""

__all__: list[str] = []
