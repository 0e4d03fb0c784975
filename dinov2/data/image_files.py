"""Files that may hold pictures: reading, its limits and options, kinds that are not read, pixel values as 8 bits.

Files are hostile until they are decoded: only regular files are opened, up to a number of bytes.

Pixel values become 8 bits by an intensity rule, which says which values become black and white:

- `auto`: integers without negative values as under `bits`; floats in 0..1, or from 0 on to between 16 and 255, in that
  range; anything else as under `min-max`.
- `bits`: 0 and the largest number of the 8, 10, 12, 14, 16, 32 or 64 bits that hold the values (of signed types 15, 31
  or 63), below 0 as well where there are negative ones; floats as under `auto`.
- `min-max`: the smallest and the largest value of the picture.
- `percentile`: its 0.5th and 99.5th percentile.
- `LOW:HIGH`: these numbers, the same for every picture.

Values outside of the window become black or white, NaN black. 8-bit pictures stay as they are under every rule.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dinov2.errors import ConfigError, DataError
from dinov2.logging import warn_once

__all__ = ["describe_other_kind", "get_image_options", "image_options", "read_image", "to_uint8"]

_RULES = ("auto", "bits", "min-max", "percentile")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_FIXED = re.compile(f"({_NUMBER}):({_NUMBER})", re.ASCII | re.IGNORECASE)
_PERCENTILES = (0.5, 99.5)
_SAMPLE = 1 << 20  # values that a percentile is computed from
_BLOCK = 1 << 20  # values converted at once: a large picture must not be held as float64

_CONVERT = "convert it to JPEG or PNG"
# Where the mark stands, the mark, what such a file is, and how its content is got at.
_OTHER_KINDS = (
    *((8, brand, "it is a HEIC picture", f"{_CONVERT}, or open it with the package pillow-heif and give the PIL image")
      for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
    (8, b"avif", "it is an AVIF picture", "update Pillow, which reads them from 11.3 on"),
    (8, b"crx ", "it is a raw photograph", _CONVERT),
    (4, b"ftyp", "it is a video", "take its frames out first, for example with ffmpeg"),
    (8, b"AVI ", "it is a video", "take its frames out first, for example with ffmpeg"),
    (0, b"\x1a\x45\xdf\xa3", "it is a video", "take its frames out first, for example with ffmpeg"),
    (0, b"%!PS", "it is a PostScript file", f"{_CONVERT} with a program that you trust"),
    (0, b"\xc5\xd0\xd3\xc6", "it is a PostScript file", f"{_CONVERT} with a program that you trust"),
    (0, b"%PDF", "it is a PDF file", f"{_CONVERT}, page by page"),
    (0, b"<", "it is a text file such as SVG or HTML", "draw it as PNG, or download the picture itself"),
    (0, b"8BPS", "it is a Photoshop file", _CONVERT),
    (0, b"ZISRAWFILE", "it is a CZI file of a microscope", "save its planes as TIFF"),
    (128, b"DICM", "it is a DICOM file", "save its pixels as TIFF or .npy"),
    (0, b"\x89HDF", "it is an HDF5 file", "save its pixels as TIFF or .npy"),
    (0, b"\x76\x2f\x31\x01", "it is an OpenEXR file", "save it as TIFF"),
    (0, b"\xff\x0a", "it is a JPEG XL file", _CONVERT),
    (4, b"JXL ", "it is a JPEG XL file", _CONVERT),
)  # fmt: skip


@dataclass(frozen=True)
class _ImageOptions:
    """Limits of reading, and the rule from values to 8 bits; see `image_options`."""

    max_pixels: int | None = None
    max_bytes: int = 512 << 20
    intensity: str = "auto"


def get_image_options() -> _ImageOptions:
    """The options in force: `DINOV2_MAX_IMAGE_PIXELS`, `DINOV2_MAX_IMAGE_BYTES` and `DINOV2_INTENSITY`.

    Without the first, pictures may have `PIL.Image.MAX_IMAGE_PIXELS` pixels: as floats they take 1.2 GiB.
    Raises `ConfigError` for a value that is none.
    """
    pixels = _whole_number("DINOV2_MAX_IMAGE_PIXELS") or Image.MAX_IMAGE_PIXELS
    max_bytes = _whole_number("DINOV2_MAX_IMAGE_BYTES") or _ImageOptions.max_bytes
    return _ImageOptions(pixels, max_bytes, _check_intensity(os.environ.get("DINOV2_INTENSITY") or "auto"))


@contextmanager
def image_options(
    *, max_pixels: int | None = None, max_bytes: int | None = None, intensity: str | None = None
) -> Iterator[None]:
    """Options for all pictures read inside the block, by this process and those that it starts.

    `max_pixels` and `max_bytes` limit one picture, `intensity` is a rule; None leaves an
    option as it is. They are kept in the environment, because that is what workers of any kind inherit.

    Raises `ConfigError` for a value that cannot be used.
    """
    given = {"MAX_IMAGE_PIXELS": max_pixels, "MAX_IMAGE_BYTES": max_bytes, "INTENSITY": intensity}
    names = {f"DINOV2_{name}": str(value) for name, value in given.items() if value is not None}
    before = {name: os.environ.get(name) for name in names}
    pillows_limit = Image.MAX_IMAGE_PIXELS
    os.environ.update(names)
    try:
        get_image_options()
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = pillows_limit
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def read_image(path: str | os.PathLike[str]) -> bytes:
    """The content of an image file. Raises `DataError` for what is no regular file, too large, or cannot be read."""
    limit = get_image_options().max_bytes
    if "\0" in os.fspath(path):
        raise DataError(f"the image {os.fspath(path)!r} is no name of a file; check the path")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
            raise DataError(f"the image {os.fspath(path)} is {what} and no file; give the path of a file")
        if status.st_size <= limit:
            with open(path, "rb") as file:
                data = file.read(limit + 1)  # the file may grow
            if len(data) <= limit:
                return data
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the image {os.fspath(path)} cannot be read ({reason}); was it moved or deleted?") from error
    raise DataError(
        f"the image {os.fspath(path)} has {max(status.st_size, limit + 1):,} bytes, and a picture may have {limit:,}; "
        "give --max-image-bytes or set DINOV2_MAX_IMAGE_BYTES to read it"
    )


def describe_other_kind(data: bytes) -> tuple[str, str] | None:
    """Kind of a file that is no supported picture, and how to fix it; None where it is not known."""
    return next(
        ((kind, advice) for place, mark, kind, advice in _OTHER_KINDS if data[place : place + len(mark)] == mark), None
    )


def _whole_number(variable: str) -> int | None:
    text = os.environ.get(variable) or ""
    if text and not (text.isascii() and text.isdecimal() and 0 < len(text) < 19 and int(text)):
        raise ConfigError(f"the environment variable {variable} is {text!r}; write a whole number from 1")
    return int(text) if text else None


def _check_intensity(rule: str) -> str:
    """The rule itself. Raises `ConfigError` when it is none."""
    fixed = _FIXED.fullmatch(rule)
    if rule not in _RULES and not (fixed and float(fixed[1]) < float(fixed[2])):
        raise ConfigError(
            f"the intensity rule {rule!r} is unknown; write {', '.join(_RULES)} or LOW:HIGH, as -1000:400"
        )
    return rule


def to_uint8(values: np.ndarray, *, rule: str = "auto", name: str = "an image") -> np.ndarray:
    """Numbers of any shape as uint8 of the same shape, by an intensity rule.

    Under `auto` a window that is not that of the type (0..65535, 0..1 or 0..255) is logged as a warning, once for each
    type and kind of window. `name` is for messages. Raises `DataError` for what are no real numbers, and for floats
    without a finite one.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise DataError(f"{name} holds {values.dtype} values, which are no pixels; save it as uint8 or uint16")
    rows = values.reshape(-1)
    low, high = _finite_range(rows, name)
    black, white, kind = _window(rows, low, high, rule)
    if rule == "auto" and kind and high > low:
        warn_once(
            f"intensity {values.dtype.name} {kind}",
            f"{name} holds {values.dtype.name} values from {low:g} to {high:g}, of which {black:g} became black and "
            f"{white:g} white ({kind}); --intensity or DINOV2_INTENSITY sets another window, and later pictures like "
            "this one are converted without a warning",
        )
    result = np.empty(rows.shape, np.uint8)
    half = white / 2 - black / 2  # halves, because the whole range of floats overflows
    with np.errstate(all="ignore"):
        for first in range(0, len(rows), _BLOCK):
            block = rows[first : first + _BLOCK].astype(np.float64)
            share = (block / 2 - black / 2) / half if half else np.zeros_like(block)
            result[first : first + _BLOCK] = np.rint(np.clip(np.nan_to_num(share, nan=0.0) * 255, 0, 255))
    return result.reshape(values.shape)


