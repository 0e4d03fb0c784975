"""Features on their way to the disk: numbered shards, each whole or absent, and what they were made of.

While a command runs there is a folder `OUT.parts` with `_manifest.json` (the request: images, weights, transform,
options) and for each finished shard its files and, written last, a record of them. A shard without a record, or whose
files are not as recorded, is made again. At the end the shards become `OUT`: one file when they are small, with its
manifest `OUT.json`, else the folder itself. `OUT` never exists unfinished.

Names of everything but the tables begin with an underscore, so that programs which read a folder of parquet files
pass it over. Several processes may write different shards of one folder. On the disk, and in what users read, a shard
is called a part.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.encode.store.hashing_writer import FileFacts, npy_header
from dinov2.encode.store.tables import TableFormat, write_table
from dinov2.errors import ConfigError, DataError, DinoError
from dinov2.file_lock import lock_file
from dinov2.whole_files import read_json, write_json

__all__ = [
    "MANIFEST",
    "PatchFile",
    "Shard",
    "ShardFolder",
    "ShardWriter",
    "differences",
    "disk_full_as_error",
    "read_manifest",
]

MANIFEST = "_manifest.json"
"""The manifest's name inside a folder of shards; beside a single file `OUT` it is `OUT.json`."""

_STOPPED = "_stopped"


@dataclass(frozen=True)
class Shard:
    """Record of a finished shard: its rows, the images that could not be read, its files."""

    number: int
    rows: int
    unreadable: tuple[tuple[str, str], ...]
    """(path, reason) of the images left out."""
    files: dict[str, FileFacts]
    """By path relative to the folder; no table when no image was readable."""
    patches: dict[str, tuple[int, ...]]
    """Shape `[h, w, D]` of each kind of patch features."""


