"""Checkpoints of a run: one folder a step that either is complete or does not exist.

A folder is written under a hidden name, synced to the disk and renamed; `meta.json` comes last and lists the other
files with their sizes, so that a half-copied folder is not mistaken for a checkpoint either, and with their digests
(BLAKE2b, of itself too), so that a damaged one is not resumed from. Tensors are in the format
of `torch.distributed.checkpoint`, also with one process, so that any number of processes can load them; values are in
`state.json`, and `meta.json` can be read without torch. Nothing is unpickled but the format's own index, and that only
with the few types it consists of.
"""

import hashlib
import json
import logging
import os
import pickle
import platform
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any

import torch

from dinov2.distributed import barrier, broadcast_object, get_global_size, is_main_process
from dinov2.engine.state_tree import copy_into, join_state, must_fit, split_state, targets_in, tensor_names
from dinov2.errors import ConfigError, DataError, DinoError, WeightsError
from dinov2.whole_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.filesystem import FileSystemReader

__all__ = ["CheckpointStore"]

_LOG = logging.getLogger("dinov2")

_STATE, _META = "state.json", "meta.json"
# A folder that its successor is just replacing still counts: a kill in that instant must not lose the step.
_FOLDER = re.compile(r"step_(\d{7,})|\.step_(\d{7,})\.replaced")
# How contents that are not what they should be show while they are read.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    DataError,
    EOFError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
# What the index of the checkpoint format is made of; any other name in it is refused.
_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},  # and its dtypes
    "collections": {"OrderedDict"},
}


class CheckpointStore:
    """The checkpoints in `folder`, of which the last `keep` stay (0: all).

    With several processes all of them call `save` and `load`; only the main one touches names and removes folders.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 0:
            raise ConfigError(f"the number of checkpoints to keep is {keep}; write 0 to keep all")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, state: Mapping[str, Any], *, meta: Mapping[str, Any] | None = None) -> Path:
        """Write `state` as the checkpoint of `step` (the number of steps done) and drop the oldest; returns its folder.

        `state` is a nested dict of tensors and plain values, optimiser state dicts included. `meta` (configuration,
        data fingerprint: what JSON holds) joins step, time, versions and number of processes in `meta.json`; a
        dict of its own under `versions` is merged with those of Python and torch.
        Raises `DinoError` when the disk is full or refuses; the earlier checkpoints are intact then.
        """
        final = self._folder_of(step)
        unfinished = self.folder / f".{final.name}.saving"
        tree, tensors = split_state(state)
        facts = _circumstances(step, meta or {})
        try:
            self._on_main(lambda: self._prepare(unfinished))
            _write_tensors(unfinished, tensors)
            self._on_main(lambda: self._complete(unfinished, final, tree, facts))
        except OSError as error:
            if is_main_process():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise DinoError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}); "
                "free some space there and start again: the earlier checkpoints are intact"
            ) from error
        return final

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending; whether their contents are intact is not looked at."""
        if not self.folder.is_dir():
            return []
        matches = [(path, _FOLDER.fullmatch(path.name)) for path in self.folder.iterdir()]
        return sorted({int(match[1] or match[2]) for path, match in matches if match and _is_complete(path)})

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint whose files are as they were written, or None.

        Damaged ones are passed over with a warning. Reads all files of a checkpoint.
        """
        for step in reversed(self.steps()):
            damage = _damage(self._existing(step))
            if not damage:
                return step
            _LOG.warning(f"the checkpoint {self._existing(step)} is damaged and passed over: {damage}")
        return None

    def read_meta(self, step: int) -> dict[str, Any]:
        """Content of `meta.json` of a checkpoint; tensors are not touched."""
        return read_json(self._complete_folder(step) / _META, dict)

    def damaged(self, step: int, reason: str) -> WeightsError:
        """The error that says why the checkpoint of `step` cannot be used, and which one comes before it."""
        before = max((one for one in self.steps() if one < step), default=None)
        remedy = (
            "there is none before it: begin anew in another --output-dir"
            if before is None
            else f"remove the folder to resume from step {before}"
        )
        return WeightsError(f"the checkpoint {self._existing(step)} is damaged ({reason}); {remedy}")

    def load(self, step: int, into: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The state that was saved; its tensors are on the CPU, or those of `into`, filled in place.

        `into` holds the parts to fill, such as `{"model": model.state_dict()}`; what it does not mention is returned as
        new tensors. Raises `WeightsError` when a file is damaged, when a tensor of `into` is missing or has another
        shape, or when a dict of tensors lacks one that was saved.
        """
        folder = self._complete_folder(step)
        damage = broadcast_object(_damage(folder) if is_main_process() else "")
        if damage:
            raise self.damaged(step, damage)
        try:
            return _load(folder, into)
        except WeightsError:
            raise
        except (DinoError, *_DAMAGE) as error:
            raise self.damaged(step, _in_words(error)) from error

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def _existing(self, step: int) -> Path:
        final = self._folder_of(step)
        return final if final.exists() else _replaced(final)

    def _complete_folder(self, step: int) -> Path:
        if step not in self.steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise WeightsError(f"there is no complete checkpoint of step {step} in {self.folder}; it has: {found}")
        return self._existing(step)

    def _on_main(self, action: Any) -> None:
        """Run on the main process; its failure is everybody's, so that nobody waits for a process that gave up."""
        failure: OSError | None = None
        if is_main_process():
            try:
                action()
            except OSError as error:
                failure = error
        failure = broadcast_object(failure)
        if failure is not None:
            raise failure
        barrier()

    def _prepare(self, unfinished: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*"):  # of saves that were killed
            final = self.folder / leftover.name.split(".")[1]
            if leftover == _replaced(final) and not final.exists():
                os.rename(leftover, final)
            else:
                shutil.rmtree(leftover)
        unfinished.mkdir()

    def _complete(self, unfinished: Path, final: Path, tree: Any, facts: dict[str, Any]) -> None:
        _write_synced(unfinished / _STATE, json.dumps(tree))
        files = sorted(unfinished.iterdir())
        sizes = {path.name: path.stat().st_size for path in files}
        facts = json.loads(json.dumps({**facts, "files": sizes}))  # as they will be read
        digests = {path.name: _digest(path) for path in files} | {_META: _digest_of_facts(facts)}
        _write_synced(unfinished / _META, json.dumps({**facts, "digests": digests}, indent=1))
        _sync_folder(unfinished)
        if final.exists():  # the same step once more
            os.rename(final, _replaced(final))
            os.rename(unfinished, final)
            shutil.rmtree(_replaced(final))
        else:
            os.rename(unfinished, final)
        _sync_folder(self.folder)
        self._drop_oldest(just_written=final)

    def _drop_oldest(self, just_written: Path) -> None:
        if self.keep == 0:
            return
        # Those of later steps go first: they are damaged, or the run would have gone on from there.
        others = sorted(
            (folder for folder in map(self._folder_of, self.steps()) if folder != just_written),
            key=lambda folder: (folder < just_written, folder),
        )
        for folder in others[: max(0, len(others) + 1 - self.keep)]:
            # Renamed first: a kill half-way through the removal must not leave half a checkpoint under a good name.
            doomed = folder.with_name(f".{folder.name}.dropped")
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _load(folder: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_loader import load

    tree = read_json(folder / _STATE, dict)
    reader = _index_checking_reader(folder)
    index = reader.read_metadata().state_dict_metadata
    names = tensor_names(tree)
    if not names <= index.keys():
        raise DataError(f"it lacks tensors that its {_STATE} names")
    entries: dict[str, Any] = {name: index[name] for name in names}
    claimed = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries.values())
    if claimed > sum(file.stat().st_size for file in folder.iterdir()):
        raise DataError(f"its tensors would take {claimed:,} bytes, more than its files hold")

    def empty(name: str, device: str) -> torch.Tensor:
        return torch.empty(entries[name].size, dtype=entries[name].properties.dtype, device=device)

    if into is not None:
        must_fit(join_state(tree, {name: empty(name, "meta") for name in names}), into)
    in_place = targets_in(tree, into)
    tensors = {name: in_place[name] if name in in_place else empty(name, "cpu") for name in names}
    with _plain_errors(), torch.no_grad():
        load(dict(tensors), storage_reader=reader, no_dist=get_global_size() == 1)
    state: dict[str, Any] = join_state(tree, tensors)
    if into is not None:
        copy_into(state, into, _laid_out_like)
    return state


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _plain_errors():
        # One thread writes one file, which is synced before `save` returns.
        writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        save(tensors, storage_writer=writer, no_dist=get_global_size() == 1)


def _laid_out_like(target: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """`full` cut into the shards of `target`, if that is a sharded tensor."""
    if type(target) in (torch.Tensor, torch.nn.Parameter):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor):
        return full
    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)