def _finite_range(values: np.ndarray, name: str) -> tuple[float, float]:
    if values.dtype.kind in "iu":
        return (int(values.min()), int(values.max())) if values.size else (0, 0)
    low, high = np.inf, -np.inf
    for first in range(0, len(values), _BLOCK):
        block = values[first : first + _BLOCK]
        block = block[np.isfinite(block)]
        if block.size:
            low, high = min(low, float(block.min())), max(high, float(block.max()))
    if low > high:
        raise DataError(f"{name} holds no finite number, so it shows nothing; check the program that wrote it")
    return low, high


def _window(values: np.ndarray, low: float, high: float, rule: str) -> tuple[float, float, str]:
    """Black and white, and the kind of window where it is not the evident one."""
    if fixed := _FIXED.fullmatch(rule):
        return float(fixed[1]), float(fixed[2]), ""
    if rule == "percentile":
        sample = values[:: -(-len(values) // _SAMPLE) or 1]
        black, white = np.percentile(sample[np.isfinite(sample)].astype(np.float64), _PERCENTILES)
        return float(black), float(white), ""
    if values.dtype.kind in "iu" and (rule == "bits" or (rule == "auto" and low >= 0)):
        counts = (8, 10, 12, 14, 16, 32, 64)
        if low < 0:
            bits = next(count for count in counts if -(2 ** (count - 1)) <= low and high < 2 ** (count - 1))
            return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, f"{bits} bits"
        more = (15, 31, 63) if values.dtype.kind == "i" else ()
        bits = next(count for count in sorted({*counts, *more}) if high < 2**count)
        return 0, 2**bits - 1, "" if bits == 16 else f"{bits} bits"
    if values.dtype.kind == "f" and rule != "min-max" and low >= 0 and (high <= 1 or 16 < high <= 255):
        return 0, 1 if high <= 1 else 255, ""
    return low, high, "its smallest and largest value"
