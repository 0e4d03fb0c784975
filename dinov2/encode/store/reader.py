"""Features on disk, read column by column: what `dinov2 embed` wrote, and what evaluations keep."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.encode.store.shards import MANIFEST, read_manifest
from dinov2.encode.store.tables import StoredTable
from dinov2.errors import DataError
from dinov2.whole_files import unescape_name

__all__ = ["StoredFeatures", "open_features"]


class StoredFeatures:
    """Features of the readable images of a data set, in its order; columns are read when asked for.

    `columns` are `index` (position in the source), `path` (the name of the file itself: `unescape_name` of what a table
    holds), `height`, `width`, `label` (-1: none) where there is one, `cls` and what else was embedded. `manifest` says
    what they were made of; it is empty for a table that has lost it.
    """

    def __init__(
        self, path: Path, tables: Sequence[StoredTable], rows: Sequence[int], manifest: dict[str, Any]
    ) -> None:
        self.path, self.manifest = path, manifest
        self._tables, self._rows = list(tables), list(rows)

    def __len__(self) -> int:
        return sum(self._rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._tables[0])

    def read(self, column: str) -> np.ndarray:
        """A whole column: `[S]` or `[S, ...]`. Raises DataError when there is none of that name."""
        pieces = list(self.pieces(column))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def pieces(self, column: str) -> Iterator[np.ndarray]:
        """The same column part by part."""
        pieces = (table[column] for table in self._tables)
        return (_file_names(piece) for piece in pieces) if column == "path" else pieces

    def patches(self, name: str = "patches") -> "_StoredPatches":
        """Patch features, mapped into memory. Raises DataError when they were not written."""
        entry = self.manifest.get("patches", {}).get(name)
        if entry is None:
            known = ", ".join(self.manifest.get("patches", {})) or "none were written"
            raise DataError(f"{self.path} has no patch features called {name!r} ({known}); embed with --patches")
        home = self.path if self.path.is_dir() else self.path.parent
        return _StoredPatches([np.load(home / file, mmap_mode="r", allow_pickle=False) for file in entry["files"]])


class _StoredPatches:
    """Patch features float16 `[S, h, w, D]` over one or several mapped files; `patches[row]` reads that row alone."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])

    @property
    def shape(self) -> tuple[int, ...]:
        """`(S, h, w, D)`."""
        return (int(self._ends[-1]), *self._arrays[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} was asked of patch features of {len(self)} images")
        part = int(np.searchsorted(self._ends, row, side="right"))
        return self._arrays[part][row - (int(self._ends[part - 1]) if part else 0)]


def _file_names(paths: np.ndarray) -> np.ndarray:
    if not (np.char.find(paths, "\\u") >= 0).any():  # compiled, and almost always there is nothing to undo
        return paths
    return np.array([unescape_name(path) for path in paths.tolist()])


def open_features(path: str | os.PathLike[str]) -> StoredFeatures:
    """Features that `dinov2 embed` wrote to `path`. Raises DataError for anything else, and for unfinished output."""
    path = Path(path).expanduser()
    manifest = read_manifest(path)
    if not path.exists() or (manifest is not None and manifest.get("state") != "complete"):
        unfinished = path if path.is_dir() else path.with_name(f"{path.name}.parts")
        if unfinished.exists():
            raise DataError(f"the features in {unfinished} are not finished; repeat the command that began them")
        raise DataError(f"there are no features {path}; check the path, or write them with `dinov2 embed`")
    if path.is_dir():
        if manifest is None:
            raise DataError(f"the folder {path} has no {MANIFEST}; give what `dinov2 embed` wrote")
        entries = manifest["tables"]
        tables = [StoredTable(path / entry["file"]) for entry in entries]
        return StoredFeatures(path, tables, [int(entry["rows"]) for entry in entries], manifest)
    table = StoredTable(path)
    if "cls" not in table:
        raise DataError(f"{path} has no column cls; its columns are {', '.join(table)}")
    return StoredFeatures(path, [table], [len(table["index"] if "index" in table else table["cls"])], manifest or {})
