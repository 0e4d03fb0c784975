"""The tables that `dinov2.encode.store.writing` wrote, column by column."""

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.encode.store.arrow import from_arrow, pyarrow_module
from dinov2.encode.store.writing import FORMATS, TableFormat, format_of, table_files
from dinov2.errors import ConfigError, DataError, MissingDependency
from dinov2.whole_files import utf8_path

__all__ = ["StoredTable"]


class StoredTable(Mapping[str, np.ndarray]):
    """The columns of a table on disk, each read when it is asked for. Raises DataError when there is no such table."""

    def __init__(self, path: Path | str, table_format: TableFormat | None = None) -> None:
        self.path = Path(path)
        kind = table_format or format_of(path)
        if kind is None:
            raise DataError(f"{path} is no table of features; expected a file of the kinds {', '.join(FORMATS)}")
        self.format: TableFormat = kind
        with self._complaining():
            self._names = self._list_columns()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise DataError(f"{self.path} has no column {name!r}; its columns are {', '.join(self._names)}")
        with self._complaining():
            return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _list_columns(self) -> list[str]:
        match self.format:
            case "parquet":
                with utf8_path(self.path) as path:
                    return list(pyarrow_module("parquet").read_schema(path).names)
            case "npz":
                with self._archive() as archive:
                    return list(archive.files)
            case "npy":
                head = len(self.path.stem) + 1
                beside = sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.*.npy"))
                names = [file.stem[head:] for file in beside]
                np.load(self.path, mmap_mode="r")  # complains when it is not there
                return ["cls", *(name for name in names if "." not in name and not name.endswith("patches"))]
            case "safetensors":
                with _safe_open(self.path) as file:
                    names = ["path" if name == "path_utf8" else name for name in file.keys()]  # noqa: SIM118
                return [name for name in names if name != "path_ends"]

    def _read(self, name: str) -> np.ndarray:
        match self.format:
            case "parquet":
                with utf8_path(self.path) as path:
                    return from_arrow(pyarrow_module("parquet").read_table(path, columns=[name])[name])
            case "npz":
                with self._archive() as archive:
                    return np.asarray(archive[name])
            case "npy":
                file = table_files(self.path, self._names, "npy")[name]
                return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
            case "safetensors":
                with _safe_open(self.path) as file:
                    if name != "path":
                        return np.asarray(file.get_tensor(name))
                    data, ends = file.get_tensor("path_utf8").tobytes(), file.get_tensor("path_ends").tolist()
                starts = [0, *ends[:-1]]
                return np.array([data[a:b].decode() for a, b in zip(starts, ends, strict=True)], dtype=np.str_)

    @contextmanager
    def _archive(self) -> Iterator[Any]:
        # Opened here and not by numpy, which leaves the file open when it is no archive.
        with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            yield archive

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, DataError, MissingDependency):
            raise
        except FileNotFoundError as error:
            raise DataError(f"there is no file {error.filename or self.path}; check the path") from error
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.path} cannot be read as {self.format} ({reason}); write it again") from error


@contextmanager
def _safe_open(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with utf8_path(path) as name, safe_open(name, "np") as file:
        yield file
