"""`BitImageProcessor`: transformers' image processor with the same names, arguments, files and pixels in all versions.

Steps are run by the installed transformers. What is added here: pictures are opened safely (`pictures`), wrong settings
are refused in one sentence, and what differs between versions follows the newest. The stock class of the same name
decides the backend:

| transformers | `BitImageProcessor` | `BitImageProcessorFast` | `BitImageProcessorPil` |
|---|---|---|---|
| before the classes were renamed (4.56, 5.2) | PIL | torchvision | PIL |
| since then (5.23) | torchvision | another name of `BitImageProcessor` | PIL |

`backend="pil"` or `"torchvision"`, for the object or for a call, says it outright. A None of the constructor or of a
file turns a step off (`do_resize`, ...) and is the default of any other setting; in a call it stands for the
processor's own setting.
"""

import functools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
import torchvision
import transformers
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from dinov2.checkpoints.adapters.huggingface import huggingface_preprocessor
from dinov2.data.eval_transform import middle_of_strip
from dinov2.errors import ConfigError, DataError, WeightsError
from dinov2.hf.pictures import ImageInput, ResizeBackend, list_pictures, to_pixels
from dinov2.hf.processor_settings import BitSettings, Size, by_name, refuse_unknown_settings, standard

__all__ = [
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitImageProcessorPil",
    "default_image_processor",
]

