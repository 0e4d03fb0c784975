"""Reading of YAML files and `key=value` overrides into a `Config`, and writing of YAML.

The order is default <- preset <- file <- overrides, the last one wins and lists are replaced whole, as in the release.
OmegaConf reads, merges and resolves `${...}`; the dataclasses then decide. Unlike the release, an unknown key is an
error that names its nearest neighbour, because a misspelt key that does nothing costs a training run.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_origin

from omegaconf import OmegaConf

from dinov2.configs.checks import shown
from dinov2.configs.keys import build_section, leaves, section_names, to_dict
from dinov2.configs.packaged import find_config, find_preset, parse_yaml
from dinov2.configs.schema import Config
from dinov2.errors import ConfigError
from dinov2.whole_files import escape_name, unescape_name

__all__ = [
    "apply_overrides",
    "differing_keys",
    "from_dict",
    "load_and_merge_config",
    "load_config",
    "to_yaml",
]


class _Source(NamedTuple):
    """Values from one place; `label` names a file in messages and is empty for overrides, which show themselves."""

    label: str
    values: Mapping[str, Any]


def load_config(
    config_name: str | os.PathLike[str] | None = None, overrides: Sequence[str] = (), *, preset: str | None = None
) -> Config:
    """The default, changed by a preset, then by a YAML file or packaged config, then by `a.b=c` overrides.

    `config_name` is a path, or a name such as `train/vitl16_short`, `vitl16_short` or `eval/vits14_pretrain`; None or
    "" takes none. The `config.yaml` of a run, of this package or of the release, loads as well. Raises ConfigError for
    a missing file, an unknown key, a wrong type or a value that cannot be used.
    """
    sources = []
    if preset:
        sources.append(_Source(*find_preset(preset)))
    if config_name:
        label, values = find_config(config_name)
        sources.append(_Source(label, _with_text(values, unescape_name)))
    return _merged(Config(), [*sources, *_parsed(overrides)])


def load_and_merge_config(config_name: str) -> Config:
    """The packaged config `config_name` on top of the default; the release's name for it."""
    return load_config(config_name)


def apply_overrides(cfg: Config, overrides: Sequence[str]) -> Config:
    """A copy of `cfg` changed by `a.b=c` overrides; raises ConfigError as `load_config` does."""
    return _merged(cfg, list(_parsed(overrides)))


def from_dict(values: Mapping[str, Any]) -> Config:
    """A `Config` from nested dictionaries, with the default where a key is missing; `${` has no meaning here."""
    return _merged(Config(), [_Source("the given dictionary", _escaped(values))])


def to_yaml(cfg: Config) -> str:
    """All keys as YAML; `load_config` of a file with this text gives an equal `Config`.

    YAML has no way to say a name that is not UTF-8, so that texts are written by `escape_name`.
    """
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(_with_text(to_dict(cfg), escape_name))))


def differing_keys(a: Config, b: Config) -> list[str]:
    """The dotted keys whose values differ, in the order of the tree."""
    first, second = to_dict(a), to_dict(b)
    return [key for key in leaves() if _at(first, key) != _at(second, key)]


def _merged(base: Config, sources: Sequence[_Source]) -> Config:
    origin: dict[str, str] = {}
    trees = [_escaped(to_dict(base))]
    for source in sources:
        trees.append(_known(source.values, "", source.label))
        origin.update(dict.fromkeys(_leaf_keys(trees[-1]), source.label))
    try:
        plain = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, trees)), resolve=True)
    # Whatever goes wrong here, `${...}` is the only thing that still had to be worked out.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"a ${{key}} in a value cannot be resolved ({reason}); name an existing key") from error
    assert isinstance(plain, dict)

    def where(key: str) -> str:
        return f" in {origin[key]}" if origin.get(key) else ""

    return build_section(Config, {str(key): value for key, value in plain.items()}, where)


