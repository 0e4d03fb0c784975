"""The YAML files that come with the package: names, texts, and the presets with their first words.

A name is the path below `dinov2/configs` without extension (`train/vitl16_short`, `presets/toy`); the last part alone
is enough. Files are read as package data, so a wheel offers the same names as a clone.
"""

import difflib
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from dinov2.errors import ConfigError

__all__ = ["Preset", "find_config", "find_preset", "list_presets", "packaged_names", "parse_yaml", "read_packaged"]

_PRESETS = "presets/"


class Preset(NamedTuple):
    """A recipe that `--preset` takes: its short name and the comment that its file begins with."""

    name: str
    summary: str


@cache
def packaged_names() -> tuple[str, ...]:
    """Names of all YAML files in the package, sorted."""
    return tuple(sorted(_names(files("dinov2.configs"), "")))


def list_presets() -> tuple[Preset, ...]:
    """All presets, each with the first comment lines of its file (up to the first blank comment line) as one text."""
    names = [name for name in packaged_names() if name.startswith(_PRESETS)]
    return tuple(Preset(name.removeprefix(_PRESETS), _first_words(_text(name))) for name in names)


def find_config(name_or_path: str | os.PathLike[str]) -> tuple[str, dict[str, object]]:
    """Label and unresolved content of a YAML file, or of a packaged config by name; a file that exists wins.

    A path that ends in `dinov2/configs/<name>.yaml` works from anywhere, as in the release's commands. Raises
    ConfigError, listing the names, when there is neither.
    """
    path, given = Path(name_or_path), os.fspath(name_or_path)
    if path.is_file():
        return str(path), parse_yaml(_read(path), source=str(path))
    if path.is_dir():
        raise ConfigError(f"the config {given!r} is a folder; write a YAML file, such as {path / 'config.yaml'}")
    name = _packaged_name(given)
    if name is None:
        names = packaged_names()
        near = difflib.get_close_matches(_bare(given), [*names, *(name.rpartition("/")[2] for name in names)], 1)
        nearest = f"; the nearest packaged name is {near[0]}" if near else ""
        raise ConfigError(
            f"there is no file and no packaged config called {given!r}{nearest}; packaged are {', '.join(names)}"
        )
    return f"{name}.yaml", read_packaged(name)


def find_preset(name: str) -> tuple[str, dict[str, object]]:
    """Label and content of the preset `name`; ConfigError with the list of presets when there is none."""
    known = [preset.name for preset in list_presets()]
    short = _bare(name).removeprefix(_PRESETS)
    if short not in known:
        raise ConfigError(f"no preset is called {name!r}; write {' or '.join(known)}")
    return f"{_PRESETS}{short}.yaml", read_packaged(f"{_PRESETS}{short}")


def read_packaged(name: str) -> dict[str, object]:
    """The content of one packaged file, as nested dictionaries, interpolations unresolved."""
    return parse_yaml(_text(name), source=f"{name}.yaml")


def parse_yaml(
    text: str, *, source: str, way_out: str = "write sections such as train:, keys below"
) -> dict[str, object]:
    """YAML text as nested dictionaries, interpolations unresolved; ConfigError when it is not a table of keys."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    # The parser raises a family of errors that differs between versions; each of them means: not readable.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source} is not readable YAML ({reason}); {way_out}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{source} holds no table of keys; {way_out}")
    return {str(key): value for key, value in plain.items()}


def _packaged_name(name_or_path: str) -> str | None:
    bare = _bare(name_or_path)
    below_configs = bare.rpartition("dinov2/configs/")[2]
    matches = [name for name in packaged_names() if below_configs in (name, name.rpartition("/")[2])]
    return matches[0] if matches else None


def _bare(name_or_path: str) -> str:
    return re.sub(r"\.ya?ml$", "", name_or_path.replace("\\", "/"))


def _names(folder: Traversable, prefix: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


def _text(name: str) -> str:
    return files("dinov2.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config {path} cannot be read as text ({error}); name a YAML file") from error


def _first_words(text: str) -> str:
    words = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        words.append(line.strip("# "))
    return " ".join(words)
