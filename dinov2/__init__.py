"""DINOv2: self-supervised vision transformers, from a folder of images to evaluated features.

Importing the package loads neither torch nor numpy, so that `dinov2 --help` answers at once; import the part you need
(`dinov2.models`, `dinov2.data`, `dinov2.train`, ...). `dinov2.load` is `dinov2.pretrained.load`, imported when it is
asked for. The only thing done here is to announce the public release's import paths that live elsewhere in this package
(`dinov2._moved`).
"""

from typing import TYPE_CHECKING

from dinov2._moved import install as _install_moved_paths

if TYPE_CHECKING:
    from dinov2.pretrained import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"

_install_moved_paths()


def __getattr__(name: str) -> object:
    if name == "load":
        from dinov2.pretrained import load

        return load
    raise AttributeError(f"module 'dinov2' has no attribute {name!r}")
