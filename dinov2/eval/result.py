"""One row a figure, with everything needed to find out later where the figure came from.

Rows carry names, digests and versions, and of paths only what the user typed: a result can be published that was asked
for with names that can be.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinov2.errors import DataError
from dinov2.whole_files import read_json, write_json

__all__ = ["SCHEMA", "Result", "environment", "now", "read_results", "write_results"]

SCHEMA = 1
"""Version of the row layout; it rises when a field changes its meaning."""


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, str | int]:
    """Environment of a figure: Python, libraries, platform, threads, accelerator. No paths, no host name."""
    import numpy
    import PIL
    import torch
    import torchvision

    from dinov2 import __version__

    return {
        "dinov2": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured figure."""

    task: str
    """Task: `knn`, `linear`, ..."""
    metric: str
    """`top-1`, `top-5`, `mean-per-class`, ..."""
    value: float
    unit: str = "percent"
    ci: tuple[float, float] | None = None
    """95 % interval in the unit of the value."""
    k: int | None = None
    """Neighbours of a k-NN figure."""
    n: int | None = None
    """Number of samples that were scored."""
    dataset: str = ""
    """As it was typed."""
    split: str = ""
    model: Mapping[str, object] = field(default_factory=dict)
    """Architecture, digest of the weights, ..."""
    transform: Mapping[str, object] = field(default_factory=dict)
    precision: str = "float32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The task's own knobs: temperature, images per class, values of the single tries, ..."""
    seed: int | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, object] = field(default_factory=environment)
    date: str = field(default_factory=now)
    schema: int = SCHEMA


def write_results(path: Path | str, rows: Sequence[Result], *, extra: Mapping[str, object] | None = None) -> Path:
    """Write `{"schema", "rows", **extra}` as one JSON document; whoever reads the path sees the old or the new one."""
    document: dict[str, object] = {"schema": SCHEMA, "rows": [asdict(row) for row in rows]}
    for key, value in (extra or {}).items():
        document.setdefault(key, value)
    return write_json(path, document)


def read_results(path: Path | str) -> list[Result]:
    """The rows of a file of `write_results`; fields that a newer version added are left out."""
    try:
        document = read_json(path, dict)
        rows = document["rows"]
        known = {f.name for f in fields(Result)}
        kept = [{key: value for key, value in row.items() if key in known} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a results file ({error}); expected JSON with a list `rows`") from error
    return [
        Result(
            **{
                **row,
                "value": math.nan if row["value"] is None else row["value"],
                "ci": tuple(row["ci"]) if row.get("ci") is not None else None,
                "notes": tuple(row.get("notes", ())),
            }
        )
        for row in kept
    ]
