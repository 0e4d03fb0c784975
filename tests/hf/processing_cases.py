"""Side by side: the differences between our image processors and the installed transformers' own.

It is imported by the tests and by the scripts that they run under older versions.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from dinov2.hf.processing import BitImageProcessor
from tests.golden.recipe import images

RELEASED: dict[str, Any] = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# Height and width. No resized side leaves an excess of 3 modulo 4 over the crop: there the fast class of 4.56 cuts one
# pixel further than all others.
SIZES = ((90, 120), (200, 150), (64, 64), (20, 180))

CALLS: tuple[dict[str, Any], ...] = (
    {},
    {"size": {"height": 49, "width": 40}},
    {"size": {"shortest_edge": 30}, "crop_size": {"height": 41, "width": 28}},  # padded on all sides
    {"size": {"height": 33, "width": 90}, "crop_size": {"height": 40, "width": 41}},  # padded one way, cut the other
    {"do_resize": False},
    {"do_center_crop": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.1, 0.9], "image_std": [0.5, 0.4, 0.3]},
    {"resample": 0},
    {"resample": 2},
)


def smooth_picture(height: int, width: int) -> np.ndarray:
    """The test image by recipe, uint8 [H, W, 3]."""
    unit = (images(1, height, width)[0] + 1.5) / 3
    return (unit * 255).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def stock_class(backend: str) -> Any:
    """The class of the installed transformers that resizes with `backend`."""
    if hasattr(transformers, "BitImageProcessorPil"):
        return transformers.BitImageProcessor if backend == "torchvision" else transformers.BitImageProcessorPil
    return transformers.BitImageProcessorFast if backend == "torchvision" else transformers.BitImageProcessor


def inputs() -> dict[str, Any]:
    """One picture in the forms that every version accepts."""
    array = smooth_picture(50, 61)
    return {
        "PIL": Image.fromarray(array),
        "grey": Image.fromarray(array).convert("L"),
        "palette": Image.fromarray(array).convert("P"),
        "CMYK": Image.fromarray(array).convert("CMYK"),
        "black and white": Image.fromarray(array).convert("1"),
        "integers": Image.fromarray(array[..., 0].astype(np.int32)),
        "floats": Image.fromarray(array[..., 0].astype(np.float32)),
        "HWC": array,
        "CHW": np.ascontiguousarray(array.transpose(2, 0, 1)),
        "tensor": torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "float255": array.astype(np.float32),
        "int64": array.astype(np.int64),
        "batch": np.stack([array, array[::-1]]),
        "list": [array, Image.fromarray(array[::-1].copy())][:1],
    }


def difference(ours: Any, theirs: Any) -> float:
    """The largest absolute difference of two results; infinite when they are not even of one shape and type."""
    assert isinstance(ours, torch.Tensor)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max())


def differences(backend: str) -> dict[str, float]:
    """The difference of every case, by its name."""
    settings = {**RELEASED, "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    ours, theirs = BitImageProcessor(**settings, backend=backend), stock_class(backend)(**settings)
    found = {}
    for height, width in SIZES:
        picture = Image.fromarray(smooth_picture(height, width))
        for call in CALLS:
            pixels = [processor(picture, return_tensors="pt", **call).pixel_values for processor in (ours, theirs)]
            found[f"{height}x{width} {call}"] = difference(*pixels)
    for name, given in inputs().items():
        pixels = [processor(given, return_tensors="pt").pixel_values for processor in (ours, theirs)]
        found[name] = difference(*pixels)
    unit = smooth_picture(50, 61).astype(np.float32) / 255
    pixels = [processor(unit, do_rescale=False, return_tensors="pt").pixel_values for processor in (ours, theirs)]
    found["fractions"] = difference(*pixels)
    return found


def defaults_agree() -> dict[str, bool]:
    """Whether classes of the same name have the same settings, backend and pixels without being told anything."""
    from dinov2.hf import processing

    picture = Image.fromarray(smooth_picture(90, 120))
    found = {}
    for name in ("BitImageProcessor", "BitImageProcessorFast", "BitImageProcessorPil"):
        if not hasattr(transformers, name):
            continue
        ours, theirs = getattr(processing, name)(), getattr(transformers, name)()
        stock = theirs.to_dict()
        found[f"{name}: settings"] = all(plain(stock[key]) == value for key, value in ours.to_dict().items())
        found[f"{name}: kind"] = type(ours(picture).pixel_values[0]) is type(theirs(picture).pixel_values[0])
        pixels = [processor(picture, return_tensors="pt").pixel_values for processor in (ours, theirs)]
        found[f"{name}: pixels"] = difference(*pixels) <= 1e-5
    return found


def plain(value: Any) -> Any:
    """A tuple as a list, as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def files_are_exchanged(folder: Path) -> dict[str, bool]:
    """Whether stock reads what we wrote, and we what stock wrote, with equal settings and pixels."""
    from dinov2.hf import processing

    picture = Image.fromarray(smooth_picture(90, 120))
    found = {}
    for name in ("BitImageProcessor", "BitImageProcessorFast"):
        for writer, reader in ((processing, transformers), (transformers, processing)):
            written = getattr(writer, name)(**{**RELEASED, "crop_size": 84})
            place = folder / f"{writer.__name__}-{name}"
            written.save_pretrained(place)
            read = getattr(reader, name).from_pretrained(place)
            pixels = [processor(picture, return_tensors="pt").pixel_values for processor in (written, read)]
            found[place.name] = difference(*pixels) <= 1e-5 and pixels[0].shape[-2:] == (84, 84)
            found[f"{place.name}: crop"] = dict(read.crop_size) == {"height": 84, "width": 84}
        auto = transformers.AutoImageProcessor.from_pretrained(folder / f"dinov2.hf.processing-{name}")
        found[f"{name} through Auto"] = auto.crop_size["height"] == 84 and "dinov2" not in type(auto).__module__
    chosen = transformers.AutoImageProcessor.from_pretrained(folder / "dinov2.hf.processing-BitImageProcessor")
    found["default of Auto"] = type(chosen).__name__ == processing.default_image_processor().__name__
    return found
