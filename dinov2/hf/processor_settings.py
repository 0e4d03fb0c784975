"""The settings of an image processor: their names, the one form each is brought to, and what is refused."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, get_args

import torch
from PIL.Image import Resampling
from torchvision.transforms.v2 import InterpolationMode

from dinov2.errors import ConfigError
from dinov2.hf.pictures import ResizeBackend

__all__ = [
    "BitSettings",
    "Size",
    "UnknownSetting",
    "by_name",
    "refuse_unknown_settings",
    "standard",
]

_SIZE_KEYS = (
    ("shortest_edge",),
    ("height", "width"),
    ("shortest_edge", "longest_edge"),
    ("max_height", "max_width"),
)


class UnknownSetting(ConfigError, TypeError):
    """A keyword that no version of the image processor has; a `TypeError` too, as Python's own refusal is."""


class Size(dict[str, int]):
    """A size as the files spell it, such as `{"shortest_edge": 256}`, whose entries are attributes as well."""

    def __getattr__(self, name: str) -> int | None:
        if any(name in keys for keys in _SIZE_KEYS):
            return self.get(name)
        raise AttributeError(f"a size has no {name!r}; it has {', '.join(self)}")


class BitSettings(TypedDict, total=False):
    """Every setting, for the constructor and for a single call. None stands for the default or the processor's own.

    The only list of names. Its order is the positional order of transformers 4, up to `input_data_format`.
    """

    do_resize: bool | None
    size: int | Sequence[int] | Mapping[str, int] | None
    resample: Resampling | InterpolationMode | int | str | None
    do_center_crop: bool | None
    crop_size: int | Sequence[int] | Mapping[str, int] | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: float | Sequence[float] | None
    image_std: float | Sequence[float] | None
    do_convert_rgb: bool | None
    return_tensors: str | None  # "pt", "np", or None for a list
    data_format: str | None  # "channels_first" or "channels_last", of the result
    input_data_format: str | None  # the same of arrays and tensors that are given
    default_to_square: bool | None
    do_pad: bool | None
    pad_size: int | Sequence[int] | Mapping[str, int] | None
    device: str | torch.device | None
    disable_grouping: bool | None  # without effect: it changes no pixel
    image_seq_length: int | None  # without effect, as in the stock class
    backend: ResizeBackend | None


_NAMES = tuple(BitSettings.__annotations__)
_POSITIONAL = _NAMES[: _NAMES.index("default_to_square")]
_SWITCHES = tuple(name for name in _NAMES if name.startswith("do_"))


def by_name(values: tuple[object, ...], settings: Mapping[str, object], *, what: str) -> dict[str, object]:
    """Positional values and keywords as one table of settings."""
    refuse_unknown_settings(settings, what=what)
    if len(values) > len(_POSITIONAL):
        raise UnknownSetting(f"{what} takes {len(_POSITIONAL)} settings by position and got {len(values)}; name them")
    given = dict(zip(_POSITIONAL, values, strict=False))
    if twice := sorted(given.keys() & settings.keys()):
        raise UnknownSetting(f"{what} got {twice[0]} twice, by position and by name; give it once")
    return {**given, **settings}


def refuse_unknown_settings(names: Iterable[str], *, what: str) -> None:
    """Raise `UnknownSetting`, with the nearest setting, for the first name that is none."""
    for name in names:
        if name not in _NAMES:
            nearest = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.0)[0]
            raise UnknownSetting(f"{what} has no setting {name!r}; the nearest is {nearest!r}")


def standard(settings: Mapping[str, object]) -> dict[str, Any]:
    """The same settings in one form: sizes as `Size`, filters as `Resampling`, statistics as tuples, plain strings.

    An int is the shorter side for `size` (or a square with `default_to_square`), a square for `crop_size`. Raises
    `ConfigError` for a value that a setting cannot have.
    """
    choices = {
        "backend": get_args(ResizeBackend),
        "data_format": ("channels_first", "channels_last"),
        "input_data_format": ("channels_first", "channels_last", "none"),
    }
    square = {"size": bool(settings.get("default_to_square")), "crop_size": True, "pad_size": True}
    result = dict(settings)
    for name, value in settings.items():
        if value is None:
            continue
        if name in square:
            result[name] = _size(name, value, square=square[name])
        elif name == "resample":
            result[name] = _filter(value)
        elif name in ("image_mean", "image_std"):
            result[name] = _statistics(name, value)
        elif name in ("return_tensors", *choices):
            value = result[name] = getattr(value, "value", value)  # transformers has enumerations for them
            if value not in choices.get(name, (value,)):
                what = "no image backend is called" if name == "backend" else f"{name} is"
                raise ConfigError(f"{what} {value!r}; choose one of {', '.join(choices[name])}")
        elif name in _SWITCHES and not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; write True or False")
    return result


def _size(name: str, value: Any, *, square: bool) -> Size:
    if isinstance(value, int) and not isinstance(value, bool):
        size = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        size = {"height": value[0], "width": value[1]}
    else:
        try:
            size = {key: side for key, side in dict(value).items() if side is not None}
        except (TypeError, ValueError):
            size = {}
    allowed = (("height", "width"),) if name != "size" else _SIZE_KEYS
    are_sides_whole = all(isinstance(side, int) and side > 0 for side in size.values())
    if not are_sides_whole or not any(set(size) == set(keys) for keys in allowed):
        forms = " or ".join("{" + ", ".join(f'"{key}": ...' for key in keys) + "}" for keys in allowed)
        raise ConfigError(f"{name} is {value!r}; give a positive number of pixels, or {forms}")
    return Size(size)


def _filter(value: Any) -> Resampling:
    name = getattr(value, "value", value)  # torchvision's InterpolationMode
    if isinstance(name, str):
        name = name.lower().removesuffix("-exact")
    try:
        return Resampling[name.upper()] if isinstance(name, str) else Resampling(name)
    except (KeyError, ValueError):
        names = ", ".join(repr(known.name.lower()) for known in sorted(Resampling))
        raise ConfigError(f"resample is {value!r}; choose one of {names}, or PIL's number of it") from None


def _statistics(name: str, value: Any) -> float | tuple[float, ...]:
    try:
        numbers = float(value) if isinstance(value, (int, float)) else tuple(float(entry) for entry in value)
    except (TypeError, ValueError):
        numbers = ()
    if numbers == ():
        raise ConfigError(f"{name} is {value!r}; give one number, or one for each channel")
    return numbers
