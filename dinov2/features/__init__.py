"""What is measured on frozen features."""

__all__: list[str] = []