_HAS_CLASS_PER_BACKEND = hasattr(transformers, "BitImageProcessorPil")
_NAMES = tuple(BitSettings.__annotations__)
_STORED = tuple(name for name in _NAMES if name != "backend")
_ALWAYS_WRITTEN = _NAMES[: _NAMES.index("return_tensors")]
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_MODES = {
    Resampling.NEAREST: InterpolationMode.NEAREST_EXACT,  # the one that PIL's nearest is
    Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Resampling.LANCZOS: InterpolationMode.LANCZOS,
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Files hold these beside settings; they name classes and are written anew or not at all.
_SERVICE = {"image_processor_type", "feature_extractor_type", "processor_class"}
# What `from_pretrained`, the Auto classes and pipelines hand down and no setting is.
_LOADING = {"trust_remote_code", "code_revision", "config", "dtype", "torch_dtype", "resume_download", "use_auth_token"}
_PLACES = {
    "cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder",
    "image_processor_filename", "_from_pipeline", "_from_auto", "resume_download",
}  # fmt: skip
_PATCHES = {"dinov2": 14, "dinov2_with_registers": 16}


class BitImageProcessor(transformers.BitImageProcessor):  # type: ignore[misc]
    """Images to normalised pixels `[B, 3, H, W]`: to RGB, resize, centre crop, scale, normalise.

    The settings are those of `BitSettings`, here for all calls and in `preprocess` for one; the defaults (shorter side
    224, crop 224, bicubic, the statistics of CLIP) are the stock class's. DINOv2's own files say 256, 224 and
    ImageNet's statistics, and `from_pretrained` of a model folder without such a file takes those too. Subclasses may
    set other defaults as class attributes.
    """

    # Not inherited: some versions have them as defaults of the constructor.
    do_resize = True
    size = Size(shortest_edge=224)
    resample = Resampling.BICUBIC
    do_center_crop = True
    crop_size = Size(height=224, width=224)
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = _CLIP_MEAN
    image_std = _CLIP_STD
    do_convert_rgb = True
    default_to_square = False
    do_pad = False

    _backend: ResizeBackend = "torchvision" if _HAS_CLASS_PER_BACKEND else "pil"

    def __init__(self, *values: object, **settings: Unpack[BitSettings]) -> None:
        settings_alone = {name: value for name, value in settings.items() if name not in _SERVICE}
        table = by_name(values, settings_alone, what=type(self).__name__)
        given = {name: value for name, value in table.items() if value is not None or name.startswith("do_")}
        super().__init__()
        self._backend = standard({"backend": given.pop("backend", type(self)._backend)})["backend"]
        defaults = {name: getattr(type(self), name, None) for name in _STORED}
        for name, value in standard({**defaults, **given}).items():
            setattr(self, name, value)

    @property
    def backend(self) -> str:
        """Backend of resizing: "torchvision" or "pil"."""
        return self._backend

    @property
    def is_fast(self) -> bool:
        """Whether the backend is torchvision, in the words of transformers 4."""
        return self._backend == "torchvision"

    def __call__(self, images: object, *values: object, **settings: Unpack[BitSettings]) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, *values, **settings)

    def preprocess(self, images: object, *values: object, **settings: Unpack[BitSettings]) -> BatchFeature:
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
        chosen = standard({**{name: getattr(self, name, None) for name in _NAMES}, **given})
        pixels = _run_steps([_prepare(picture, chosen) for picture in list_pictures(images)], chosen)
        if chosen["do_pad"]:
            pixels = _pad(pixels, chosen["pad_size"])
        if chosen["data_format"] == "channels_last":
            pixels = [one.movedim(-3, -1) for one in pixels]
        return _feature(pixels, chosen)

    def resize(
        self, image: ImageInput, size: object, resample: object = None, *, input_data_format: str | None = None
    ) -> ImageInput:
        """One array or tensor, `[C, H, W]`, `[H, W, C]` or `[H, W]`, at another `size`, in the same layout.

        For direct use: `preprocess` does not come by here, so that overriding it in a subclass changes nothing else.
        """
        resample = self.resample if resample is None else resample
        chosen = standard({"size": size, "resample": resample, "input_data_format": input_data_format})
        pixels = to_pixels(image, rgb=False, backend=self._backend, input_data_format=chosen["input_data_format"])
        (result,) = _run_steps([pixels], {**chosen, "do_resize": True, "backend": self._backend})
        if isinstance(image, Image.Image) or (image.ndim == 3 and pixels.shape != tuple(image.shape)):
            result = result.permute(1, 2, 0)  # was given with its channels last
        elif image.ndim == 2:
            result = result[0]
        return result if isinstance(image, Tensor) else result.numpy()

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
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
            return settings, {name: value for name, value in kwargs.items() if name not in _PLACES}

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
        unused = {name: value for name, value in overrides.items() if name not in _NAMES}
        if not return_unused:
            unknown = [name for name in unused if name not in _LOADING and not name.startswith("_")]
            refuse_unknown_settings(unknown, what=f"{cls.__name__}.from_pretrained")
        chosen = {name: value for name, value in overrides.items() if name in _NAMES}
        processor = cls(
            **{**{name: value for name, value in image_processor_dict.items() if name in _STORED}, **chosen}
        )
        for name, value in image_processor_dict.items():
            if name not in _NAMES and name not in _SERVICE and not hasattr(cls, name):
                setattr(processor, name, value)
        return (processor, unused) if return_unused else processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """A processor with the settings of one JSON file."""
        processor: Self = cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))
        return processor

    def to_dict(self) -> dict[str, Any]:
        """The settings as every version of transformers reads them; the backend is not among them."""
        own = standard({name: getattr(self, name, None) for name in _STORED})
        default = standard({name: getattr(BitImageProcessor, name, None) for name in _STORED})
        written = {
            name: value for name, value in own.items() if name in _ALWAYS_WRITTEN or value not in (None, default[name])
        }
        extras = {key: value for key, value in vars(self).items() if key not in own and not key.startswith("_")}
        plain = {name: _plain(value) for name, value in {**extras, **written}.items()}
        return {**plain, "image_processor_type": type(self).__name__.removesuffix("Pil")}


class BitImageProcessorPil(BitImageProcessor):
    """`BitImageProcessor` with PIL as its backend: the pixels of the published evaluations, whatever is installed."""

    _backend: ResizeBackend = "pil"