def _known(values: Mapping[Any, Any], prefix: str, label: str) -> dict[str, Any]:
    """`values` without empty sections; ConfigError when a key is unknown or a section holds a value."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in section_names() and "." not in str(name):
            if isinstance(value, Mapping):
                checked[name] = _known(value, f"{key}.", label)
            elif value is not None or not label:  # a file may leave a section empty
                is_what = "empty" if value is None else shown(value)
                raise ConfigError(
                    f"{key} is {is_what}{f' in {label}' if label else ''}, but it is a section; "
                    f"write {key}.<key>=<value>, or the keys below {key}: in a file"
                )
        elif key in leaves() and "." not in str(name):
            if isinstance(value, Mapping):
                below = _first_key(key, value)
                raise ConfigError(
                    f"there is no key {below if below != key else f'below {key}'}{f' in {label}' if label else ''}, "
                    f"because {key} is one value; write it whole, {key}=<value>"
                )
            checked[name] = value
        else:
            raise ConfigError(_unknown_key(_first_key(key, value), label))
    return checked


def _first_key(key: str, value: object) -> str:
    """`key`, followed down to the first value below it."""
    if isinstance(value, Mapping) and value:
        name, below = next(iter(value.items()))
        return _first_key(f"{key}.{name}", below)
    return key


def _unknown_key(key: str, label: str) -> str:
    where = f" in {label}" if label else ""
    indexed = key.partition("[")[0]
    if indexed != key and indexed in leaves():
        return f"there is no key {key}{where}, because {indexed} is one value; write it whole, {indexed}=<value>"
    if key in leaves():
        section, _, name = key.rpartition(".")
        return f"the key {key} is written with a dot{where}; in a file, write {name}: below {section}:"
    nearest = _nearest(key)
    way_out = f"the nearest is {nearest}" if nearest else f"the sections are {', '.join(Config.__dataclass_fields__)}"
    return f"there is no key {key}{where}; {way_out}"


def _nearest(key: str) -> str | None:
    """The known key that was probably meant: the same last name elsewhere, else the most similar spelling."""
    last = key.rpartition(".")[2]
    namesakes = [known for known in leaves() if known.rpartition(".")[2].lower() == last.lower()]
    if namesakes:
        return max(namesakes, key=lambda known: difflib.SequenceMatcher(None, key, known).ratio())
    close = difflib.get_close_matches(key, [*leaves(), *section_names()], n=1, cutoff=0.6)
    if close:
        return close[0]
    by_last_name = {known.rpartition(".")[2]: known for known in leaves()}
    return next((by_last_name[name] for name in difflib.get_close_matches(last, by_last_name, n=1, cutoff=0.7)), None)


def _parsed(overrides: Sequence[str]) -> Iterator[_Source]:
    for override in overrides:
        if override.startswith("-"):
            raise ConfigError(
                f"{override} stands among the overrides; options go before overrides, such as "
                "--output-dir out optim.epochs=10"
            )
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r} is not an override; write key=value, such as optim.epochs=10")
        yield _Source("", _nested(key, _override_value(key, text)))


def _override_value(key: str, text: str) -> object:
    """YAML's reading of `text`; for keys that hold text, the text as it stands (a path may hold `: ` or ` #`)."""
    leaf = leaves().get(key)
    holds_text = leaf is not None and (leaf.annotation is str or get_origin(leaf.annotation) is Literal)
    if holds_text and not text.startswith(("'", '"')):
        return None if text in ("", "null") else text
    way_out = "write a value such as 3, 1e-3, true or [0.1, 0.5]"
    return parse_yaml(f"value: {text}", source=f"the value in {key}={text}", way_out=way_out)["value"]


def _nested(key: str, value: object) -> dict[str, Any]:
    first, dot, rest = key.partition(".")
    return {first: _nested(rest, value) if dot else value}


def _leaf_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in leaves():
            yield key
        else:
            yield from _leaf_keys(value, f"{key}.")


def _escaped(value: Any) -> Any:
    r"""`value` with `${` written as `\${`, so that OmegaConf reads it back as text."""
    # A backslash before `${` escapes it, so those that are already there are doubled.
    return _with_text(value, lambda text: re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text))


def _with_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` made to every text in it; names of keys stay."""
    if isinstance(value, Mapping):
        return {name: _with_text(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _at(tree: Mapping[str, Any], key: str) -> object:
    value: Any = tree
    for name in key.split("."):
        value = value[name]
    return value
