"""`BitImageProcessor`: the image processor that DINOv2's repositories name, with the same settings, files and pixels.

It is transformers' class by its names, arguments and results, under every version from 4.56 on; the pixels are computed
here (`pixels`). What the installed version's class of the same name would do decides the backend:

| transformers | `BitImageProcessor` | `BitImageProcessorFast` | `BitImageProcessorPil` |
|---|---|---|---|
| before the classes were renamed (4.56, 5.2) | PIL | torchvision | PIL |
| since then (5.23) | torchvision | another name of `BitImageProcessor` | PIL |

`backend="pil"` or `"torchvision"`, for the object or for a call, says it outright. Where versions disagree the newest
is followed. A None of the constructor or of a file turns a step off (`do_resize`, ...) and is the default of any other
setting; in a call it stands for the processor's own setting, as in transformers 4.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
import transformers
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from dinov2.checkpoints.adapters.huggingface import huggingface_preprocessor
from dinov2.data.eval_transform import middle_of_strip
from dinov2.errors import ConfigError, WeightsError
from dinov2.hf.processing.pixels import (
    center_crop,
    list_pictures,
    pad,
    pixels_of,
    rescale_and_normalize,
    resize,
)
from dinov2.hf.processing.settings import SWITCHES, Backend, BitSettings, Size, by_name, refuse_unknown, standard

__all__ = ["BitImageProcessor", "BitImageProcessorFast", "BitImageProcessorPil", "default_image_processor"]

_ONE_CLASS_PER_BACKEND = find_spec("transformers.image_processing_backends") is not None
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Written to every file; any other setting only where it is not the default.
_ALWAYS_WRITTEN = (
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std "
    "do_convert_rgb"
).split()
# Files hold these beside settings; they name classes and are written anew or not at all.
_SERVICE = {"image_processor_type", "feature_extractor_type", "processor_class"}
# What `from_pretrained`, the Auto classes and pipelines hand down and no setting is.
_LOADING = {"trust_remote_code", "code_revision", "config", "dtype", "torch_dtype", "resume_download", "use_auth_token"}
_PATCHES = {"dinov2": 14, "dinov2_with_registers": 16}


class BitImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Images to normalised pixels `[B, 3, H, W]`: to RGB, resize, centre crop, scale, normalise.

    The settings are those of `BitSettings`, here for all calls and in `preprocess` for one; the defaults (shorter side
    224, crop 224, bicubic, the statistics of CLIP) are the stock class's. DINOv2's own files say 256, 224 and
    ImageNet's statistics, and `from_pretrained` of a model folder without such a file takes those too. Subclasses may
    set other defaults as class attributes.
    """

    model_input_names: Any = ["pixel_values"]  # noqa: RUF012 (a list in the stock class)
    valid_kwargs: Any = BitSettings

    do_resize: Any = True
    size: Any = Size(shortest_edge=224)
    resample: Any = Resampling.BICUBIC
    do_center_crop: Any = True
    crop_size: Any = Size(height=224, width=224)
    do_rescale: Any = True
    rescale_factor: Any = 1 / 255
    do_normalize: Any = True
    image_mean: Any = _CLIP_MEAN
    image_std: Any = _CLIP_STD
    do_convert_rgb: Any = True
    default_to_square: Any = False
    do_pad: Any = False

    _backend: Backend = "torchvision" if _ONE_CLASS_PER_BACKEND else "pil"

    def __init__(self, *values: Any, **settings: Unpack[BitSettings]) -> None:
        kept = {name: value for name, value in settings.items() if name not in _SERVICE}
        table = by_name(values, kept, what=type(self).__name__)
        given = {name: value for name, value in table.items() if value is not None or name in SWITCHES}
        BaseImageProcessor.__init__(self)  # not super(): the older fast base between would set its own defaults
        self._backend = standard({"backend": given.pop("backend", type(self)._backend)})["backend"]
        own = {name: getattr(type(self), name, None) for name in BitSettings.__annotations__ if name != "backend"}
        for name, value in standard({**own, **given}).items():
            setattr(self, name, value)

    @property
    def backend(self) -> str:
        """Who resizes: "torchvision" or "pil"."""
        return self._backend

    @property
    def is_fast(self) -> bool:
        """Whether the backend is torchvision, in the words of transformers 4."""
        return self._backend == "torchvision"

    def __call__(self, images: Any, *values: Any, **settings: Unpack[BitSettings]) -> Any:
        """The same as `preprocess`."""
        return self.preprocess(images, *values, **settings)

    def preprocess(self, images: Any, *values: Any, **settings: Unpack[BitSettings]) -> Any:
        """Pixels of one image or many, under `pixel_values` of a `BatchFeature`.

        `images`: PIL of any mode, arrays or tensors `[H, W]`, `[H, W, C]`, `[C, H, W]` or with a batch in front, paths,
        addresses, or (nested) lists of them. Any setting may be given for this call, by name or in the order of
        `BitSettings`. The result is a list of `[C, H, W]` (tensors, or arrays from PIL), and with `return_tensors` one
        `[B, C, H, W]` tensor ("pt"), array ("np") or whatever else the installed transformers converts to.

        Raises `UnknownSetting` (a `TypeError`), `ConfigError` for values that do not fit or sizes that do not stack,
        `DataError` for what is no image.
        """
        table = by_name(values, settings, what=f"{type(self).__name__}.preprocess")
        given = {name: value for name, value in table.items() if value is not None}
        own = {name: getattr(self, name, None) for name in BitSettings.__annotations__}
        chosen = standard({**own, **given})
        pixels = [self._fitted(picture, chosen) for picture in list_pictures(images)]  # each [C, h, w]
        stacked = all(one.shape == pixels[0].shape and one.dtype == pixels[0].dtype for one in pixels)
        if stacked:  # normalised in one go
            pixels = list(_normalised(torch.stack(pixels), chosen))
        else:
            pixels = [_normalised(one, chosen) for one in pixels]
        if chosen["do_pad"]:
            pixels = pad(pixels, chosen["pad_size"])
        if chosen["data_format"] == "channels_last":
            pixels = [one.movedim(-3, -1) for one in pixels]
        return _feature(pixels, chosen["return_tensors"], backend=chosen["backend"], device=chosen["device"])

    @staticmethod
    def _fitted(picture: Any, chosen: Mapping[str, Any]) -> Tensor:
        backend = chosen["backend"]
        pixels = pixels_of(
            picture, rgb=chosen["do_convert_rgb"], backend=backend, input_data_format=chosen["input_data_format"]
        )
        if chosen["do_rescale"] and chosen["rescale_factor"] == 1 / 255:
            _warn_of_unit_floats(picture, pixels)
        if chosen["device"] is not None and backend == "torchvision":
            pixels = pixels.to(chosen["device"])
        if chosen["do_resize"]:
            size, crop = chosen["size"], chosen["crop_size"] if chosen["do_center_crop"] else None
            if crop and max(crop.height, crop.width) <= (size.shortest_edge or 0) and not size.longest_edge:
                pixels = middle_of_strip(pixels, *pixels.shape[-2:])
            pixels = resize(pixels, chosen["size"], chosen["resample"], backend)
        return center_crop(pixels, chosen["crop_size"], backend) if chosen["do_center_crop"] else pixels

    def resize(self, image: Any, size: Any, resample: Any = None, *, input_data_format: Any = None) -> Any:
        """One array or tensor, `[C, H, W]`, `[H, W, C]` or `[H, W]`, at another `size`, in the same layout.

        For direct use: `preprocess` does not come by here, so that overriding it in a subclass changes nothing else.
        """
        resample = self.resample if resample is None else resample
        chosen = standard({"size": size, "resample": resample, "input_data_format": input_data_format})
        pixels = pixels_of(image, rgb=False, backend=self._backend, input_data_format=chosen["input_data_format"])
        result = resize(pixels, chosen["size"], chosen["resample"], self._backend)
        if image.ndim == 2:
            result = result[0]
        elif pixels.shape != tuple(image.shape):  # was given with its channels last
            result = result.permute(1, 2, 0)
        return result if isinstance(image, Tensor) else result.numpy()

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings in a folder or repository, and the arguments that were not used to find them.

        A folder of a DINOv2 model that holds no settings has those of the released repositories, cropped to the
        model's own image size where that is below 224.
        """
        try:
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except OSError:
            settings = _released_settings(Path(pretrained_model_name_or_path) / kwargs.get("subfolder", ""))
            if settings is None:
                raise
            places = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
            ours = {*places, "image_processor_filename", "_from_pipeline", "_from_auto", "resume_download"}
            return settings, {name: value for name, value in kwargs.items() if name not in ours}

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """A processor with the settings of a file, some of them overridden.

        Entries of the file that are no settings are kept as attributes. With `return_unused_kwargs` the overrides that
        are none come back beside the processor; without, they are refused (`UnknownSetting`). `use_fast`, as older
        programs say, chooses the backend.
        """
        return_unused = overrides.pop("return_unused_kwargs", False)
        fast = overrides.pop("use_fast", None)
        if fast is not None:
            overrides.setdefault("backend", "torchvision" if fast else "pil")
        names = BitSettings.__annotations__
        unused = {name: value for name, value in overrides.items() if name not in names}
        if not return_unused:
            unknown = [name for name in unused if name not in _LOADING and not name.startswith("_")]
            refuse_unknown(unknown, what=f"{cls.__name__}.from_pretrained")
        chosen = {name: value for name, value in overrides.items() if name in names}
        kept = {name: value for name, value in image_processor_dict.items() if name in names and name != "backend"}
        processor = cls(**{**kept, **chosen})
        for name, value in image_processor_dict.items():
            if name not in names and name not in _SERVICE and not hasattr(cls, name):
                setattr(processor, name, value)
        return (processor, unused) if return_unused else processor

    @classmethod
    def from_json_file(cls, json_file: Any) -> Self:
        """A processor with the settings of one JSON file."""
        processor: Self = cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))
        return processor

    def to_dict(self) -> dict[str, Any]:
        """The settings as every version of transformers reads them; the backend is not among them."""
        names = [name for name in BitSettings.__annotations__ if name != "backend"]
        own = standard({name: getattr(self, name, None) for name in names})
        default = standard({name: getattr(BitImageProcessor, name, None) for name in names})
        written = {
            name: value for name, value in own.items() if name in _ALWAYS_WRITTEN or value not in (None, default[name])
        }
        extras = {key: value for key, value in vars(self).items() if key not in own and not key.startswith("_")}
        plain = {name: _plain(value) for name, value in {**extras, **written}.items()}
        return {**plain, "image_processor_type": type(self).__name__.removesuffix("Pil")}


class BitImageProcessorPil(BitImageProcessor):
    """`BitImageProcessor` with PIL as its backend: the pixels of the published evaluations, whatever is installed."""

    _backend: Backend = "pil"


def _fast_class() -> type[BitImageProcessor]:
    if _ONE_CLASS_PER_BACKEND:
        return BitImageProcessor
    from transformers.image_processing_utils_fast import BaseImageProcessorFast

    # The Auto classes of those versions sort processors by this base, and ask for their slow counterpart.
    body = {
        "__doc__": "`BitImageProcessor` with torchvision as its backend, as transformers named it until version 5.",
        "__module__": __name__,
        "_backend": "torchvision",
        "slow_image_processor_class": BitImageProcessor,
    }
    made: type[BitImageProcessor] = type("BitImageProcessorFast", (BitImageProcessor, BaseImageProcessorFast), body)
    return made


BitImageProcessorFast: type[BitImageProcessor] = _fast_class()
"""The torchvision form by the name of transformers 4; `BitImageProcessor` itself where the classes were renamed."""


def default_image_processor() -> type[BitImageProcessor]:
    """The counterpart of what the installed `AutoImageProcessor` makes of a file that names `BitImageProcessor`."""
    before_5 = int(transformers.__version__.partition(".")[0]) < 5
    return BitImageProcessor if before_5 else BitImageProcessorFast


def _warn_of_unit_floats(picture: Any, pixels: Tensor) -> None:
    if isinstance(picture, Image.Image) or not pixels.is_floating_point():
        return
    low, high = (float(end) for end in pixels.detach().aminmax())
    if 0 <= low < high <= 1:
        warnings.warn(
            f"an image of floats from {low:.4g} to {high:.4g} is divided by 255 once more; give do_rescale=False for "
            "values of 0..1, or values of 0..255",
            UserWarning,
            stacklevel=5,
        )


def _normalised(pixels: Tensor, chosen: Mapping[str, Any]) -> Tensor:
    return rescale_and_normalize(
        pixels,
        factor=chosen["rescale_factor"] if chosen["do_rescale"] else None,
        statistics=(chosen["image_mean"], chosen["image_std"]) if chosen["do_normalize"] else None,
        backend=chosen["backend"],
    )


def _feature(pixels: Sequence[Tensor], kind: str | None, *, backend: Backend, device: Any) -> Any:
    if kind is None:
        return BatchFeature(data={"pixel_values": [one.numpy() for one in pixels] if backend == "pil" else [*pixels]})
    shapes = sorted({tuple(one.shape) for one in pixels})
    if len(shapes) > 1:
        raise ConfigError(
            f"images of the shapes {', '.join(map(str, shapes))} are no one tensor; leave do_center_crop on, give "
            "do_pad=True or a size of height and width, or take a list by leaving return_tensors out"
        )
    batch = torch.stack(list(pixels))  # [B, C, H, W]
    if kind == "pt":
        return BatchFeature(data={"pixel_values": batch if device is None else batch.to(device)})
    array: np.ndarray = batch.cpu().numpy()
    return BatchFeature(data={"pixel_values": array}, tensor_type=None if kind == "np" else kind)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Resampling):
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def _released_settings(folder: Path) -> dict[str, Any] | None:
    """The released settings for the model in `folder`, or None where there is none of this family."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        patch = config.get("patch_size", _PATCHES[config["model_type"]])
        sides = [config.get("image_size", 224), patch]
        image, patch = (int(min(side) if isinstance(side, list) else side) for side in sides)
        return huggingface_preprocessor(image, patch_size=patch, in_chans=config.get("num_channels", 3))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WeightsError):
        return None
