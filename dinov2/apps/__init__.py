"""The work of the commands, as functions of plain arguments; nothing here parses or exits."""

__all__: list[str] = []
