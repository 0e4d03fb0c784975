"""A table of features as files that other programs open: parquet, npz, npy (a file a column) or safetensors.

A table is a mapping from column names to arrays whose first axis is the row; text is an array of numpy's `<U` type. It
is written from pieces, one after the other, so that joining a thousand files takes the memory of one. Equal columns
give equal bytes.

What differs between the formats: parquet has a missing label as null where the others have -1, and safetensors, which
knows no text, has `path` as UTF-8 bytes `path_utf8` with offsets `path_ends` (text i ends there).
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinov2.encode.store.arrow import pyarrow_module, to_arrow
from dinov2.encode.store.sinks import FileFacts, Sink, npy_header, written_file

__all__ = ["FORMATS", "TableFormat", "format_of", "table_files", "write_table"]

TableFormat = Literal["parquet", "npz", "npy", "safetensors"]
"""How a table is stored; also the suffix of its file."""

FORMATS: tuple[TableFormat, ...] = ("parquet", "npz", "npy", "safetensors")
"""All formats."""

_Table = Mapping[str, np.ndarray]

_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}


def format_of(path: Path | str) -> TableFormat | None:
    """The format that a file's suffix stands for, or None."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    return next((name for name in FORMATS if name == suffix), None)


def table_files(path: Path, columns: Sequence[str], table_format: TableFormat) -> dict[str, Path]:
    """Which file holds which column; npy has `cls` in the file of that name and `<stem>.<column>.npy` beside it."""
    if table_format != "npy":
        return dict.fromkeys(columns, path)
    main = "cls" if "cls" in columns else columns[0]
    return {name: path if name == main else path.with_name(f"{path.stem}.{name}.npy") for name in columns}


def write_table(
    path: Path, pieces: Sequence[_Table], table_format: TableFormat, *, notes: Mapping[str, Any] | None = None
) -> dict[str, FileFacts]:
    """Write the rows of `pieces`, which have the same columns, one after the other; file names and their facts.

    `notes` travel inside parquet and safetensors files, as JSON under the key `dinov2`.
    """
    text = json.dumps(dict(notes or {}), sort_keys=True)
    if table_format == "npy":
        files = table_files(path, list(pieces[0]), "npy")
        return {file.name: _write_npy(file, pieces, name) for name, file in files.items()}
    writers: dict[str, Callable[[Any, Sequence[_Table], str], None]] = {
        "parquet": _write_parquet,
        "npz": _write_npz,
        "safetensors": _write_safetensors,
    }
    with written_file(path) as sink:
        writers[table_format](sink, pieces, text)
    return {path.name: sink.facts}


def _layout(pieces: Sequence[_Table], name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of a column over all pieces; text is as wide as the longest."""
    arrays = (piece[name] for piece in pieces)
    found = [(array.dtype, array.shape) for array in arrays]
    widest = max((dtype for dtype, _ in found), key=lambda dtype: dtype.itemsize)
    return widest, (sum(shape[0] for _, shape in found), *found[0][1][1:])


def _chunks(pieces: Sequence[_Table], name: str, dtype: np.dtype[Any]) -> Iterator[memoryview]:
    for piece in pieces:
        array = np.ascontiguousarray(piece[name], dtype=dtype)
        if array.size:
            yield array.reshape(-1).view(np.uint8).data


def _write_npy(path: Path, pieces: Sequence[_Table], name: str) -> FileFacts:
    with written_file(path) as sink:
        _write_array(sink, pieces, name)
    return sink.facts


def _write_array(sink: Any, pieces: Sequence[_Table], name: str) -> None:
    dtype, shape = _layout(pieces, name)
    sink.write(npy_header(dtype, shape))
    for chunk in _chunks(pieces, name, dtype):
        sink.write(chunk)


def _write_npz(sink: Sink, pieces: Sequence[_Table], notes: str) -> None:
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name in pieces[0]:
            entry = zipfile.ZipInfo(f"{name}.npy")  # with its fixed date: the time must not change the bytes
            with archive.open(entry, "w", force_zip64=True) as member:
                _write_array(member, pieces, name)


def _write_safetensors(sink: Sink, pieces: Sequence[_Table], notes: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"dinov2": notes}}
    plan: list[tuple[str, np.dtype[Any], int]] = []
    for name in pieces[0]:
        dtype, shape = _layout(pieces, name)
        if dtype.kind != "U":
            plan.append((name, dtype, math.prod(shape) * dtype.itemsize))
            header[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape)}
        else:
            size = sum(len(data) for piece in pieces for data in _encoded(piece[name]))
            plan += [(f"{name}_utf8", np.dtype(np.uint8), size), (f"{name}_ends", np.dtype(np.int64), 8 * shape[0])]
            header[f"{name}_utf8"] = {"dtype": "U8", "shape": [size]}
            header[f"{name}_ends"] = {"dtype": "I64", "shape": [shape[0]]}
    plan.sort(key=lambda item: -item[1].itemsize)  # wide types first, so that each begins at a multiple of its width
    offset = 0
    for name, _, size in plan:
        header[name]["data_offsets"] = [offset, offset + size]
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for name, dtype, _ in plan:
        if name in pieces[0]:
            chunks: Iterator[Any] = _chunks(pieces, name, dtype)
        elif name.endswith("_utf8"):
            chunks = (b"".join(_encoded(piece[name.removesuffix("_utf8")])) for piece in pieces)
        else:
            chunks = _ends(pieces, name.removesuffix("_ends"))
        for chunk in chunks:
            sink.write(chunk)


def _encoded(texts: np.ndarray) -> list[bytes]:
    return [text.encode() for text in texts.tolist()]


def _ends(pieces: Sequence[_Table], name: str) -> Iterator[bytes]:
    end = 0
    for piece in pieces:
        ends = end + np.cumsum([len(data) for data in _encoded(piece[name])], dtype=np.int64)
        end = int(ends[-1]) if len(ends) else end
        yield ends.tobytes()


def _write_parquet(sink: Sink, pieces: Sequence[_Table], notes: str) -> None:
    pa, parquet = pyarrow_module(), pyarrow_module("parquet")
    schema = to_arrow(pieces[0]).schema.with_metadata({"dinov2": notes})
    # Vectors are random bits to a compressor; paths are not.
    compression = {name: "zstd" if pieces[0][name].dtype.kind == "U" else "none" for name in pieces[0]}
    flat = {field.name: compression[field.name] for field in schema if not pa.types.is_fixed_size_list(field.type)}
    with parquet.ParquetWriter(
        pa.PythonFile(sink, mode="w"), schema, compression=flat, use_dictionary=False, write_statistics=list(flat)
    ) as writer:
        for piece in pieces:
            writer.write_table(to_arrow(piece).cast(schema), row_group_size=1 << 20)
