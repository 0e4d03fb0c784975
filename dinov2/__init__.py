"""DINOv2: self-supervised vision transformers, from a folder of images to evaluated features.

Importing the package loads neither torch nor numpy, so that `dinov2 --help` answers at once; import the part you need
(`dinov2.models`, `dinov2.data`, `dinov2.train`, ...). The only thing done here is to announce the public release's
import paths that live elsewhere in this package (`dinov2._moved`).
"""

from dinov2._moved import install as _install_moved_paths

__all__ = ["__version__"]

__version__ = "0.1.0"

_install_moved_paths()