class ShardFolder:
    """The folder `OUT.parts` beside `output`."""

    def __init__(self, output: Path, table_format: TableFormat) -> None:
        self.output, self.format = output, table_format
        self.path = output.with_name(f"{output.name}.parts")

    def table(self, number: int) -> Path:
        """File of a shard's table."""
        return self.path / f"part-{number:05}.{self.format}"

    def patch_file(self, name: str, number: int) -> Path:
        """File of a shard's patch features."""
        return self.path / f"_{name}" / f"part-{number:05}.npy"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Other commands are kept away inside the block. Raises ConfigError when one is at work already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                # Not the lock that writing the output takes for itself: holding that one, it would wait for us.
                stack.enter_context(lock_file(self.output.with_name(f".{self.output.name}.at-work.lock"), patience=0))
            except BlockingIOError as error:
                raise ConfigError(
                    f"another command is writing {self.output} just now; wait until it has ended, or choose another "
                    "output"
                ) from error
            yield

    def start(self, request: Mapping[str, object], about: Mapping[str, object]) -> None:
        """Make the folder, or go on with it. Raises DataError naming what differs from what it was begun with."""
        self.path.mkdir(parents=True, exist_ok=True)
        for torn in self.path.rglob(".*.tmp"):  # a kill left them
            torn.unlink()
        (self.path / _STOPPED).unlink(missing_ok=True)
        kept = read_manifest(self.path)
        if kept is not None:
            changed = differences(kept["request"], request)
            if changed and any(shard.rows for shard in self.finished().values()):
                raise DataError(
                    f"{self.path} was begun with other settings: {'; '.join(changed[:4])}; repeat the settings of "
                    "then, choose another output, or start anew with --overwrite"
                )
            if changed:  # nothing was computed yet that could be lost
                shutil.rmtree(self.path)
                self.path.mkdir()
        elif any(self.path.glob("*part-*")):
            raise DataError(f"the unfinished features in {self.path} have lost their manifest; use --overwrite")
        write_json(self.path / MANIFEST, {"schema": 1, "state": "unfinished", "request": request, **about})

    def finished(self) -> dict[int, Shard]:
        """The shards that are whole, by number. A file that is missing or not as recorded costs a shard its record."""
        shards = {}
        for file in sorted(self.path.glob("_part-*.json")):
            shard = _read_record(file)
            if shard is not None and all(facts.match(self.path / name) for name, facts in shard.files.items()):
                shards[shard.number] = shard
            else:
                file.unlink()
        return shards

    def has(self, number: int) -> bool:
        """Whether a shard has its record, unchecked: for waiting until another process has written it."""
        return self._record_file(number).exists()

    def stop(self) -> None:
        """Signal other processes to stop."""
        (self.path / _STOPPED).touch()

    def stopped(self) -> bool:
        """Whether a process signalled to stop."""
        return (self.path / _STOPPED).exists()

    def write(
        self,
        number: int,
        columns: Mapping[str, np.ndarray] | None,
        *,
        unreadable: Sequence[tuple[str, str]] = (),
        patches: Mapping[str, "PatchFile"] | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> Shard:
        """Write a shard: its table (None when it has no row), then its record."""
        facts = {} if columns is None else write_table(self.table(number), [columns], self.format, notes=notes)
        facts |= {f"_{name}/{file.path.name}": file.finish() for name, file in (patches or {}).items()}
        shapes = {name: file.shape for name, file in (patches or {}).items()}
        rows = 0 if columns is None else len(next(iter(columns.values())))
        record = {
            "number": number,
            "rows": rows,
            "unreadable": unreadable,
            "files": {name: fact._asdict() for name, fact in facts.items()},
            "patches": shapes,
        }
        write_json(self._record_file(number), record)
        return Shard(number, rows, tuple(unreadable), facts, shapes)

    def _record_file(self, number: int) -> Path:
        return self.path / f"_part-{number:05}.json"


class ShardWriter:
    """A shard being written: columns in memory, patch features on their way to the disk.

    A context manager; the shard is whole when the block ends well, and absent otherwise.
    """

    def __init__(self, folder: ShardFolder, number: int, notes: Mapping[str, object]) -> None:
        self._folder, self._number, self._notes = folder, number, notes
        self._columns: dict[str, list[np.ndarray]] = {}
        self._patches: dict[str, PatchFile] = {}
        self._unreadable: list[tuple[str, str]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                columns = {name: np.concatenate(pieces) for name, pieces in self._columns.items()}
                self._folder.write(
                    self._number,
                    columns or None,
                    unreadable=self._unreadable,
                    patches=self._patches,
                    notes=self._notes,
                )
        finally:
            for file in self._patches.values():
                file.discard()  # does nothing to one that has its name

    def add(self, columns: Mapping[str, np.ndarray], unreadable: Sequence[tuple[str, str]]) -> None:
        """Add the rows of a batch, of which there may be none, and the images left out."""
        self._unreadable += unreadable
        for name, array in columns.items():
            if name.endswith("patches"):
                if name not in self._patches:
                    self._patches[name] = PatchFile(self._folder.patch_file(name, self._number), array.shape[1:])
                self._patches[name].append(array)
            else:
                self._columns.setdefault(name, []).append(array)


class PatchFile:
    """Half-precision patch features of a shard, written batch by batch to a .npy file.

    float16 holds 11 bits; what is beyond its range (65,504) becomes the largest number that it has.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape, self.rows = path, shape, 0
        path.parent.mkdir(exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by finish or discard
        self._file.write(npy_header(np.dtype(np.float16), (0, *shape)))

    def append(self, patches: np.ndarray) -> None:
        """Add rows [B, h, w, D]. Raises DataError when their grid is another one."""
        if patches.shape[1:] != self.shape:
            raise DataError(
                f"patch features need images of one size, but a grid of {patches.shape[1]} x {patches.shape[2]} "
                f"patches follows one of {self.shape[0]} x {self.shape[1]}; use --fit crop, or leave --patches out"
            )
        limit = float(np.finfo(np.float16).max)
        self._file.write(memoryview(np.clip(patches, -limit, limit).astype(np.float16).reshape(-1).view(np.uint8)))
        self.rows += len(patches)

    def finish(self) -> FileFacts:
        """Give the file its name. Its digest is left out: reading it again would cost as much as writing it."""
        self._file.seek(0)
        self._file.write(npy_header(np.dtype(np.float16), (self.rows, *self.shape)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return FileFacts(self.path.stat().st_size, "")

    def discard(self) -> None:
        """Forget what was written so far."""
        with suppress(OSError):  # what it still holds may not fit on the disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards or of a single file; None when there is none, or it cannot be read."""
    file = path / MANIFEST if path.is_dir() else path.with_name(f"{path.name}.json")
    try:
        manifest = read_json(file, dict)
    except DataError:
        return None
    return manifest if isinstance(manifest.get("request"), dict) else None


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Differences between two requests, in words: `model.sha256 (1f3a... before, 77c0... now)`."""
    old, new = _flat(json.loads(json.dumps(before))), _flat(json.loads(json.dumps(now)))  # tuples are lists on disk
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} ({_short(old.get(key))} before, {_short(new.get(key))} now)" for key in keys]


@contextmanager
def disk_full_as_error(output: Path) -> Iterator[None]:
    """A full disk inside the block becomes a sentence. Raises DinoError for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise
        raise DinoError(
            f"no space is left on the disk of {output}; finished parts are kept: free some space and give the same "
            "command again"
        ) from error


def _read_record(file: Path) -> Shard | None:
    try:
        kept = read_json(file, dict)
        return Shard(
            int(kept["number"]),
            int(kept["rows"]),
            tuple((path, reason) for path, reason in kept["unreadable"]),
            {name: FileFacts(**facts) for name, facts in kept["files"].items()},
            {name: tuple(shape) for name, shape in kept["patches"].items()},
        )
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
