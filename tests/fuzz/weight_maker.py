"""What makers of bad weight files share: the table of kinds, good files at hand, and file formats written by hand."""

import io
import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.fuzz.ingredients import Ingredients

__all__ = [
    "ABSURD", "KINDS", "NESTED", "TEBIBYTE", "BadFile", "Global", "Maker", "archive_file", "copied", "kind",
    "members_of",
    "parts_of", "persistent", "plain", "reduced", "safetensors_file", "torch_file",
]  # fmt: skip

TEBIBYTE = 1 << 40
ABSURD: tuple[Any, ...] = (
    0, -1, 10**12, 2**63, 2**31 - 1, 10**400, 1e308, -1e-3, float("nan"), float("inf"), "14", "x", "١٤", "", None,
    [], {},
    [14], [14, 14], [1, 2, 3], [0, 0], [10**9, 10**9], [[28, 28], [28, 28]], True, False, 3.5, {"a": 1}, "1" * 5000,
)  # fmt: skip
"""Values that no entry of a table or of a config.json can have, or hardly any."""
NESTED = "[" * 100_000


class BadFile(NamedTuple):
    """A file or folder, and whether nothing may load from it."""

    name: str
    path: Path
    refused: bool


class Maker(NamedTuple):
    """What a kind is made with: its random numbers, the folder for the file, and the good files."""

    rng: random.Random
    folder: Path
    good: Ingredients

    def state(self) -> dict[Any, Any]:
        return dict(self.good.state)

    def key(self) -> str:
        return self.rng.choice(sorted(self.good.state))

    def saved(self, content: Any, name: str = "bad.pth", **options: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, self.folder / name, **options)
        return self.folder / name

    def written(self, content: bytes, name: str = "bad.pth") -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def source(self) -> Path:
        return self.rng.choice([self.good.weights, self.good.release])


KINDS: dict[str, tuple[Callable[[Maker], Path], bool]] = {}


def kind(*, refused: bool) -> Callable[[Callable[[Maker], Path]], Callable[[Maker], Path]]:
    """Adds a function that writes a bad file to the table; `refused` where nothing may load from its files."""

    def add(make: Callable[[Maker], Path]) -> Callable[[Maker], Path]:
        KINDS[make.__name__] = make, refused
        return make

    return add


# Formats by hand


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    # Without the checksum, which would refuse every change before anything else is looked at.
    header["__metadata__"] = {key: text for key, text in header["__metadata__"].items() if key in ("format", "model")}
    return header, content[8 + length :]


def safetensors_file(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def archive_file(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return file.getvalue()


def torch_file(data: bytes, **members: bytes) -> bytes:
    """A file as `torch.save` writes it around this pickle."""
    named = {
        "archive/data.pkl": data,
        "archive/byteorder": b"little",
        **{f"archive/{name}": content for name, content in members.items()},
    }
    return archive_file({**named, "archive/version": b"3\n"})


class Global(NamedTuple):
    module: str
    name: str


def plain(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def persistent(entries: tuple[Any, ...]) -> bytes:
    words = [
        f"c{entry.module}\n{entry.name}\n".encode() if isinstance(entry, Global) else plain(entry) for entry in entries
    ]
    return b"(" + b"".join(words) + b"tQ"


def reduced(module: str, name: str, arguments: list[bytes]) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"
