"""Images in, batches out: data sets, decoding, augmentation, masks, collation, samplers and loaders.

The names that the public release offers here are importable from here. They are looked up on first use (PEP 562), so
that `import dinov2.data` costs nothing and one part can be used without importing the others.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov2.data.crops.masking import MaskingGenerator
    from dinov2.data.loaders import make_dataset
    from dinov2.data.release import (
        DataAugmentationDINO,
        DatasetWithEnumeratedTargets,
        SamplerType,
        collate_data_and_cast,
        make_data_loader,
    )

__all__ = [
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "MaskingGenerator",
    "SamplerType",
    "collate_data_and_cast",
    "make_data_loader",
    "make_dataset",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    module = {"make_dataset": "loaders", "MaskingGenerator": "crops.masking"}.get(name, "release")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
