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

__all__ = ["Fits", "argument_checks", "merge_arguments", "refuse_unknown"]

Fits = Mapping[str, Callable[[object], bool]]
"""For every argument name, whether a value can be that argument."""

# What the newest versions pass through every model and these models have no use for.
_PASSED_THROUGH = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "max_seqlen", "is_causal",
    "output_router_logits", "use_cache", "position_ids",
}  # fmt: skip


def refuse_unknown(given: Mapping[str, object], known: Sequence[str], *, what: str) -> None:
    """Raise `TypeError` for a keyword that would be ignored, naming the nearest known one."""
    for name, value in given.items():
        if name in _PASSED_THROUGH or value is None:
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise TypeError(f"{what} got an unexpected keyword argument {name!r}; {hint}")


def merge_arguments(
    values: Sequence[object],
    keywords: Mapping[str, object],
    signatures: Sequence[Sequence[str]],
    fits: Fits,
    *,
    what: str,
) -> dict[str, Any]:
    """Keyword arguments (None where not given) and positional ones as one dict.

    Raises `TypeError` when the positional values fit no signature, or fit several that read them differently, or give
    something that a keyword gives too.
    """
    readings: list[dict[str, object]] = []
    for signature in signatures:
        pairs = list(zip(signature, values, strict=False))
        if len(values) <= len(signature) and all(value is None or fits[name](value) for name, value in pairs):
            reading = {name: value for name, value in pairs if value is not None}
            if not any(_same(reading, other) for other in readings):
                readings.append(reading)
    if len(readings) > 1:  # head masks are factors: of integers the other reading is meant
        readings = [reading for reading in readings if not _are_integers(reading.get("head_mask"))] or readings
    if len(readings) != 1:
        raise TypeError(_explain(values, readings, signatures, what))
    twice = [name for name in readings[0] if keywords.get(name) is not None]
    if twice:
        raise TypeError(f"{what} got {' and '.join(twice)} by position and by keyword; give it once")
    return {**keywords, **readings[0]}


def argument_checks(*, batch: int, tokens: int, heads: int, layers: int, labels: int = 0) -> Fits:
    """Example arguments for a batch of so many images and tokens, and a model of this shape."""

    def shaped(*shapes: tuple[int, ...], ndim: int) -> Callable[[object], bool]:
        return lambda value: isinstance(value, Tensor) and (tuple(value.shape) in shapes or value.ndim == ndim)

    def is_flag(value: object) -> bool:
        return isinstance(value, bool)

    def are_labels(value: object) -> bool:
        if not isinstance(value, Tensor) or value.ndim > 2:
            return False
        # Only class numbers, which are integers, come one an image whatever the number of classes.
        return value.numel() == batch * labels or (value.numel() == batch and _are_integers(value))

    return {
        "bool_masked_pos": shaped(ndim=2),
        "head_mask": shaped((heads,), (layers, heads), ndim=5),
        "attention_mask": shaped((batch, tokens), ndim=4),
        "labels": are_labels,
        "output_attentions": is_flag,
        "output_hidden_states": lambda value: isinstance(value, (bool, int, list, tuple)),
        "return_dict": is_flag,
    }


def _are_integers(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _same(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    return first.keys() == second.keys() and all(first[name] is second[name] for name in first)


def _explain(
    values: Sequence[object],
    readings: Sequence[Mapping[str, object]],
    signatures: Sequence[Sequence[str]],
    what: str,
) -> str:
    given = ", ".join(
        f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value) for value in values
    )
    problem = f"{what} got {given} by position after pixel_values, which"
    if readings:
        choices = " or ".join(" and ".join(reading) or "nothing" for reading in readings)
        return f"{problem} versions of transformers read differently, as {choices}; pass it by keyword"
    known = "; ".join(", ".join(signature) for signature in signatures)
    return f"{problem} fits the signature of no version of transformers ({known}); pass arguments by keyword"
