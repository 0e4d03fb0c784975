"""From finished parts to the output: one file where they are small, else their folder under its final name."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinov2.encode.store.parts import MANIFEST, PartRecord, PartsFolder, differences, manifest_of
from dinov2.encode.store.reading import StoredTable
from dinov2.encode.store.sinks import npy_header, written_file
from dinov2.encode.store.writing import table_files, write_table
from dinov2.errors import ConfigError, DataError
from dinov2.whole_files import write_json

__all__ = ["SMALL", "Merge", "begin", "complete_output", "finish"]

SMALL = 1 << 30
"""Bytes of all parts together up to which they become one file."""

Merge = Literal["auto", "always", "never"]
"""Whether the parts become one file: when they are small, in any case, or not at all."""

_BLOCK = 64 << 20


def begin(folder: PartsFolder, request: Mapping[str, Any], about: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Make ready for writing parts, or for going on; True when the output is finished already.

    Raises DataError naming what differs when the output or its parts are of another request, ConfigError when the
    output exists and is none of ours.
    """
    if overwrite:
        _clear(folder)
    output, done = folder.output, manifest_of(folder.output)
    if done is not None and done.get("state") == "complete" and output.exists():
        if changed := differences(done["request"], request):
            raise DataError(
                f"{output} holds features of other settings: {'; '.join(changed[:4])}; choose another output, or "
                "replace it with --overwrite"
            )
        shutil.rmtree(folder.path, ignore_errors=True)  # what a kill left after the output was finished
        return True
    begun = manifest_of(folder.path)
    if output.exists() and begun is None:
        way_out = "" if output.is_dir() else ", or replace it with --overwrite"
        raise ConfigError(f"{output} exists and holds no features of ours; choose another output{way_out}")
    if begun is not None and begun.get("state") == "complete" and not differences(begun["request"], request):
        _give_name(folder)  # a kill came between the last word of its manifest and its name
        return True
    folder.start(request, about)
    return False


def finish(
    folder: PartsFolder,
    records: Sequence[PartRecord],
    *,
    merge: Merge,
    manifest: Mapping[str, Any],
) -> list[Path]:
    """Turn the parts into the output and return its files. `manifest` is what it says besides its tables.

    Can be repeated after having been interrupted anywhere. Raises DataError when not one image was readable.
    """
    kept = [record for record in records if record.rows]
    if not kept:
        raise DataError("none of the images could be read; the first reason is: " + records[0].unreadable[0][1])
    _refuse_several_grids(kept)
    total = sum(facts.bytes for record in records for facts in record.files.values())
    one_file = merge == "always" or (merge == "auto" and total <= SMALL)
    unreadable = [failure for record in records for failure in record.unreadable]
    listing = folder.output.with_name(f"{folder.output.name}.unreadable.json")
    if unreadable:
        write_json(listing, [{"path": path, "reason": reason} for path, reason in unreadable])
    else:
        listing.unlink(missing_ok=True)
    manifest = {
        **manifest,
        "state": "complete",
        "rows": sum(record.rows for record in records),
        "unreadable": len(unreadable),
        "columns": _columns(StoredTable(folder.table(kept[0].number), folder.format)),
    }
    files = _one_file(folder, kept, manifest) if one_file else _whole_folder(folder, kept, manifest)
    return [*files, *([listing] if unreadable else [])]


def _refuse_several_grids(kept: Sequence[PartRecord]) -> None:
    """One array has one shape: parts that are uniform in themselves may still differ from each other."""
    for record in kept:
        if any(list(shape) != list(kept[0].patches[name]) for name, shape in record.patches.items()):
            raise DataError(
                f"patch features need images of one size, and part {record.number} has another grid than part "
                f"{kept[0].number}; use --fit crop with --overwrite, or leave --patches out"
            )


def complete_output(output: Path) -> list[Path]:
    """The files of a finished output that are there."""
    beside = [output.with_name(f"{output.name}{ending}") for ending in (".json", ".unreadable.json")]
    return [path for path in (output, *beside) if path.exists()]


def _one_file(folder: PartsFolder, kept: Sequence[PartRecord], manifest: Mapping[str, Any]) -> list[Path]:
    output = folder.output
    pieces = [StoredTable(folder.table(record.number), folder.format) for record in kept]
    patches: dict[str, Any] = {}
    for name, shape in kept[0].patches.items():
        file = _beside(output, name)
        _join_arrays(file, [folder.patch_file(name, record.number) for record in kept], shape)
        patches[name] = {"files": [file.name], "shape": shape}
    write_table(output, pieces, folder.format, notes=manifest["request"])
    tables = [{"file": output.name, "rows": manifest["rows"]}]
    beside = output.with_name(f"{output.name}.json")
    write_json(beside, {**manifest, "tables": tables, "patches": patches})
    shutil.rmtree(folder.path)
    columns = table_files(output, list(pieces[0]), folder.format).values() if folder.format == "npy" else [output]
    return [*dict.fromkeys(columns), *(output.with_name(entry["files"][0]) for entry in patches.values()), beside]


def _whole_folder(folder: PartsFolder, kept: Sequence[PartRecord], manifest: Mapping[str, Any]) -> list[Path]:
    tables = [{"file": folder.table(record.number).name, "rows": record.rows} for record in kept]
    patches = {
        name: {
            "files": [folder.patch_file(name, record.number).relative_to(folder.path).as_posix() for record in kept],
            "shape": shape,
        }
        for name, shape in kept[0].patches.items()
    }
    write_json(folder.path / MANIFEST, {**manifest, "tables": tables, "patches": patches})
    _give_name(folder)
    return [folder.output]


def _give_name(folder: PartsFolder) -> None:
    """Give a folder whose manifest is complete its final name."""
    for record in folder.path.glob("_part-*.json"):
        record.unlink()
    os.replace(folder.path, folder.output)


def _clear(folder: PartsFolder) -> None:
    """Remove `OUT` and `OUT.parts`. Raises ConfigError for a folder that nothing of ours lies in."""
    output = folder.output
    if output.is_dir():
        if manifest_of(output) is None and any(output.iterdir()):
            raise ConfigError(f"{output} is a folder of something else and is not removed; choose another output")
        shutil.rmtree(output)
    shutil.rmtree(folder.path, ignore_errors=True)
    for file in _satellites(output):
        file.unlink(missing_ok=True)
    output.unlink(missing_ok=True)


def _join_arrays(target: Path, files: Iterable[Path], shape: Sequence[int]) -> None:
    arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    with written_file(target) as sink:
        sink.write(npy_header(arrays[0].dtype, (sum(map(len, arrays)), *shape)))
        for array in arrays:
            flat = array.reshape(-1)
            for first in range(0, flat.size, _BLOCK // 2):
                sink.write(np.ascontiguousarray(flat[first : first + _BLOCK // 2]))


def _beside(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}.{name}.npy")


def _columns(table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found = {}
    for name, array in table.items():
        found[name] = {"dtype": "text" if array.dtype.kind == "U" else array.dtype.name, "shape": list(array.shape[1:])}
    return found


def _satellites(output: Path) -> list[Path]:
    """The files that belong to `output` besides itself, as its manifest lists them."""
    manifest = manifest_of(output) if output.is_file() else None
    found = [output.with_name(f"{output.name}{ending}") for ending in (".json", ".unreadable.json")]
    if manifest is not None:
        found += [_beside(output, name) for name in manifest.get("patches", {})]
        if output.suffix == ".npy":
            found += table_files(output, list(manifest.get("columns", {"cls": None})), "npy").values()
    return found
