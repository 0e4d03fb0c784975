"""`python -m dinov2`: the same as the command `dinov2`."""

import sys

from dinov2.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
