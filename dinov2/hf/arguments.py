"""Positional arguments that mean different things in different versions of transformers, told apart by type and shape.

The third argument of a model has been a head mask, a flag and an attention mask; the second of a classifier a head
mask and labels. The values are read by the signature of every version; where all readings that are possible agree it
is taken, else the call is refused with the keywords to write instead. Keywords are the same in all versions.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNSET", "Fits", "fitting", "merged", "refuse_unknown", "without_none"]

UNSET: Any = object()
"""Stands for an argument that was not given, where None means something else."""

Fits = Mapping[str, Callable[[Any], bool]]
"""For every argument name, whether a value can be that argument."""

# What the newest versions pass through every model and these models have no use for.
_PASSED_THROUGH = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "max_seqlen", "is_causal",
    "output_router_logits", "use_cache", "position_ids",
}  # fmt: skip


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], *, what: str) -> None:
    """Raises `TypeError` for a keyword that would be ignored, naming the nearest known one."""
    for name, value in given.items():
        if name in _PASSED_THROUGH or value is None:
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise TypeError(f"{what} got an unexpected keyword argument {name!r}; {hint}")


def merged(
    values: Sequence[Any], named: Mapping[str, Any], signatures: Sequence[Sequence[str]], fits: Fits, *, what: str
) -> dict[str, Any]:
    """Keyword arguments (`UNSET` where not given) and positional ones as one dict of what was given.

    Raises `TypeError` when the positional values fit no signature, or fit several that read them differently, or give
    something that a keyword gives too.
    """
    keywords = {name: value for name, value in named.items() if value is not UNSET}
    if not values:
        return keywords
    readings: list[dict[str, Any]] = []
    for signature in signatures:
        if len(values) > len(signature):
            continue
        pairs = list(zip(signature, values, strict=False))
        if all(value is None or fits[name](value) for name, value in pairs):
            reading = {name: value for name, value in pairs if value is not None}
            if not any(_same(reading, other) for other in readings):
                readings.append(reading)
    if len(readings) > 1:  # head masks are factors: of integers the other reading is meant
        readings = [reading for reading in readings if not _are_integers(reading.get("head_mask"))] or readings
    if len(readings) != 1:
        raise TypeError(_refusal(values, readings, signatures, what))
    twice = [name for name in readings[0] if keywords.get(name) is not None]
    if twice:
        raise TypeError(f"{what} got {' and '.join(twice)} by position and by keyword; give it once")
    return {**keywords, **readings[0]}


def without_none(**values: Any) -> dict[str, Any]:
    """The keyword arguments that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def fitting(*, batch: int, tokens: int, heads: int, layers: int, labels: int = 0) -> Fits:
    """What values of the arguments look like for a batch of so many images, tokens, and a model of this shape."""

    def shaped(*shapes: tuple[int, ...]) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, Tensor) and tuple(value.shape) in shapes

    def is_flag(value: Any) -> bool:
        return isinstance(value, bool)

    def are_labels(value: Any) -> bool:
        if not isinstance(value, Tensor) or value.ndim > 2:
            return False
        # Only class numbers, which are integers, come one an image whatever the number of classes.
        return value.numel() == batch * labels or (value.numel() == batch and _are_integers(value))

    return {
        "bool_masked_pos": lambda value: isinstance(value, Tensor) and value.ndim == 2,
        "head_mask": lambda value: (
            shaped((heads,), (layers, heads))(value) or (isinstance(value, Tensor) and value.ndim == 5)
        ),
        "attention_mask": lambda value: (
            shaped((batch, tokens))(value) or (isinstance(value, Tensor) and value.ndim == 4)
        ),
        "labels": are_labels,
        "output_attentions": is_flag,
        "output_hidden_states": lambda value: is_flag(value) or isinstance(value, (int, list, tuple)),
        "return_dict": is_flag,
    }


def _are_integers(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(first[name] is second[name] for name in first)


def _refusal(
    values: Sequence[Any], readings: Sequence[Mapping[str, Any]], signatures: Sequence[Sequence[str]], what: str
) -> str:
    given = ", ".join(
        f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value) for value in values
    )
    if readings:
        choices = " or ".join(" and ".join(reading) or "nothing" for reading in readings)
        return (
            f"{what} got {given} by position after pixel_values, which versions of transformers read differently, as "
            f"{choices}; pass it by keyword"
        )
    known = "; ".join(", ".join(signature) for signature in signatures)
    return (
        f"{what} got {given} by position after pixel_values, which fits the signature of no version of transformers "
        f"({known}); pass arguments by keyword"
    )
