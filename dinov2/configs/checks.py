"""The range checks that the config sections share: each names the dotted key, the value it got and what to write.

They are functions of a key and a value rather than field validators, so that a section's `__post_init__` reads as the
list of what holds for it.
"""

from collections.abc import Sequence

from dinov2.errors import ConfigError

__all__ = [
    "MOST_WORKERS",
    "at_least",
    "at_most",
    "check_positive",
    "equal_length",
    "increasing_fractions",
    "nearest_multiples",
    "one_of",
    "shown",
    "unit_interval",
]

MOST_WORKERS = 1024
"""Most loader processes, and most threads: more are a slip of the keyboard that takes a machine down."""


def shown(value: object) -> str:
    """`value` as a user would write it in YAML: lists in brackets, text in quotes."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)


def at_least(key: str, value: float, minimum: float, *, meaning: str = "") -> None:
    """Refuse a `value` below `minimum`; `meaning` says what the minimum stands for ("0 for never")."""
    if not value >= minimum:
        raise ConfigError(f"{key} is {shown(value)}; write {minimum} or more{f' ({meaning})' if meaning else ''}")


def at_most(key: str, value: float, maximum: float) -> None:
    """Refuse a `value` above `maximum`, which no machine could build, start or count."""
    if value > maximum:
        raise ConfigError(f"{key} is {shown(value)}; write {maximum} or less")


def check_positive(key: str, value: float) -> None:
    """Refuse a `value` that is not above zero."""
    if not value > 0:
        raise ConfigError(f"{key} is {shown(value)}; write a number above 0")


def unit_interval(key: str, value: float) -> None:
    """Refuse a `value` outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{key} is {shown(value)}; write a number from 0 to 1")


def increasing_fractions(key: str, pair: tuple[float, float], *, zero: bool) -> None:
    """Refuse a `pair` that is not two numbers from 0 to 1, smaller first; 0 itself only when `zero`."""
    low, high = pair if len(pair) == 2 else (2.0, 0.0)
    if not 0 <= low <= high <= 1 or (low == 0 and not zero):
        bounds = "from 0 to 1" if zero else "above 0 and at most 1"
        raise ConfigError(f"{key} is {shown(pair)}; write two numbers {bounds}, the smaller one first")


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a `value` that is not one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key} is {shown(value)}; write {' or '.join(choices)}")


def equal_length(key: str, value: tuple[float, ...], length: int, *, of: str) -> None:
    """Refuse a list that has neither one entry nor `length`; `of` says what is counted."""
    if len(value) not in (1, length):
        wanted = "one number" if length == 1 else f"one number, or {length} of them"
        raise ConfigError(f"{key} is {shown(value)}, {len(value)} numbers for {of} = {length}; write {wanted}")


def nearest_multiples(value: int, unit: int) -> tuple[int, ...]:
    """The positive multiples of `unit` next to `value`, the smaller one first."""
    below = value // unit * unit
    return (below, below + unit) if below > 0 else (unit,)
