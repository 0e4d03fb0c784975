"""Memory that inference on a CPU uses again for the widest intermediate result of every block.

The C library gives large blocks back to the system when they are freed, and the system then clears every page of the
next one: at batch 8 that took a fifth of the time of ViT-S/14 (docs/benchmarks.md). What lives between the two matrices
of a feed-forward network never leaves it, so that one buffer serves all blocks.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from dinov2.layers.linear import is_plain_inference, takes_onednn

__all__ = ["feed_forward_in_scratch", "reuses_memory"]

# Numbers in the buffer at most (64 MiB): more rows are multiplied in several parts, which costs nothing at this size.
_MOST = 2**24

_threads = threading.local()


def reuses_memory(x: Tensor, first: Tensor, last: Tensor) -> bool:  # [..., D], [wide, D], [D', hidden]
    """Whether `feed_forward_in_scratch` may take these: float32 on a CPU without gradients, and no use for oneDNN."""
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or not is_plain_inference(x, first, last):
        return False
    # A fake tensor has no memory, and vmap and the like have no operators that write into `out`.
    if type(x) is not Tensor or torch._C._are_functorch_transforms_active():
        return False
    return not takes_onednn(x, first)


def feed_forward_in_scratch(
    x: Tensor,  # [..., D]
    first: tuple[Tensor, Tensor | None],  # weight [wide, D] and bias [wide]
    activate: Callable[[Tensor], Tensor],  # [N, wide] -> [N, hidden], in place
    last: tuple[Tensor, Tensor | None],  # weight [D', hidden] and bias [D']
) -> Tensor:  # [..., D']
    """Linear, activation, linear, with all that is wide in the buffer; for callers that `reuses_memory` allows."""
    wide, narrow = len(first[0]), len(last[0])
    rows = x.reshape(-1, x.shape[-1])
    results = x.new_empty(len(rows), narrow)
    at_once = max(_MOST // wide, 1)
    for part, result in zip(rows.split(at_once), results.split(at_once), strict=True):
        hidden = _product(part, *first, out=_buffer(len(part) * wide).view(len(part), wide))
        _product(activate(hidden), *last, out=result)
    return results.view(*x.shape[:-1], narrow)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _buffer(n_numbers: int) -> Tensor:
    kept: Tensor | None = getattr(_threads, "buffer", None)
    if kept is None or kept.numel() < n_numbers:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            kept = _threads.buffer = torch.empty(n_numbers, dtype=torch.float32, device="cpu")
    return kept[:n_numbers]