@contextmanager
def _plain_errors() -> "Iterator[None]":
    """The OSError inside a CheckpointException, which is no Exception; and no warning that there is one process."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        causes = [wrapped[0] for wrapped in error.failures.values()]
        for cause in map(_os_error_behind, causes):
            if cause is not None:
                raise cause from error
        raise DinoError(f"torch.distributed.checkpoint failed: {_in_words(*causes, error)}") from error


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """torch's zip writer answers a write that failed with a RuntimeError about its own position."""
    is_zip_writer = "inline_container" in str(error)
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return OSError("a file could not be written whole") if is_zip_writer else None


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _META).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _damage(folder: Path) -> str:
    """Damage of a complete checkpoint in words: its files that are not as written; "" for none."""
    try:
        facts = read_json(folder / _META, dict)
        if "digests" not in facts:  # of a version that wrote none
            return ""
        digests = facts.pop("digests")
        if digests[_META] != _digest_of_facts(facts):
            return f"{_META} is not as it was written"
        changed = [name for name in facts["files"] if _digest(folder / name) != digests[name]]
    except (OSError, *_DAMAGE) as error:
        return _in_words(error)
    return f"{' and '.join(changed)} {'is' if len(changed) == 1 else 'are'} not as written" if changed else ""


def _in_words(error: BaseException, *rest: BaseException) -> str:
    """One line; of the unpickler, whose text advises to load the file unsafely, the name alone."""
    text = "" if isinstance(error, pickle.UnpicklingError) else str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_of_facts(facts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _circumstances(step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, **meta.get("versions", {})}
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"step": step, "time": now, "world_size": get_global_size(), **meta, "versions": versions}


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of the checkpoint format and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib":  # a path of another operating system must not fail to load
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_TYPES.get(module, ()):
            return super().find_class(module, name)
        raise WeightsError(
            f"the index of the checkpoint names {module}.{name}, which has no place there; do not load this file"
        )


def _index_checking_reader(folder: Path) -> "FileSystemReader":
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            file: IO[bytes]
            with open(folder / ".metadata", "rb") as file:
                metadata = _IndexUnpickler(file).load()
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)
