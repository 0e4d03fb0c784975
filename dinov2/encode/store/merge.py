"""Merge of finished shards: one file where they are small, else their folder under its final name."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dinov2.encode.store.hashing_writer import npy_header, written_file
from dinov2.encode.store.shards import MANIFEST, Shard, ShardFolder, differences, read_manifest
from dinov2.encode.store.tables import StoredTable, table_files, write_table
from dinov2.errors import ConfigError, DataError
from dinov2.whole_files import write_json

__all__ = ["SMALL", "Merge", "begin", "complete_output", "finish"]

SMALL = 1 << 30
"""Bytes of all parts together up to which they become one file."""

Merge = Literal["auto", "always", "never"]
"""Whether the parts become one file: when they are small, in any case, or not at all."""

_BLOCK = 32 << 20  # numbers copied at a time


def begin(folder: ShardFolder, request: Mapping[str, object], about: Mapping[str, object], *, overwrite: bool) -> bool:
    """Make ready for writing parts, or for going on; True when the output is finished already.

    Raises DataError naming what differs when the output or its parts are of another request, ConfigError when the
    output exists and is none of ours.
    """
    if overwrite:
        _clear(folder)
    output, done = folder.output, read_manifest(folder.output)
    if done is not None and done.get("state") == "complete" and output.exists():
        if changed := differences(done["request"], request):
            raise DataError(
                f"{output} holds features of other settings: {'; '.join(changed[:4])}; choose another output, or "
                "replace it with --overwrite"
            )
        shutil.rmtree(folder.path, ignore_errors=True)  # what a kill left after the output was finished
        return True
    begun = read_manifest(folder.path)
    if output.exists() and begun is None:
        hint = "" if output.is_dir() else ", or replace it with --overwrite"
        raise ConfigError(f"{output} exists and holds no features of ours; choose another output{hint}")
    if begun is not None and begun.get("state") == "complete" and not differences(begun["request"], request):
        _give_name(folder)  # a kill came between the last word of its manifest and its name
        return True
    folder.start(request, about)
    return False


def finish(folder: ShardFolder, shards: Sequence[Shard], *, merge: Merge, manifest: Mapping[str, object]) -> list[Path]:
    """Turn the shards into the output and return its files. `manifest` is what it says besides its tables.

    Can be repeated after having been interrupted anywhere. Raises DataError when not one image was readable.
    """
    kept = [shard for shard in shards if shard.rows]
    if not kept:
        raise DataError("none of the images could be read; the first reason is: " + shards[0].unreadable[0][1])
    for shard in kept:  # one array has one shape: shards that are uniform in themselves may still differ
        if shard.patches != kept[0].patches:
            raise DataError(
                f"patch features need images of one size, and part {shard.number} has another grid than part "
                f"{kept[0].number}; use --fit crop with --overwrite, or leave --patches out"
            )
    unreadable = [failure for shard in shards for failure in shard.unreadable]
    listing = folder.output.with_name(f"{folder.output.name}.unreadable.json")
    if unreadable:
        write_json(listing, [{"path": path, "reason": reason} for path, reason in unreadable])
    else:
        listing.unlink(missing_ok=True)
    table = StoredTable(folder.table(kept[0].number))
    manifest = {
        **manifest,
        "state": "complete",
        "rows": sum(shard.rows for shard in shards),
        "unreadable": len(unreadable),
        "columns": {name: _describe(array) for name, array in table.items()},
    }
    total = sum(facts.bytes for shard in shards for facts in shard.files.values())
    one_file = merge == "always" or (merge == "auto" and total <= SMALL)
    files = _one_file(folder, kept, manifest) if one_file else _whole_folder(folder, kept, manifest)
    return [*files, *([listing] if unreadable else [])]


def complete_output(output: Path) -> list[Path]:
    """The files of a finished output that are there."""
    beside = [output.with_name(f"{output.name}{ending}") for ending in (".json", ".unreadable.json")]
    return [path for path in (output, *beside) if path.exists()]


def _one_file(folder: ShardFolder, kept: Sequence[Shard], manifest: Mapping[str, object]) -> list[Path]:
    output, pieces = folder.output, [StoredTable(folder.table(shard.number)) for shard in kept]
    patches = {}
    for name, shape in kept[0].patches.items():
        file = _patches_beside(output, name)
        _join_arrays(file, [folder.patch_file(name, shard.number) for shard in kept], shape)
        patches[name] = {"files": [file.name], "shape": shape}
    request = manifest["request"]
    write_table(output, pieces, folder.format, notes=request if isinstance(request, dict) else None)
    tables = [{"file": output.name, "rows": manifest["rows"]}]
    beside = output.with_name(f"{output.name}.json")
    write_json(beside, {**manifest, "tables": tables, "patches": patches})
    shutil.rmtree(folder.path)
    columns = table_files(output, list(pieces[0]), folder.format).values()
    return [*dict.fromkeys(columns), *(_patches_beside(output, name) for name in patches), beside]


def _whole_folder(folder: ShardFolder, kept: Sequence[Shard], manifest: Mapping[str, object]) -> list[Path]:
    tables = [{"file": folder.table(shard.number).name, "rows": shard.rows} for shard in kept]
    patches = {
        name: {"files": [f"_{name}/{folder.patch_file(name, shard.number).name}" for shard in kept], "shape": shape}
        for name, shape in kept[0].patches.items()
    }
    write_json(folder.path / MANIFEST, {**manifest, "tables": tables, "patches": patches})
    _give_name(folder)
    return [folder.output]


def _give_name(folder: ShardFolder) -> None:
    """Give a folder whose manifest is complete its final name."""
    for record in folder.path.glob("_part-*.json"):
        record.unlink()
    os.replace(folder.path, folder.output)


def _clear(folder: ShardFolder) -> None:
    """Remove `OUT`, the files beside it and `OUT.parts`. Raises ConfigError for a folder that nothing of ours is in."""
    output = folder.output
    manifest = read_manifest(output)
    files = [output.with_name(f"{output.name}{ending}") for ending in (".json", ".unreadable.json")]
    if output.is_dir():
        if manifest is None and any(output.iterdir()):
            raise ConfigError(f"{output} is a folder of something else and is not removed; choose another output")
        shutil.rmtree(output)
    elif output.is_file() and manifest is not None:
        files += [_patches_beside(output, name) for name in manifest.get("patches", {})]
        if output.suffix == ".npy":
            files += table_files(output, list(manifest.get("columns", ())), "npy").values()
    shutil.rmtree(folder.path, ignore_errors=True)
    for file in (*files, output):
        file.unlink(missing_ok=True)


def _join_arrays(target: Path, files: Iterable[Path], shape: Sequence[int]) -> None:
    arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    with written_file(target) as writer:
        writer.write(npy_header(arrays[0].dtype, (sum(map(len, arrays)), *shape)))
        for array in arrays:
            flat = array.reshape(-1)
            for first in range(0, flat.size, _BLOCK):
                writer.write(np.ascontiguousarray(flat[first : first + _BLOCK]))


def _patches_beside(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}.{name}.npy")


def _describe(array: np.ndarray) -> dict[str, object]:
    return {"dtype": "text" if array.dtype.kind == "U" else array.dtype.name, "shape": list(array.shape[1:])}
