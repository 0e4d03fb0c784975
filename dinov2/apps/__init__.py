"""What the commands do, as functions with plain arguments and return values; nothing here parses or exits."""

__all__: list[str] = []
