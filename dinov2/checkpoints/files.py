"""Weight files as bytes on a disk: read safely whatever they turn out to be, written whole or not at all.

Pickles are read through `weights_only`: a file with code in it is refused. The format is told by the first bytes, not
by the name, because files get renamed. Nothing but a regular file is opened, and no more is taken into memory than the
file holds. Files written here carry a checksum over names, shapes and bytes, which reading verifies.
"""

import hashlib
import json
import os
import pickle
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoints.adapters import flat_key
from dinov2.checkpoints.download import cache_folder
from dinov2.errors import DinoError, WeightsError, short_repr
from dinov2.models.config import BackboneConfig
from dinov2.whole_files import atomic_write, utf8_path

__all__ = [
    "checksum",
    "read_file",
    "read_json_object",
    "refuse_odd_tensors",
    "refuse_special_file",
    "save_teacher",
    "shard_refused",
    "state_digest",
    "write_state_dict",
    "write_tensors",
    "write_text_file",
    "write_whole",
]

# A zip archive, or the pickle of torch before 1.6: everything else is a download gone wrong.
_PICKLE_STARTS = (b"PK", b"\x80")
_TABLE, _CHECKSUM = "model", "checksum"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Configuration files and indices of shards have some kilobytes.
_LARGEST_JSON = 1 << 26
# Views may repeat numbers, as an expanded scale does; more bytes than these must lie in the file.
_LARGEST_VIEW = 1 << 28
# First bytes of files that are taken for weights, and what they are.
_OTHER_FORMATS = [
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write it"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive, which has to be unpacked first"),
    (b"\xfd7zXZ", "an xz archive, which has to be unpacked first"),
    (b"BZh", "a bzip2 archive, which has to be unpacked first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive, which has to be unpacked first"),
    (b"7z\xbc\xaf", "a 7z archive, which has to be unpacked first"),
    (b"Rar!", "a RAR archive, which has to be unpacked first"),
    (b"%PDF", "a PDF file"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"MZ", "a Windows program"),
    (b"\x7fELF", "a program"),
]
# Formats without such a mark, by the ending of their names.
_OTHER_ENDINGS = {
    ".onnx": "an ONNX model",
    ".tflite": "a TensorFlow Lite model",
    ".pb": "a TensorFlow graph",
    ".index": "a part of a TensorFlow checkpoint",
    ".data-00000-of-00001": "a part of a TensorFlow checkpoint",
    ".msgpack": "a Flax checkpoint",
    ".distcp": "a shard of a distributed checkpoint",
}


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a `.pth`, `.bin` or `.safetensors` file on the CPU, with its decoded `model` table if it has one.

    Raises `WeightsError` for a file that is missing, truncated, no weight file at all, or that holds code.
    """
    path = Path(path)
    size = refuse_special_file(path, kind="weight file")
    memory = _main_memory()
    if memory is not None and size > memory:
        raise WeightsError(
            f"the weight file {path} has {size / 1e9:.1f} GB and this machine {memory / 1e9:.1f} GB of memory; give a "
            "smaller model, or use a machine with more memory"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        content = _read_safetensors(path, size) if _is_safetensors(start) else _read_torch(path, start, size)
    except WeightsError:
        raise
    except PermissionError as error:
        raise WeightsError(
            f"the weight file {path} cannot be read ({error.strerror}); check its permissions"
        ) from error
    except Exception as error:  # damaged bytes make the readers raise whatever comes first
        raise _no_weight_file(path) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    _refuse_inflated_views(content, path)
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `WeightsError` when there is none in it."""
    if refuse_special_file(path, kind="JSON file") > _LARGEST_JSON:
        raise WeightsError(f"{path} is too large for a configuration file; download or copy it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise WeightsError(f"{path} cannot be read ({reason}); download or copy it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object; download or copy it again")
    return content


def refuse_special_file(path: Path, *, kind: str) -> int:
    """Size in bytes of a regular file; raises `WeightsError` for anything else, without opening it.

    Opening a FIFO waits for a writer, and a device may never end. `kind` is how the message calls the file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # missing, unreachable, or a name that no file can have
        reason = getattr(error, "strerror", None)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError) and reason:
            raise WeightsError(f"the {kind} {path} cannot be read ({reason}); check the path") from error
        raise WeightsError(f"there is no {kind} {path}; check the path") from error
    if stat.S_ISDIR(status.st_mode):
        example = ", such as a teacher_checkpoint.pth" if kind == "weight file" else ""
        raise WeightsError(f"{path} is a folder; give the {kind} in it{example}")
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        what = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise WeightsError(f"{path} is a {what} and no {kind}; write its content to a regular file first")
    return status.st_size


def refuse_odd_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises `WeightsError` for tensors that are no weights: integer, complex, sparse, quantised, without values."""
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            raise WeightsError(f"{key} of {source} is a sparse, nested or quantised tensor; give dense weights")
        if value.dtype not in _DTYPES:
            name = str(value.dtype).removeprefix("torch.")
            raise WeightsError(f"{key} of {source} is {name}, and weights are float32, float16 or bfloat16; convert it")
        if value.is_meta:
            raise WeightsError(f"{key} of {source} is on the meta device and has no values; save the weights again")


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, whatever its order or device."""
    digest = hashlib.sha256()
    for part in _pieces(state):
        digest.update(part)
    return digest.hexdigest()


def checksum(state: Mapping[str, Tensor], table: Mapping[str, Any] | None = None) -> str:
    """CRC-32 of a state dict and its `model` table, which finds damage at a tenth of the cost of SHA-256."""
    value = zlib.crc32(json.dumps(table, sort_keys=True).encode())
    for part in _pieces(state):
        value = zlib.crc32(part, value)
    return f"crc32:{value:08x}"


def shard_refused(source: str) -> WeightsError:
    """The refusal of a file that one process of a sharded training wrote for itself."""
    return WeightsError(
        f"{source} holds one process's shard of a training state and no whole model; all processes' files are needed "
        "to put it together, so give the run's exported teacher (eval/training_*/teacher_checkpoint.pth)"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Any] | None = None) -> None:
    """Writes a safetensors file, with checksum and `model` table in its metadata; errors as in `write_whole`.

    The same tensors and table give the same bytes.
    """
    from safetensors.torch import save_file

    # The format refuses tensors that share memory and ones with strides of their own.
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    metadata = {_CHECKSUM: checksum(own, table), "format": "pt"}
    if table is not None:
        metadata[_TABLE] = json.dumps(table)

    def write(file: Path) -> None:
        save_file(own, file, metadata=metadata)
        _sort_header(file)

    write_whole(path, write)


def write_state_dict(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Any] | None = None) -> None:
    """Writes a bare state dict in torch's format, as the releases are; errors as in `write_whole`.

    Checksum and `model` table go where modules keep the versions of their parameters, which a strict `load_state_dict`
    reads past: whoever loads the file finds tensors and nothing else.
    """
    from collections import OrderedDict

    state: Any = OrderedDict((key, value.detach().cpu().contiguous()) for key, value in tensors.items())
    hidden = {"version": 1, _CHECKSUM: checksum(state, table), **({} if table is None else {_TABLE: dict(table)})}
    state._metadata = OrderedDict({"": hidden})
    write_whole(path, lambda file: torch.save(state, file))


def save_teacher(path: str | os.PathLike[str], teacher: Mapping[str, Tensor], config: BackboneConfig) -> None:
    """Write `{"teacher": tensors, "model": table}` as the release does, and the backbone as safetensors beside it.

    The first file carries a checksum; errors as in `write_whole`.
    """
    path, table = Path(path), config.table()
    teacher = {key: value.detach().cpu().contiguous() for key, value in teacher.items()}
    content = {"teacher": teacher, _TABLE: table, _CHECKSUM: checksum(teacher, table)}
    write_whole(path, lambda file: torch.save(content, file))

    backbone = {
        flat_key(key.removeprefix("backbone.")): value for key, value in teacher.items() if key.startswith("backbone.")
    }
    write_tensors(path.with_name("backbone.safetensors"), backbone, table)


def write_text_file(path: Path, text: str) -> None:
    """Writes a text file; errors as in `write_whole`."""

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_whole(path, write)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` write a file under another name and renames it, so that no reader finds half of one.

    Raises `DinoError` when the disk is full or refuses; nothing is left behind then.
    """
    from safetensors import SafetensorError

    try:
        with atomic_write(path) as unfinished:
            write(unfinished)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of both formats have errors of their own
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise DinoError(f"{path} could not be written ({reason}); free some space there and start again") from error


def _is_safetensors(start: bytes) -> bool:
    # Eight bytes with the length of the header, then the header, which is JSON.
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def _read_torch(path: Path, start: bytes, size: int) -> Any:
    if not start.startswith(_PICKLE_STARTS):
        raise _no_weight_file(path, start)
    if start.startswith(b"PK"):
        _check_archive(path, size)
    try:
        # Opened here: given a name, torch would judge by its ending.
        with warnings.catch_warnings(), open(path, "rb") as file:
            # Pickle protocols that torch does not write itself, deprecated types: what matters is said by the error.
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "ShardedTensor" in str(error) or "torch.distributed" in str(error):
            raise shard_refused(str(path)) from error
        # The same error stands for a refused class and for damaged bytes; torch names the former. Pickles that torch
        # did not write use operations that it does not know.
        if "GLOBAL" not in str(error) and (start.startswith(b"PK") or "Unsupported" not in str(error)):
            raise
        raise WeightsError(
            f"{path} holds Python objects besides tensors and was refused, because loading them could run code; "
            "ask its author for a plain state dict"
        ) from error
    if not isinstance(content, dict):
        return content
    hidden = getattr(content, "_metadata", None)
    root = hidden.get("") if isinstance(hidden, dict) else None
    root = root if isinstance(root, dict) else {}
    table = root.get(_TABLE) if isinstance(root.get(_TABLE), dict) else None
    if isinstance(root.get(_CHECKSUM), str):
        _verify(path, root[_CHECKSUM], content, table)
    elif isinstance(content.get(_CHECKSUM), str):
        _verify(path, content[_CHECKSUM], content.get("teacher"), content.get(_TABLE))
    return {**content, _TABLE: table} if table is not None and _TABLE not in content else content


def _check_archive(path: Path, size: int) -> None:
    """Refuses zip archives that torch did not write as weights, and ones whose entries claim more than the file has."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript program; open it with torch.jit.load and save the weights alone: "
            "torch.save(model.state_dict(), FILE)"
        )
    if "data.pkl" not in names:
        inner = entries[0].filename if entries else "nothing"
        what = "a NumPy archive" if inner.endswith(".npy") else f"a zip archive of other files ({short_repr(inner)})"
        raise WeightsError(f"{path} is {what} and no weight file; give the .pth or .safetensors file of the model")
    if sum(entry.file_size for entry in entries) > size:
        raise WeightsError(f"{path} is compressed or claims more bytes than it has; save it again with torch.save")


def _read_safetensors(path: Path, size: int) -> dict[str, Any]:
    from safetensors import safe_open

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, size)))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    if ends and 8 + length + max(ends) > size:
        claimed = 8 + length + max(ends)
        raise WeightsError(
            f"{path} is only a part of a weight file ({size:,} of {short_repr(claimed)} bytes); {_how_to_replace(path)}"
        )
    with utf8_path(path) as name, safe_open(name, framework="pt", device="cpu") as file:
        content: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    text = metadata.get(_TABLE, "")
    table = json.loads(text) if text.startswith("{") else None  # files of others may say something else there
    if _CHECKSUM in metadata:
        _verify(path, metadata[_CHECKSUM], content, table)
    return content if table is None else {**content, _TABLE: table}


def _sort_header(file: Path) -> None:
    """Rewrites a safetensors header in place with its metadata in order, which the writer takes from a hash map."""
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same entries in another order"
        stream.seek(8)
        stream.write(text.ljust(length))


def _verify(path: Path, expected: str, state: Any, table: Any) -> None:
    tensors = {key: value for key, value in (state.items() if isinstance(state, dict) else ()) if key != _TABLE}
    try:
        agrees = checksum(tensors, table) == expected
    except Exception:  # damaged beyond what can be summed up
        agrees = False
    if not agrees:
        raise WeightsError(f"{path} is damaged (its content does not have the checksum in it); {_how_to_replace(path)}")


def _pieces(state: Mapping[str, Tensor]) -> Iterator[Any]:
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        yield f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _refuse_inflated_views(content: Mapping[Any, Any], path: Path) -> None:
    """Refuses tensors that claim more numbers than lie in the file, such as views with a stride of zero."""
    for key, value in content.items():
        if isinstance(value, dict):
            for inner, tensor in value.items():
                _refuse_inflated_view(tensor, f"{short_repr(key)}/{short_repr(inner)}", path)
        else:
            _refuse_inflated_view(value, short_repr(key), path)


def _refuse_inflated_view(value: Any, name: str, path: Path) -> None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_nested:
        return
    claimed = value.numel() * value.element_size()
    if claimed > max(value.untyped_storage().nbytes(), _LARGEST_VIEW):
        raise WeightsError(
            f"{path} is damaged or harmful: its tensor {name} claims {claimed:,} bytes, and "
            f"{value.untyped_storage().nbytes():,} are in the file; ask its author for another one"
        )


def _main_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _how_to_replace(path: Path) -> str:
    if path.parent.absolute() == cache_folder().absolute():
        return f"delete {path.name} there and give the same command again, which downloads it anew"
    return "download or copy it again"


def _no_weight_file(path: Path, start: bytes = b"") -> WeightsError:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return WeightsError(
            f"{path} is no weight file but a web page, which a server sent instead; download it again from its address"
        )
    if text.startswith(b"version https://git-lfs"):
        return WeightsError(f"{path} is no weight file but a pointer to one; fetch it with: git lfs pull")
    other = next((what for magic, what in _OTHER_FORMATS if start.startswith(magic)), None)
    if start[4:8] == b"TFL3":
        other = "a TensorFlow Lite model"
    elif path.suffix in _OTHER_ENDINGS:
        other = _OTHER_ENDINGS[path.suffix]
    elif start.startswith(b"\x08") and b"pytorch" in start[:64]:
        other = "an ONNX model"
    elif start[257:262] == b"ustar":
        other = "a tar archive, which has to be unpacked first"
    elif other is None and start and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        other = "a text file"
    if other is not None:
        return WeightsError(f"{path} is no weight file but {other}; give the model's .pth or .safetensors file")
    return WeightsError(f"{path} is no weight file (or only a part of one); {_how_to_replace(path)}")