def _fast_class() -> type[BitImageProcessor]:
    if _HAS_CLASS_PER_BACKEND:
        return BitImageProcessor
    # The Auto classes of those versions sort processors by this base, and ask for their slow counterpart.
    body = {
        "__doc__": "`BitImageProcessor` with torchvision as its backend, as transformers named it until version 5.",
        "__module__": __name__,
        "_backend": "torchvision",
        "slow_image_processor_class": BitImageProcessor,
    }
    from transformers.image_processing_utils_fast import BaseImageProcessorFast

    made: type[BitImageProcessor] = type("BitImageProcessorFast", (BitImageProcessor, BaseImageProcessorFast), body)
    return made


BitImageProcessorFast: type[BitImageProcessor] = _fast_class()
"""The torchvision form by the name of transformers 4; `BitImageProcessor` itself where the classes were renamed."""


def default_image_processor() -> type[BitImageProcessor]:
    """The counterpart of what the installed `AutoImageProcessor` makes of a file that names `BitImageProcessor`."""
    before_5 = int(transformers.__version__.partition(".")[0]) < 5
    return BitImageProcessor if before_5 else BitImageProcessorFast


def _prepare(picture: ImageInput, chosen: Mapping[str, Any]) -> Tensor:
    """The pixels `[C, H, W]` that the steps begin with; a long strip without the ends that the crop cuts off."""
    backend = chosen["backend"]
    pixels = to_pixels(
        picture, rgb=chosen["do_convert_rgb"], backend=backend, input_data_format=chosen["input_data_format"]
    )
    if chosen["do_rescale"] and chosen["rescale_factor"] == 1 / 255:
        _warn_of_unit_floats(picture, pixels)
    if chosen["do_normalize"]:
        for values in (chosen["image_mean"], chosen["image_std"]):
            if isinstance(values, tuple) and len(values) not in (1, len(pixels)):
                raise ConfigError(
                    f"image_mean and image_std hold {len(values)} values for an image of {len(pixels)} channels; "
                    "give one for each, or leave do_convert_rgb on"
                )
    if chosen["device"] is not None and backend == "torchvision":
        pixels = pixels.to(chosen["device"])
    if chosen["do_resize"] and chosen["do_center_crop"]:
        size, crop = chosen["size"], chosen["crop_size"]
        if max(crop.values()) <= (size.shortest_edge or 0) and not size.longest_edge:
            return middle_of_strip(pixels, *pixels.shape[-2:])
    return pixels


def _warn_of_unit_floats(picture: ImageInput, pixels: Tensor) -> None:
    if isinstance(picture, Image.Image) or not pixels.is_floating_point():
        return
    low, high = (float(end) for end in pixels.detach().aminmax())
    if 0 <= low < high <= 1:
        warnings.warn(
            f"an image of floats from {low:.4g} to {high:.4g} is divided by 255 once more; give do_rescale=False for "
            "values of 0..1, or values of 0..255",
            UserWarning,
            stacklevel=6,
        )


def _run_steps(pixels: list[Tensor], chosen: Mapping[str, Any]) -> list[Tensor]:
    """Resize, crop, scale and normalise each `[C, H, W]`, by the stock class of the backend."""
    steps = {name: bool(chosen.get(name)) for name in _STEPS}
    settings = {name: chosen[name] for name in ("rescale_factor", "image_mean", "image_std") if name in chosen}
    if steps["do_center_crop"]:
        settings["crop_size"] = dict(chosen["crop_size"])
    if steps["do_resize"]:
        # The rarer spellings of a size are not known to every version.
        sizes = [_resized_size(chosen["size"], one) for one in pixels]
        resample = chosen["resample"]
        if chosen["backend"] == "torchvision":
            pixels = [_resize(one, size, resample) for one, size in zip(pixels, sizes, strict=True)]
            steps["do_resize"] = False
        elif any(size != sizes[0] for size in sizes):
            return [
                _run_stock("pil", [one], size=size, resample=resample, **steps, **settings)[0]
                for one, size in zip(pixels, sizes, strict=True)
            ]
        else:
            settings.update(size=sizes[0], resample=resample)
    return _run_stock(chosen["backend"], pixels, **steps, **settings)


