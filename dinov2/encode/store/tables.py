"""A table of features as files that other programs open: parquet, npz or npy (a file a column).

A table is a mapping from column names to arrays whose first axis is the row; text is an array of numpy's `<U` type. It
is written from pieces, one after the other, so that joining a thousand files takes the memory of one. Equal columns
give equal bytes. Parquet has vectors as fixed-size lists, and a missing label as null where the others have -1.

Tables in safetensors, which knows no text, are no longer written; those of earlier days are read.
"""

import glob
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np

from dinov2.encode.store.hashing_writer import FileFacts, HashingWriter, npy_header, written_file
from dinov2.errors import DataError, DinoError, MissingDependency
from dinov2.whole_files import utf8_path

__all__ = [
    "TABLE_FORMATS",
    "StoredTable",
    "TableFormat",
    "format_from_suffix",
    "require_pyarrow",
    "table_files",
    "write_table",
]

TableFormat = Literal["parquet", "npz", "npy"]
"""Format of a table; also the suffix of its file."""

TABLE_FORMATS: tuple[TableFormat, ...] = ("parquet", "npz", "npy")
"""All formats."""

_Table = Mapping[str, np.ndarray]


class _Writable(Protocol):
    def write(self, data: Any, /) -> object: ...


def format_from_suffix(path: Path | str) -> TableFormat | None:
    """The format that a file's suffix stands for, or None."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    return next((name for name in TABLE_FORMATS if name == suffix), None)


def table_files(path: Path, columns: Sequence[str], table_format: TableFormat) -> dict[str, Path]:
    """Files of the columns; npy has `cls` in the file of that name and `<stem>.<column>.npy` beside it."""
    if table_format != "npy":
        return dict.fromkeys(columns, path)
    return {name: path if name == "cls" else path.with_name(f"{path.stem}.{name}.npy") for name in columns}


def write_table(
    path: Path, pieces: Sequence[_Table], table_format: TableFormat, *, notes: Mapping[str, object] | None = None
) -> dict[str, FileFacts]:
    """Write the rows of `pieces`, which have the same columns, one after the other; file names and their facts.

    `notes` travel inside parquet files, as JSON under the key `dinov2`.
    """
    if table_format == "npy":
        facts = {}
        for name, file in table_files(path, list(pieces[0]), "npy").items():
            with written_file(file) as writer:
                _write_array(writer, pieces, name)
            facts[file.name] = writer.facts
        return facts
    with written_file(path) as writer:
        if table_format == "npz":
            _write_npz(writer, pieces)
        else:
            _write_parquet(writer, pieces, json.dumps(dict(notes or {}), sort_keys=True))
    return {path.name: writer.facts}


class StoredTable(Mapping[str, np.ndarray]):
    """The columns of a table on disk, each read when it is asked for. Raises DataError when there is no such table."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.format = self.path.suffix.lower().removeprefix(".")
        if self.format not in (*TABLE_FORMATS, "safetensors"):
            raise DataError(f"{path} holds no features; expected a .parquet, .npz or .npy file, or a folder of them")
        with self._naming_the_file():
            self._names = self._list_columns()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise DataError(f"{self.path} has no column {name!r}; its columns are {', '.join(self._names)}")
        with self._naming_the_file():
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
                    return list(require_pyarrow().parquet.read_schema(path).names)
            case "npz":
                with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                    return list(archive.files)
            case "npy":
                beside = sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.*.npy"))
                names = [file.stem[len(self.path.stem) + 1 :] for file in beside]
                names = [name for name in names if "." not in name and not name.endswith("patches")]
                if names and not self.path.exists():  # a table without class tokens
                    return names
                np.load(self.path, mmap_mode="r")  # complains when it is not there
                return ["cls", *names]
            case _:
                from safetensors import safe_open

                with utf8_path(self.path) as path, safe_open(path, "np") as file:
                    names = ["path" if name == "path_utf8" else name for name in file.keys()]  # noqa: SIM118
                return [name for name in names if name != "path_ends"]

    def _read(self, name: str) -> np.ndarray:
        match self.format:
            case "parquet":
                with utf8_path(self.path) as path:
                    return _from_arrow(require_pyarrow().parquet.read_table(path, columns=[name])[name])
            case "npz":
                # Opened here and not by numpy, which leaves the file open when it is no archive.
                with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                    return np.asarray(archive[name])
            case "npy":
                column = table_files(self.path, self._names, "npy")[name]
                return np.asarray(np.load(column, mmap_mode="r", allow_pickle=False))
            case _:
                from safetensors import safe_open

                with utf8_path(self.path) as path, safe_open(path, "np") as tensors:
                    if name != "path":
                        return np.asarray(tensors.get_tensor(name))
                    text, ends = tensors.get_tensor("path_utf8").tobytes(), tensors.get_tensor("path_ends").tolist()
                return np.array([text[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)], dtype=np.str_)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except DinoError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"there is no file {error.filename or self.path}; check the path") from error
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.path} cannot be read as {self.format} ({reason}); write it again") from error


