"""The release's eval commands."""

__all__: list[str] = []