def _resize(pixels: Tensor, size: dict[str, int], resample: Resampling) -> Tensor:
    """As the stock class, which copies the image first; by PIL where torchvision has no such filter for it."""
    if _can_torchvision(resample, pixels):
        sides = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
        return resize(pixels, sides, interpolation=_MODES[resample], antialias=True)
    alone = {**dict.fromkeys(_STEPS, False), "do_resize": True}
    (resized,) = _run_stock("pil", [pixels.detach().cpu()], size=size, resample=resample, **alone)
    return resized.to(pixels.device)


def _resized_size(size: Size, pixels: Tensor) -> dict[str, int]:
    height, width = pixels.shape[-2:]
    if size.longest_edge:
        height, width = get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    elif size.max_height:
        height, width = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    else:
        return dict(size)
    return {"height": max(1, height), "width": max(1, width)}


def _can_torchvision(resample: Resampling, pixels: Tensor) -> bool:
    """Whether torchvision has the filter for these pixels; PIL computes the others in its place."""
    if resample == Resampling.LANCZOS:
        version = tuple(int(part) for part in torchvision.__version__.split(".")[:2])
        return version >= (0, 27) and pixels.device.type == "cpu"
    return resample in _MODES


@functools.cache
def _stock(backend: ResizeBackend) -> transformers.BitImageProcessor:
    if _HAS_CLASS_PER_BACKEND:
        return transformers.BitImageProcessor() if backend == "torchvision" else transformers.BitImageProcessorPil()
    return transformers.BitImageProcessorFast() if backend == "torchvision" else transformers.BitImageProcessor()


def _run_stock(backend: ResizeBackend, pixels: list[Tensor], **settings: object) -> list[Tensor]:
    images = [one.numpy() for one in pixels] if backend == "pil" else pixels
    try:
        done = _stock(backend).preprocess(
            images, do_convert_rgb=False, input_data_format="channels_first", return_tensors=None, **settings
        )
    except ValueError as error:
        low, high = min(float(one.min()) for one in pixels), max(float(one.max()) for one in pixels)
        raise DataError(
            f"PIL resizes values 0 to 255, or fractions 0 to 1, and these are {low:g} to {high:g}; "
            'give such images with do_resize=False or backend="torchvision"'
        ) from error
    return [torch.as_tensor(one) for one in done["pixel_values"]]


def _pad(images: Sequence[Tensor], size: Size | None) -> list[Tensor]:  # of [C, H, W]
    """The images with zeros at the bottom and right, up to `size` or to the largest of them."""
    heights, widths = zip(*(image.shape[-2:] for image in images), strict=True)
    height, width = (size["height"], size["width"]) if size else (max(heights), max(widths))
    if max(heights) > height or max(widths) > width:
        raise ConfigError(f"images of up to {max(heights)}x{max(widths)} do not fit pad_size {height}x{width}")
    return [pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]


def _feature(pixels: list[Tensor], chosen: Mapping[str, Any]) -> BatchFeature:
    kind, device = chosen["return_tensors"], chosen["device"]
    if kind is None:
        return BatchFeature(
            data={"pixel_values": [one.numpy() for one in pixels] if chosen["backend"] == "pil" else pixels}
        )
    shapes = sorted({tuple(one.shape) for one in pixels})
    if len(shapes) > 1:
        raise ConfigError(
            f"images of the shapes {', '.join(map(str, shapes))} are no one tensor; leave do_center_crop on, give "
            "do_pad=True or a size of height and width, or take a list by leaving return_tensors out"
        )
    batch = torch.stack(pixels)  # [B, C, H, W]
    if kind == "pt":
        return BatchFeature(data={"pixel_values": batch if device is None else batch.to(device)})
    return BatchFeature(data={"pixel_values": batch.cpu().numpy()}, tensor_type=None if kind == "np" else kind)


def _plain(value: object) -> object:
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
