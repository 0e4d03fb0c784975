"""What an image processor can be told, and each setting in one form.

The table `BitSettings` is the only list of names: constructor, `preprocess`, files and refusals follow it. Its order
is the positional order of transformers 4; the settings of later versions come behind and are given by name.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

from PIL.Image import Resampling

from dinov2.errors import ConfigError

__all__ = ["SWITCHES", "Backend", "BitSettings", "Size", "UnknownSetting", "by_name", "refuse_unknown", "standard"]

Backend = Literal["torchvision", "pil"]
"""Who resizes: torchvision on tensors, or PIL, whose pixels are those of the published evaluations."""

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


_SizeLike = int | Sequence[int] | Mapping[str, int]


class BitSettings(TypedDict, total=False):
    """Every setting, for the constructor and for a single call. None stands for the default or the processor's own."""

    do_resize: bool | None
    size: _SizeLike | None
    resample: Any  # Resampling, its number, torchvision's InterpolationMode or a name such as "bicubic"
    do_center_crop: bool | None
    crop_size: _SizeLike | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: float | Sequence[float] | None
    image_std: float | Sequence[float] | None
    do_convert_rgb: bool | None
    return_tensors: Any  # "pt", "np", or None for a list
    data_format: Any  # "channels_first" or "channels_last", of the result
    input_data_format: Any  # the same of arrays and tensors that are given
    default_to_square: bool | None
    do_pad: bool | None
    pad_size: _SizeLike | None
    device: Any
    disable_grouping: bool | None  # without effect: images are never grouped here
    image_seq_length: int | None  # without effect, as in the stock class
    backend: Backend | None


_NAMES = tuple(BitSettings.__annotations__)

SWITCHES = tuple(name for name in _NAMES if name.startswith("do_"))
"""The steps that can be turned off; a None of the constructor or of a file turns them off, as in transformers."""


def by_name(values: tuple[Any, ...], settings: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """Positional values and keywords as one table of settings.

    Raises `UnknownSetting` for a keyword that is no setting, `ConfigError` for one that is given twice.
    """
    refuse_unknown(settings, what=what)
    positional = _NAMES[: _NAMES.index("default_to_square")]
    if len(values) > len(positional):
        raise UnknownSetting(f"{what} takes {len(positional)} settings by position and got {len(values)}; name them")
    given = dict(zip(positional, values, strict=False))
    if twice := sorted(given.keys() & settings.keys()):
        raise UnknownSetting(f"{what} got {twice[0]} twice, by position and by name; give it once")
    return {**given, **settings}


def refuse_unknown(names: Iterable[str], *, what: str) -> None:
    """Raises `UnknownSetting`, with the nearest setting, for the first name that is none."""
    for name in names:
        if name not in _NAMES:
            nearest = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.0)[0]
            raise UnknownSetting(f"{what} has no setting {name!r}; the nearest is {nearest!r}")


def standard(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings in one form: sizes as `Size`, filters as `Resampling`, statistics as tuples, plain strings.

    An int is the shorter side for `size` (or a square with `default_to_square`), a square for `crop_size`. Raises
    `ConfigError` for a value that a setting cannot have.
    """
    result = dict(settings)
    square = {"size": bool(settings.get("default_to_square")), "crop_size": True, "pad_size": True}
    for name, value in settings.items():
        if value is None:
            continue
        if name in square:
            result[name] = _size(name, value, square=square[name])
        elif name == "resample":
            result[name] = _filter(value)
        elif name in ("image_mean", "image_std"):
            result[name] = _statistics(name, value)
        elif name in ("return_tensors", "data_format", "input_data_format"):
            result[name] = getattr(value, "value", value)  # transformers has enumerations for them
        elif name == "backend" and value not in get_args(Backend):
            raise ConfigError(f"no image backend is called {value!r}; choose one of {', '.join(get_args(Backend))}")
        elif name in SWITCHES and not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; write True or False")
    for name, choices in (
        ("data_format", ("channels_first", "channels_last")),
        ("input_data_format", ("channels_first", "channels_last", "none")),
    ):
        if result.get(name) not in (None, *choices):
            raise ConfigError(f"{name} is {result[name]!r}; choose one of {', '.join(choices)}")
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
    sides_are_whole = all(isinstance(side, int) and side > 0 for side in size.values())
    if not sides_are_whole or not any(set(size) == set(keys) for keys in allowed):
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
        numbers = value if isinstance(value, (int, float)) else tuple(float(entry) for entry in value)
    except (TypeError, ValueError):
        numbers = ()
    if numbers == ():
        raise ConfigError(f"{name} is {value!r}; give one number, or one for each channel")
    return numbers
