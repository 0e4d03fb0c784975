"""The entries of `torch.hub`, by their published names; `hubconf.py` beside the package offers them.

Everything here needs torch alone.
"""

__all__: list[str] = []
