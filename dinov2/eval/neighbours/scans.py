"""The product of queries and training rows in float32, bfloat16 or int8, with a bound on how far it is off.

Write q' and t' for rows as a scan rounds them, e_q = q - q' and e_t = t - t'. Then, by the inequality of Cauchy and
Schwarz, |q.t - q'.t'| <= |e_q||t| + |q'||e_t|, where all four lengths are measured, not assumed. Adding up D products
in float32, in whatever order and with or without fused steps, is off by at most g |q'||t'| with g = D u / (1 - D u),
u = 2^-24 (Higham, "Accuracy and stability of numerical algorithms", section 3.1). A product that is stored in bfloat16
is off by another 2^-8 of itself. Whatever stays below the k-th best by more than this bound is no neighbour; all else
is computed again. So a scan decides about speed, never about the result.

int8 is for processors that lack bfloat16. Where they add products up in 16 bits (AVX2), two products of full bytes
saturate in silence, and queries get 7 bits instead of 8. How many are right is tried out once, with the largest values
there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.engine.parallel import choose_precision
from dinov2.layers.kernels import linear, onednn_is_faster

__all__ = ["GROUP", "SCANS", "Rounded", "Scan", "fastest_scan", "float32_slack", "groups_of", "summation_bound"]

GROUP = 64
"""Training rows whose largest score is compared first."""


class Rounded(NamedTuple):
    """Rows in the number format of a scan."""

    values: Tensor
    """[n, D] as the scan's product takes them."""
    unit: Tensor | None
    """float32 [n]: what a product with this row has to be multiplied by; None is 1. Training rows bring theirs in."""
    length: Tensor
    """float32 [n]: length of the rows as they were."""
    error: Tensor
    """float32 [n]: length of the difference that rounding made."""

    def part(self, first: int, n: int) -> "Rounded":
        """The rows from `first`, n of them or what is left."""
        unit = None if self.unit is None else self.unit[first : first + n]
        values, length, error = (part[first : first + n] for part in (self.values, self.length, self.error))
        return Rounded(values, unit, length, error)


@dataclass(frozen=True)
class Scan:
    """A number format: how rows are rounded to it and multiplied in it."""

    name: str
    round_queries: Callable[[Tensor], Rounded]
    round_train: Callable[[Tensor], Rounded]
    product: Callable[[Rounded, Rounded, Tensor | None], Tensor]
    """(queries, training rows, memory for the result or None) -> [q, b]."""
    stored_rounding: float = 0.0
    """Relative error of a stored product."""
    queries_at_once: int = 512
    """Multiplied with a block of training rows on a CPU (benchmarks/knn.py). Those that make fresh memory for each
    product want small ones; float32 writes to the same memory again."""

    def cut(self, level: Tensor, queries: Rounded, group_length: Tensor, group_error: Tensor) -> Tensor:
        """The least score that a row may have whose similarity is at least `level`.

        float32 [q], rounded queries, the largest length and error of each group of training rows [g] -> [q, g].
        """
        bound = summation_bound(queries.values.shape[-1])
        kept_length = queries.length + queries.error  # at least |q'|
        slack = torch.stack([queries.error + bound * kept_length, (1 + bound) * kept_length])  # [2, q]
        slack *= 1 + 2 * bound + 2**-20  # all of this is rounded itself
        level = level - level.abs() * 2**-20
        if queries.unit is not None:
            slack, level = slack / queries.unit, level / queries.unit
        least = torch.addmm(level.unsqueeze(1), slack.T, torch.stack([group_length, group_error]), alpha=-1)
        if self.stored_rounding:
            least = least / torch.where(least > 0, 1 + self.stored_rounding, 1 - self.stored_rounding)
            least -= least.abs() * 2**-20
        return least


def summation_bound(width: int) -> float:
    """How far a sum of `width` products in float32 is off, over the product of the two lengths.

    A few roundings more than the sum has: scales that int8 multiplies by, and lengths that are computed too.
    """
    steps = (width + 24) * 2.0**-24
    return steps / (1 - steps)


