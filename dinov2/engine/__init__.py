"""Parts of any training: schedules, optimiser steps, checkpoints, progress, devices and signals.

Nothing in this folder knows the self-supervised method: it takes modules, numbers and anything with the named
configuration attributes.
"""

__all__: list[str] = []
