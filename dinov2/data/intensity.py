"""Pixel values of any number type as 8 bits: which values become black and white.

- `auto`: integers without negative values as under `bits`; floats in 0..1, or from 0 on to between 16 and 255, in that
  range; anything else as under `min-max`.
- `bits`: 0 and the largest number of the 8, 10, 12, 14, 16, 32 or 64 bits that hold the values (of signed types 15, 31
  or 63), below 0 as well where there are negative ones; floats as under `auto`.
- `min-max`: the smallest and the largest value of the picture.
- `percentile`: its 0.5th and 99.5th percentile.
- `LOW:HIGH`: these numbers, the same for every picture.

Values outside of the window become black or white, NaN black. 8-bit pictures stay as they are under every rule.
"""

import re

import numpy as np

from dinov2.errors import ConfigError, DataError
from dinov2.logging import warn_once

__all__ = ["check_intensity", "to_uint8"]

_RULES = ("auto", "bits", "min-max", "percentile")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_FIXED = re.compile(f"({_NUMBER}):({_NUMBER})", re.ASCII | re.IGNORECASE)
_PERCENTILES = (0.5, 99.5)
_SAMPLE = 1 << 20  # values that a percentile is computed from
_BLOCK = 1 << 20  # values converted at once: a large picture must not be held as float64


def check_intensity(rule: str) -> str:
    """The rule itself. Raises `ConfigError` when it is none."""
    fixed = _FIXED.fullmatch(rule)
    if rule not in _RULES and not (fixed and float(fixed[1]) < float(fixed[2])):
        raise ConfigError(
            f"the intensity rule {rule!r} is unknown; write {', '.join(_RULES)} or LOW:HIGH, as -1000:400"
        )
    return rule


def to_uint8(values: np.ndarray, *, rule: str = "auto", name: str = "an image") -> np.ndarray:
    """Numbers of any shape as uint8 of the same shape, by one of the rules above.

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
