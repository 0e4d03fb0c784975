"""The parts of `dinov2 convert`: what is written, how it is checked, and the page beside it."""

__all__: list[str] = []
