"""What accompanies a training: evaluations on its schedule."""

__all__: list[str] = []
