"""Images in, batches out: data sets, decoding, augmentation, masks, collation, samplers and loaders.

The names that the public release offers here are importable from here. They are looked up on first use (PEP 562), so
that `import dinov2.data` costs nothing and one part can be used without importing the others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2.data.adapters import DatasetWithEnumeratedTargets
    from dinov2.data.augmentations import DataAugmentationDINO
    from dinov2.data.collate import collate_data_and_cast
    from dinov2.data.loaders import SamplerType, make_data_loader, make_dataset
    from dinov2.data.masking import MaskingGenerator

__all__ = [
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "MaskingGenerator",
    "SamplerType",
    "collate_data_and_cast",
    "make_data_loader",
    "make_dataset",
]

_MODULE_OF = {
    "DataAugmentationDINO": "augmentations",
    "DatasetWithEnumeratedTargets": "adapters",
    "MaskingGenerator": "masking",
    "SamplerType": "loaders",
    "collate_data_and_cast": "collate",
    "make_data_loader": "loaders",
    "make_dataset": "loaders",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
