"""The config tree seen as dotted keys: their table, what they mean, and plain values turned into typed ones.

Everything is derived from the dataclasses: types from their annotations, sentences from the strings under the fields.
A value is converted only where nothing is lost (a whole number for a number, `1e-6` read as text by a YAML 1.1 parser);
anything else is refused with the key's name.
"""

import ast
import dataclasses
import inspect
import math
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from dinov2.configs.checks import shown
from dinov2.configs.packaged import read_packaged
from dinov2.configs.schema import Config
from dinov2.errors import ConfigError

__all__ = ["KeyDescription", "Leaf", "build_section", "describe", "leaves", "section_names", "to_dict"]

_Section = TypeVar("_Section")
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_COUNTS = {2: "2 numbers", 3: "3 numbers"}


class Leaf(NamedTuple):
    """One key that holds a value: its section, annotation, default, and what null stands for (None: refused)."""

    section: type
    annotation: Any
    default: object
    null: object


class KeyDescription(NamedTuple):
    """One row of the configuration page; `is_release_key` tells the public release's keys from those added here."""

    key: str
    type: str
    default: object
    sentence: str
    is_release_key: bool


@cache
def leaves() -> Mapping[str, Leaf]:
    """Every dotted key in the order of the tree."""
    return types.MappingProxyType(dict(_walk(Config(), "")))


@cache
def section_names() -> frozenset[str]:
    """Every dotted name that holds keys instead of a value, such as `optim` or `compute_precision.student`."""
    names: set[str] = set()
    for key in leaves():
        parts = key.split(".")[:-1]
        names.update(".".join(parts[: length + 1]) for length in range(len(parts)))
    return frozenset(names)


def describe() -> list[KeyDescription]:
    """All keys with type, default and sentence, for the configuration page."""
    release_keys = set(_flat(read_packaged("ssl_default_config")))
    return [
        KeyDescription(
            key,
            _type_text(leaf.annotation),
            leaf.default,
            _sentences(leaf.section)[key.rpartition(".")[2]],
            key in release_keys,
        )
        for key, leaf in leaves().items()
    ]


def to_dict(cfg: Config) -> dict[str, Any]:
    """The tree as plain nested dictionaries and lists, all keys included."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(cfg))
    return plain


def build_section(
    section: type[_Section], values: Mapping[str, Any], where: Callable[[str], str], prefix: str = ""
) -> _Section:
    """A `section` (the whole `Config`, or a part) from plain nested `values`, of which every key must be there.

    `where` maps a dotted key to words like " in my.yaml" for the message. Raises ConfigError for a wrong type.
    """
    arguments: dict[str, Any] = {}
    for name, annotation in get_type_hints(section).items():
        key, value = f"{prefix}{name}", values[name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            arguments[name] = build_section(annotation, value, where, f"{key}.")
            continue
        try:
            arguments[name] = _typed(value, annotation, leaves()[key].null)
        except TypeError:
            raise ConfigError(
                f"{key} is {shown(value)}{where(key)}; write {_article(_type_text(annotation))}"
            ) from None
    return section(**arguments)


def _type_text(annotation: Any) -> str:
    """A type annotation in words for people: `whole number`, `list of 2 numbers`, `mlp or swiglu`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {'numbers' if Ellipsis in arguments else _COUNTS[len(arguments)]}"
    if origin is types.UnionType:
        return " or ".join(_type_text(argument) for argument in arguments)
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", types.NoneType: "null"}
    return words[annotation]


def _article(text: str) -> str:
    # "true or false" and lists of choices are written as they stand.
    return f"a {text}" if text.startswith(("whole", "number", "list")) else text


def _typed(value: object, annotation: Any, null: object) -> object:
    """`value` as the type that `annotation` names; TypeError when that would lose or invent something."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is types.UnionType:
        return None if value is None else _typed(value, arguments[0], None)
    if value is None and null is not None:
        return null
    if origin is tuple and isinstance(value, list | tuple):
        if value and (Ellipsis in arguments or len(value) == len(arguments)):
            return tuple(_typed(item, float, None) for item in value)
        raise TypeError
    if origin is Literal and value in arguments:
        return value
    if annotation is bool and (isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))):
        return bool(value)
    if annotation is str and isinstance(value, str):
        return value
    if annotation in (int, float) and not isinstance(value, bool):
        return _number(value, annotation)
    raise TypeError


def _number(value: object, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, str) and kind is float and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, int | float) and math.isfinite(value) and (kind is float or value == int(value)):
        return kind(value)
    raise TypeError


def _walk(section: Any, prefix: str) -> Iterator[tuple[str, Leaf]]:
    hints = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        default = getattr(section, field.name)
        if dataclasses.is_dataclass(default):
            yield from _walk(default, f"{prefix}{field.name}.")
        else:
            null = field.metadata.get("null", "" if hints[field.name] is str else None)
            yield f"{prefix}{field.name}", Leaf(type(section), hints[field.name], default, null)


@cache
def _sentences(section: type) -> Mapping[str, str]:
    """Field name -> the string that stands under it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(sentence))):
                found[name] = " ".join(sentence.split())
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
