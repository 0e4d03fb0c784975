"""State of a training, split into plain values (JSON) and named tensors, and joined again bit for bit.

A checkpoint's state is a nested dict of tensors and Python values. Values go to JSON, so that reading a checkpoint
never unpickles objects; tensors get names made of their path. Small tensors are joined into one buffer per type: the
checkpoint format costs 0.2 ms a tensor, which for a tiny model would be longer than many training steps. In the JSON
tree a dict with one key that starts with `$` stands for something that JSON lacks: `$tensor`, `$packed`, `$tuple`,
`$dict` (keys other than text), `$float` (nan, inf), `$bytes`.
"""

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import DinoError, WeightsError

__all__ = ["copy_into", "join_state", "must_fit", "split_state", "targets_in", "tensor_names"]

_PACKED_BELOW = 1 << 20
"""Bytes; bigger tensors travel alone, where packing would cost memory and save nothing."""


def split_state(state: Mapping[str, object]) -> tuple[object, dict[str, Tensor]]:
    """The JSON tree of `state` and its tensors by name (detached; small ones packed).

    Raises `DinoError` for a value that is neither a tensor nor made of None, bool, int, float, text, bytes, list,
    tuple and dict.
    """
    splitter = _Splitter()
    tree = splitter.encode(state, ())
    return tree, splitter.finish()


def join_state(tree: object, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `split_state` took apart; packed tensors get a memory of their own."""
    match tree:
        case {"$tensor": name}:
            return tensors[name]
        case {"$packed": [name, start, shape]}:
            return tensors[name][start : start + math.prod(shape)].reshape(shape).clone()
        case {"$tuple": items}:
            return tuple(join_state(item, tensors) for item in items)
        case {"$dict": pairs}:
            return {join_state(key, tensors): join_state(value, tensors) for key, value in pairs}
        case {"$float": text}:
            return float(text)
        case {"$bytes": text}:
            return base64.b64decode(text)
        case dict():
            return {key: join_state(value, tensors) for key, value in tree.items()}
        case list():
            return [join_state(item, tensors) for item in tree]
    return tree


def tensor_names(tree: object) -> set[str]:
    """Names of all tensors and packed buffers that a tree mentions."""
    match tree:
        case {"$tensor": name} | {"$packed": [name, _, _]}:
            return {name}
        case dict():
            return set().union(*map(tensor_names, tree.values()))
        case list():
            return set().union(*map(tensor_names, tree))
    return set()


def must_fit(saved: Mapping[Any, Any], current: Mapping[Any, Any], path: str = "") -> None:
    """Raise `WeightsError` unless every tensor of `current` stands in `saved` with the same shape.

    A dict of `current` that holds tensors directly must have exactly the keys that it has in `saved`; dicts that are
    empty or absent in `current` are not compared.
    """
    holds_tensors = any(isinstance(value, Tensor) for value in current.values())
    missing = [f"{path}{key}" for key in current if key not in saved]
    unexpected = [f"{path}{key}" for key in saved if key not in current] if holds_tensors else []
    if missing or unexpected:
        raise WeightsError(
            f"the checkpoint is of another model: it lacks {_some(missing)} and has {_some(unexpected)} too much; "
            "resume with the configuration that it was written with"
        )
    for key, value in current.items():
        other = saved[key]
        if isinstance(value, Tensor):
            if not isinstance(other, Tensor) or other.shape != value.shape:
                found = list(other.shape) if isinstance(other, Tensor) else other
                raise WeightsError(
                    f"the checkpoint is of another model: {path}{key} is {found} there and {list(value.shape)} here; "
                    "resume with the configuration that it was written with"
                )
        elif isinstance(value, Mapping) and isinstance(other, Mapping):
            must_fit(other, value, f"{path}{key}.")


def targets_in(tree: object, current: object) -> dict[str, Tensor]:
    """The tensors of `current` into which the unpacked tensors of the tree can be read directly, by name."""
    match tree:
        case {"$tensor": name} if isinstance(current, Tensor):
            return {name: current}
        case dict() if isinstance(current, Mapping):
            pairs = [(join_state(key, {}), value) for key, value in tree["$dict"]] if "$dict" in tree else tree.items()
            found = [targets_in(value, current[key]) for key, value in pairs if key in current]
            return {name: target for part in found for name, target in part.items()}
    return {}


@torch.no_grad()
def copy_into(state: dict[Any, Any], current: Mapping[Any, Any], lay_out: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Put the tensors of `current` in the place of those of `state`, and the latter's values into them.

    `lay_out(target, full)` is the full tensor as the target is stored, which matters where targets are sharded.
    """
    for key, value in current.items():
        if isinstance(value, Tensor):
            if state[key] is not value:
                value.copy_(lay_out(value, state[key]))
            state[key] = value
        elif isinstance(value, Mapping) and isinstance(state[key], dict):
            copy_into(state[key], value, lay_out)


class _Splitter:
    """Collects the tensors of one state while its values are turned into JSON."""

    def __init__(self) -> None:
        self._single: dict[str, Tensor] = {}
        self._packed: dict[str, list[Tensor]] = {}
        self._lengths: dict[str, int] = {}

    def encode(self, value: object, path: tuple[str, ...]) -> object:
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else {"$float": repr(value)}
            case bytes():
                return {"$bytes": base64.b64encode(value).decode()}
            case Tensor():
                return self._tensor(value.detach(), path)
            case tuple():
                return {"$tuple": self.encode(list(value), path)}
            case list():
                return [self.encode(item, (*path, str(index))) for index, item in enumerate(value)]
            case Mapping():
                if all(isinstance(key, str) and not key.startswith("$") for key in value):
                    return {key: self.encode(item, (*path, key)) for key, item in value.items()}
                keys = [self.encode(key, path) for key in value]
                items = [self.encode(item, (*path, str(key))) for key, item in value.items()]
                return {"$dict": [list(pair) for pair in zip(keys, items, strict=True)]}
        raise DinoError(
            f"the state to save holds a {type(value).__name__} at {'.'.join(path)!r}; turn it into tensors, numbers, "
            "text, lists and dicts"
        )

    def finish(self) -> dict[str, Tensor]:
        return self._single | {name: torch.cat(pieces) for name, pieces in self._packed.items()}

    def _tensor(self, tensor: Tensor, path: tuple[str, ...]) -> dict[str, object]:
        # Subclasses (sharded tensors) know their own pieces and must not be taken apart here.
        packable = type(tensor) is Tensor and tensor.layout is torch.strided
        if packable and tensor.nbytes <= _PACKED_BELOW:
            name = f"$packed.{str(tensor.dtype).removeprefix('torch.')}.{tensor.device.type}"
            start = self._lengths.get(name, 0)
            self._packed.setdefault(name, []).append(tensor.reshape(-1))
            self._lengths[name] = start + tensor.numel()
            return {"$packed": [name, start, list(tensor.shape)]}
        name = ".".join(path)
        while name in self._single or name.startswith("$"):  # {"a.b": x} and {"a": {"b": x}} have one path
            name = "'" + name
        self._single[name] = tensor
        return {"$tensor": name}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