def float32_slack(lengths: Tensor, longest: float, width: int) -> Tensor:  # float32 [Q] -> [Q]
    """How far a float32 similarity is off between queries of these lengths and a row of at most the other length."""
    bound = summation_bound(width)
    return lengths * (bound * (1 + 2 * bound) * longest)


def groups_of(values: Tensor, fill: float) -> Tensor:  # [..., b] -> [..., g, GROUP]
    """The last axis in groups; the last group is filled up."""
    missing = -values.shape[-1] % GROUP
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=fill)
    return values.unflatten(-1, (-1, GROUP))


def fastest_scan(device: torch.device) -> str:
    """The scan that this device multiplies fastest in."""
    if choose_precision("auto", device) is torch.bfloat16:
        return "bfloat16"
    return "int8" if device.type == "cpu" and _query_levels() else "float32"


def _as_they_are(rows: Tensor) -> Rounded:
    length = torch.linalg.vector_norm(rows, dim=1)
    return Rounded(rows, None, length, torch.zeros_like(length))


def _product_float32(queries: Rounded, train: Rounded, out: Tensor | None) -> Tensor:
    if queries.values.device.type == "cpu" and onednn_is_faster():
        return linear(queries.values, train.values, None)
    return torch.mm(queries.values, train.values.T, out=out)


def _to_bfloat16(rows: Tensor) -> Rounded:
    values = rows.bfloat16()
    return Rounded(
        values, None, torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(rows - values.float(), dim=1)
    )


def _product_bfloat16(queries: Rounded, train: Rounded, out: Tensor | None) -> Tensor:
    return torch.mm(queries.values, train.values.T)


_TRAIN_LEVELS = 127


def _quantised(rows: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:  # float32 [n, D], [n], [n]
    """Whole numbers up to `levels`, the unit of each row, and the length of the difference."""
    unit = (rows.abs().amax(dim=1) / levels).clamp_min(2.0**-100)
    numbers = (rows / unit.unsqueeze(1)).round_().clamp_(-levels, levels)
    error = torch.linalg.vector_norm(torch.addcmul(rows, numbers, unit.unsqueeze(1), value=-1), dim=1)
    return numbers, unit, error


def _queries_to_int8(rows: Tensor, levels: int | None = None) -> Rounded:
    levels = levels or _query_levels() or 63
    numbers, unit, error = _quantised(rows, levels)
    values = numbers.add_(levels + 1).to(torch.uint8)  # the zero of bytes without a sign
    return Rounded(values, unit, torch.linalg.vector_norm(rows, dim=1), error)


def _train_to_int8(rows: Tensor) -> Rounded:
    numbers, unit, error = _quantised(rows, _TRAIN_LEVELS)
    packed = torch.ops.onednn.qlinear_prepack(numbers.to(torch.int8), [1, rows.shape[1]])
    return Rounded(packed, unit, torch.linalg.vector_norm(rows, dim=1), error)


def _product_int8(queries: Rounded, train: Rounded, out: Tensor | None, levels: int | None = None) -> Tensor:
    assert train.unit is not None
    zero = (levels or _query_levels() or 63) + 1
    no_zeros = torch.zeros(len(train.unit), dtype=torch.int32)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        queries.values, 1.0, zero, train.values, train.unit, no_zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


SCANS = {
    scan.name: scan
    for scan in (
        Scan("float32", _as_they_are, _as_they_are, _product_float32, queries_at_once=2048),
        Scan("bfloat16", _to_bfloat16, _to_bfloat16, _product_bfloat16, stored_rounding=2.0**-8),
        Scan("int8", _queries_to_int8, _train_to_int8, _product_int8),
    )
}
"""The scans by name."""


@lru_cache(maxsize=1)
def _query_levels() -> int:
    """Levels on either side of zero with which oneDNN multiplies bytes right here; 0 where it is not there, or slow."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return 0
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return 0
    signs = torch.randint(0, 2, (96, 384), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    signs[0], signs[1] = 1, -1
    train = _train_to_int8(signs)  # all numbers lie at the ends of their range
    for levels in (127, 63):
        try:
            scores = _product_int8(_queries_to_int8(signs, levels), train, None, levels)
        except RuntimeError:
            return 0
        if torch.allclose(scores / levels, signs @ signs.T, rtol=0, atol=1e-3):
            return levels
    return 0
