"""Weight files as bytes on a disk: read safely whatever they turn out to be, written whole or not at all.

Pickles are read through `weights_only`: a file with code in it is refused. The format is told by the first bytes, not
by the name, because files get renamed.
"""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import DinoError, WeightsError
from dinov2.whole_files import replacing, utf8_path

__all__ = ["read_file", "read_json", "shard_refused", "write_state_dict", "write_tensors", "write_text", "write_whole"]

# A zip archive, or the pickle of torch before 1.6: everything else is a download gone wrong.
_PICKLE_STARTS = (b"PK", b"\x80")
_TABLE = "model"


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a `.pth`, `.bin` or `.safetensors` file on the CPU, with its decoded `model` table if it has one.

    Raises `WeightsError` for a file that is missing, truncated, no weight file at all, or that holds code.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give the weight file in it, such as a teacher_checkpoint.pth")
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}; check the path")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        content = _read_safetensors(path) if _is_safetensors(start) else _read_torch(path, start)
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
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `WeightsError` when there is none in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise WeightsError(f"{path} cannot be read ({reason}); download or copy it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object; download or copy it again")
    return content


def shard_refused(source: str) -> WeightsError:
    """The refusal of a file that one process of a sharded training wrote for itself."""
    return WeightsError(
        f"{source} holds one process's shard of a training state and no whole model; all processes' files are needed "
        "to put it together, so give the run's exported teacher (eval/training_*/teacher_checkpoint.pth)"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Any] | None = None) -> None:
    """Writes a safetensors file, with the `model` table in its metadata; errors as in `write_whole`."""
    from safetensors.torch import save_file

    # The format refuses tensors that share memory and ones with strides of their own.
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    metadata = {"format": "pt"} if table is None else {"format": "pt", _TABLE: json.dumps(table)}
    write_whole(path, lambda file: save_file(own, file, metadata=metadata))


def write_state_dict(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Any] | None = None) -> None:
    """Writes a bare state dict in torch's format, as the releases are; errors as in `write_whole`.

    The `model` table goes where modules keep the versions of their parameters, which a strict `load_state_dict` reads
    past: whoever loads the file finds tensors and nothing else.
    """
    from collections import OrderedDict

    state: Any = OrderedDict((key, value.detach().cpu().contiguous()) for key, value in tensors.items())
    state._metadata = OrderedDict({"": {"version": 1, **({} if table is None else {_TABLE: dict(table)})}})
    write_whole(path, lambda file: torch.save(state, file))


def write_text(path: Path, text: str) -> None:
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
        with replacing(path) as unfinished:
            write(unfinished)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of both formats have errors of their own
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise DinoError(f"{path} could not be written ({reason}); free some space there and start again") from error


def _is_safetensors(start: bytes) -> bool:
    # Eight bytes with the length of the header, then the header, which is JSON.
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def _read_torch(path: Path, start: bytes) -> Any:
    if not start.startswith(_PICKLE_STARTS):
        raise _no_weight_file(path, start)
    try:
        # Opened here: given a name, torch would judge by its ending.
        with warnings.catch_warnings(), open(path, "rb") as file:
            # Pickle protocols that torch does not write itself: what matters is said by the error, if there is one.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
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
    hidden = getattr(content, "_metadata", None)
    root = hidden.get("") if isinstance(hidden, dict) else None
    table = root.get(_TABLE) if isinstance(root, dict) else None
    return {**content, _TABLE: table} if isinstance(table, dict) and _TABLE not in content else content


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with utf8_path(path) as name, safe_open(name, framework="pt", device="cpu") as file:
        content: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        table = (file.metadata() or {}).get(_TABLE, "")
    if table.startswith("{"):  # files of others may say something else under that key
        content[_TABLE] = json.loads(table)
    return content


def _no_weight_file(path: Path, start: bytes = b"") -> WeightsError:
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return WeightsError(
            f"{path} is no weight file but a web page, which a server sent instead; download it again from its address"
        )
    if text.startswith(b"version https://git-lfs"):
        return WeightsError(f"{path} is no weight file but a pointer to one; fetch it with: git lfs pull")
    return WeightsError(f"{path} is no weight file (or only a part of one); download or copy it again")
