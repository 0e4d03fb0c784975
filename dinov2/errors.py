"""Errors that this package raises on purpose; one `except DinoError` catches them all.

    DinoError
    ├── ConfigError         a config key, override or command-line value is wrong
    ├── DataError           a data set, folder or image is missing, empty or unreadable
    ├── WeightsError        a weight file does not fit, or cannot be read safely
    │   └── UnknownRelease  no released model has that name
    ├── TrainingDiverged    losses or gradients stayed non-finite
    └── MissingDependency   an optional package is needed and not installed

A message says what is wrong, what was got, and the way out. The first three are also `ValueError`s, because callers of
the public release catch those.
"""

import re

__all__ = [
    "ConfigError",
    "DataError",
    "DinoError",
    "MissingDependency",
    "TrainingDiverged",
    "UnknownRelease",
    "WeightsError",
    "short_repr",
]


# C0 and C1 controls, and the two separators that end a line.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class DinoError(Exception):
    """Base of all errors of this package; its text is one sentence for the user, in one line.

    Names of files and of tensors may hold line breaks and escape sequences of terminals; the text shows them escaped.
    """

    def __str__(self) -> str:
        return _CONTROLS.sub(lambda control: repr(control[0])[1:-1], super().__str__())


class ConfigError(DinoError, ValueError):
    """A configuration value or command-line argument that cannot be used."""


class DataError(DinoError, ValueError):
    """A data set that is missing, empty, changed or unreadable."""


class WeightsError(DinoError, ValueError):
    """A weight file that does not fit the model, or that is unsafe or impossible to read."""


class UnknownRelease(WeightsError):
    """A name under which no model was ever released."""


class TrainingDiverged(DinoError, RuntimeError):
    """Several training steps in a row produced a non-finite loss or gradient."""


class MissingDependency(DinoError, ImportError):
    """An optional package is needed; `package` is what to install, `purpose` what it is needed for."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs a package that is not installed; run: pip install '{package}'")
        self.package = package
        self.purpose = purpose

    def __reduce__(self) -> tuple[type["MissingDependency"], tuple[str, str]]:
        return type(self), (self.package, self.purpose)


def short_repr(value: object, limit: int = 60) -> str:
    """Text of a value for a message, shortened: a file may hold a number of a million digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError, RuntimeError):  # Python refuses to print integers of many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