def require_pyarrow() -> ModuleType:
    """`pyarrow` with its parquet module. Raises MissingDependency where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("pyarrow>=16", "a parquet file (npz and npy need nothing more)") from error
    return pyarrow


def _write_array(file: _Writable, pieces: Sequence[_Table], name: str) -> None:
    """A column over all pieces as a .npy file; text is as wide as the longest."""
    # Pieces may lie on the disk: one at a time is read, twice.
    layouts = [(array.dtype, array.shape) for array in (piece[name] for piece in pieces)]
    dtype = max((dtype for dtype, _ in layouts), key=lambda dtype: dtype.itemsize)
    file.write(npy_header(dtype, (sum(shape[0] for _, shape in layouts), *layouts[0][1][1:])))
    for piece in pieces:
        array = np.ascontiguousarray(piece[name], dtype=dtype)
        if array.size:
            file.write(array.reshape(-1).view(np.uint8).data)


def _write_npz(writer: HashingWriter, pieces: Sequence[_Table]) -> None:
    with zipfile.ZipFile(writer, "w", zipfile.ZIP_STORED) as archive:
        for name in pieces[0]:
            entry = zipfile.ZipInfo(f"{name}.npy")  # with its fixed date: the time must not change the bytes
            with archive.open(entry, "w", force_zip64=True) as member:
                _write_array(member, pieces, name)


def _write_parquet(writer: HashingWriter, pieces: Sequence[_Table], notes: str) -> None:
    pa = require_pyarrow()
    schema = _to_arrow(pieces[0]).schema.with_metadata({"dinov2": notes})
    # Vectors are random bits to a compressor; paths are not.
    compression = {name: "zstd" if pieces[0][name].dtype.kind == "U" else "none" for name in pieces[0]}
    flat = {field.name: compression[field.name] for field in schema if not pa.types.is_fixed_size_list(field.type)}
    with pa.parquet.ParquetWriter(
        pa.PythonFile(writer, mode="w"), schema, compression=flat, use_dictionary=False, write_statistics=list(flat)
    ) as file:
        for piece in pieces:
            file.write_table(_to_arrow(piece).cast(schema), row_group_size=1 << 20)


def _to_arrow(table: _Table) -> Any:
    pa = require_pyarrow()
    columns = {}
    for name, array in table.items():
        if array.dtype.kind == "U":
            columns[name] = pa.array(array.tolist(), type=pa.string())
        elif name == "label":
            columns[name] = pa.array(array, mask=array < 0)
        else:
            columns[name] = pa.array(np.ascontiguousarray(array).reshape(-1))
            for width in reversed(array.shape[1:]):
                columns[name] = pa.FixedSizeListArray.from_arrays(columns[name], width)
    return pa.table(columns)


def _from_arrow(column: Any) -> np.ndarray:
    pa = require_pyarrow()
    shape = [len(column)]
    column = column.combine_chunks()
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    while pa.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.flatten()
    if column.null_count:
        column = column.fill_null(-1)
    return np.asarray(column.to_numpy(zero_copy_only=False).reshape(shape))
