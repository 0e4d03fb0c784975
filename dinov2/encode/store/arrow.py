"""Columns of arrays as columns of Arrow tables and back: vectors are fixed-size lists, a missing label is null."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dinov2.errors import MissingDependency

__all__ = ["from_arrow", "pyarrow_module", "to_arrow"]


def to_arrow(table: Mapping[str, np.ndarray]) -> Any:
    """A `pyarrow.Table` of columns [S], [S, D] or [S, R, D]; label -1 becomes null."""
    pa = pyarrow_module()

    def column(name: str) -> Any:
        array = table[name]
        if array.dtype.kind == "U":
            return pa.array(array.tolist(), type=pa.string())
        if name == "label":
            return pa.array(array, mask=array < 0)
        nested = pa.array(np.ascontiguousarray(array).reshape(-1))
        for width in reversed(array.shape[1:]):
            nested = pa.FixedSizeListArray.from_arrays(nested, width)
        return nested

    return pa.table({name: column(name) for name in table})


def from_arrow(column: Any) -> np.ndarray:
    """The array of a column of such a table."""
    pa = pyarrow_module()
    shape = [len(column)]
    column = column.combine_chunks()
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    while pa.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.flatten()
    if column.null_count:
        column = column.fill_null(-1)
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def pyarrow_module(part: str = "") -> Any:
    """`pyarrow`, or with `part` its parquet module. Raises MissingDependency where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("pyarrow>=16", "a parquet file (npz and safetensors need nothing more)") from error
    return pyarrow.parquet if part else pyarrow
