"""Image processors: `BitImageProcessor` and the names of its torchvision and PIL forms."""

from dinov2.hf.processing.bit import (
    BitImageProcessor,
    BitImageProcessorFast,
    BitImageProcessorPil,
    default_image_processor,
)
from dinov2.hf.processing.settings import BitSettings, UnknownSetting

__all__ = [
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitImageProcessorPil",
    "BitSettings",
    "UnknownSetting",
    "default_image_processor",
]
