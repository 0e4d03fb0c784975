"""The release's training commands."""

__all__: list[str] = []
