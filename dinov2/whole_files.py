"""Atomic writing of files, and reading of small JSON files: written under another name, synced, renamed.

A reader of such a file finds the old content or the new one, after a kill, a crash and a full disk as well. What else
can happen to a small JSON file, on the disk or in an editor, `read_json` reports in one sentence.

File names are bytes and need not be valid text; Python holds a byte that is none as a lone surrogate, which no file in
UTF-8 may contain. `write_text` writes it as the characters `\\udce9`: JSON reads that back as the same name, a page
shows it. What has no such escapes, YAML and tables of features, gets `escape_name`, which `unescape_name` undoes.
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from dinov2.errors import DataError
from dinov2.file_lock import lock_file

__all__ = ["atomic_write", "escape_name", "read_json", "unescape_name", "utf8_path", "write_json", "write_text"]

_Content = TypeVar("_Content", dict, list)  # type: ignore[type-arg]

# A lone surrogate, or text that looks like the escape of one, with the backslashes before it.
_TO_ESCAPE = re.compile(r"(\\*)([\ud800-\udfff]|ud[89a-f][0-9a-f]{2})")
_ESCAPED = re.compile(r"(\\+)(ud[89a-f][0-9a-f]{2})")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file beside `path` to write to; it becomes `path` when the block ends well, and is removed otherwise.

    Folders on the way are made. Processes and threads that write the same file take turns. What a kill leaves, hidden
    files `.<name>.tmp` and `.<name>.lock`, goes with the next writing. Raises OSError when the disk is full or refuses,
    and when `path` is a device or a pipe, whose place no file may take.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(errno.EEXIST, "It is a device or a pipe, which no file replaces", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    with lock_file(path.with_name(f".{path.name}.lock")):
        try:
            unfinished.unlink(missing_ok=True)
            unfinished.touch()
            mode = unfinished.stat().st_mode
            yield unfinished
            # Some writers make files that only their owner may read; a result is for whoever may read the folder.
            unfinished.chmod(mode)
            with open(unfinished, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file in UTF-8 as `atomic_write` does; lone surrogates become `\\udce9`. Returns the path."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def escape_name(name: str) -> str:
    """A file name as valid Unicode: lone surrogates become `\\udce9`. Other names stay as they are.

    A backslash before what looks like such an escape already is doubled, so that no two names become one.
    """
    return _TO_ESCAPE.sub(lambda m: m[1] * 2 + (m[2] if len(m[2]) > 1 else f"\\u{ord(m[2]):04x}"), name)


def unescape_name(text: str) -> str:
    """The inverse of `escape_name`: the name with which the file can be opened."""
    return _ESCAPED.sub(lambda m: "\\" * (len(m[1]) // 2) + (chr(int(m[2][1:], 16)) if len(m[1]) % 2 else m[2]), text)


@contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path of the existing file `path` in valid UTF-8, inside the block, for libraries that take no other."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def read_json(path: str | os.PathLike[str], kind: type[_Content]) -> _Content:
    """The content of a JSON file: an object (`kind` dict) or an array (`kind` list).

    Raises `DataError` when there is no such file, it is damaged, or it holds another type.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait
            raise DataError(f"{path} is no regular file; remove it to go on without it")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # an array nested deep exceeds Python's stack
        if isinstance(error, DataError):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}); restore it, or remove it to go on without it") from error
    if not isinstance(content, kind):
        raise DataError(
            f"{path} holds a JSON {type(content).__name__} instead of a {kind.__name__}; restore it, or remove it to "
            "go on without it"
        )
    return content


def write_json(path: Path | str, value: object) -> Path:
    """Write valid JSON (NaN and infinities become null), whole or not at all."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(path, text)


def _finite(value: object) -> object:
    """The same value with what JSON cannot say replaced: not-finite numbers by null, paths and types by text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
