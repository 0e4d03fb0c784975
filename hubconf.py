"""What `torch.hub` offers of this repository: `torch.hub.load(<this folder or repository>, "dinov2_vits14")`.

The functions and their arguments are those of the public release.
"""

import importlib

from dinov2.hub.backbones import (
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)
from dinov2.hub.classifiers import (
    dinov2_vitb14_lc,
    dinov2_vitb14_reg_lc,
    dinov2_vitg14_lc,
    dinov2_vitg14_reg_lc,
    dinov2_vitl14_lc,
    dinov2_vitl14_reg_lc,
    dinov2_vits14_lc,
    dinov2_vits14_reg_lc,
)

__all__ = [
    "dinov2_vitb14",
    "dinov2_vitb14_lc",
    "dinov2_vitb14_reg",
    "dinov2_vitb14_reg_lc",
    "dinov2_vitg14",
    "dinov2_vitg14_lc",
    "dinov2_vitg14_reg",
    "dinov2_vitg14_reg_lc",
    "dinov2_vitl14",
    "dinov2_vitl14_lc",
    "dinov2_vitl14_reg",
    "dinov2_vitl14_reg_lc",
    "dinov2_vits14",
    "dinov2_vits14_lc",
    "dinov2_vits14_reg",
    "dinov2_vits14_reg_lc",
]

dependencies = ["torch"]


def __getattr__(name: str) -> object:
    # The release's entries for depth and text: importing their modules says why they are not here.
    if name.endswith(("_ld", "_dd")):
        return getattr(importlib.import_module("dinov2.hub.depthers"), name)
    if "_dinotxt_" in name:
        return getattr(importlib.import_module("dinov2.hub.dinotxt"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
