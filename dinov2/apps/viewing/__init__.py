"""The parts of `dinov2 viz`: what a model sees in one image, and how its colours are to be read."""

__all__: list[str] = []
