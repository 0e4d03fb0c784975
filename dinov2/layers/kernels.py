"""Processor-specific kernels in place of PyTorch's choice, where they compute the same numbers faster.

- *oneDNN*: in float32 on a CPU, PyTorch multiplies with MKL, which uses half of the vector width on AMD processors;
  oneDNN, which comes with PyTorch too, is about twice as fast there. It knows no gradients.
- *Memory used again*: the C library gives large blocks back to the system when they are freed, and the system clears
  every page of the next one, which takes up to a fifth of the time of ViT-S/14 at batch 8. What lives between the two
  matrices of a feed-forward network never leaves it, so that one buffer a thread serves all blocks.
- *Explicit attention*: for short sequences in training and for bfloat16 without AMX, two batched products and a softmax
  beat the fused kernel.
- *Patches as rows*: a convolution with stride p is one matrix product over unfolded patches, whose backward on a CPU
  spends no time in layout changes.

The layers call their modules. A kernel takes the place of a call only where `is_untouched` says that nobody can tell:
hooks, wrappers, adapters, quantisers and patches always take effect. Figures: docs/benchmarks.md.
"""

import platform
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dinov2.layers.recording import is_recording

__all__ = [
    "add_scaled",
    "cuts_patches",
    "explicit_attention",
    "fast_linear",
    "fused_mlp",
    "fused_swiglu",
    "fuses_mlp",
    "fuses_swiglu",
    "is_inactive",
    "is_untouched",
    "onednn_is_faster",
    "packed_weight",
    "patch_products",
    "prefers_explicit_attention",
    "project",
]

# Numbers in the buffer at most (64 MiB): more rows are multiplied in several parts, which costs nothing at this size.
_BUFFER_SIZE = 2**24

# On a CPU, up to this many tokens explicit attention beats the fused kernel, whose backward is slow on short sequences.
_SHORT = 64

# Scores held at once in inference, over the heads of as many images as fit: 128 MiB in bfloat16.
_MAX_SCORES = 2**26

_ORIGINAL_FORWARD: dict[type[nn.Module], Callable[..., object]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout, nn.Identity)
}

_threads = threading.local()


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` is `kind.forward` and nothing else: no hooks, wrapper, adapter, patch or compiler."""
    if type(module) is not kind or kind.forward is not _ORIGINAL_FORWARD.get(kind, kind.forward):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooked or "forward" in module.__dict__ or module._compiled_call_impl or _has_any_global_hook())


def is_inactive(module: nn.Module) -> bool:
    """Whether a call of `module` gives its input back: an identity, or dropout outside training."""
    if is_untouched(module, nn.Dropout):
        return not (module.training and module.p)
    return is_untouched(module, nn.Identity)


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., D]`, `[D', D]`, `[D']` or None -> `[..., D']`."""
    return _onednn(x, weight, bias) if _takes_onednn(x, weight) else F.linear(x, weight, bias)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, by oneDNN where it is the faster one for a plain linear layer."""
    if onednn_is_faster() and is_untouched(layer, nn.Linear) and _takes_onednn(x, layer.weight):  # type: ignore[arg-type]
        return _onednn(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    output: Tensor = layer(x)
    return output


def fuses_mlp(x: Tensor, first: nn.Module, activation: nn.Module, last: nn.Module) -> bool:
    """Whether `fused_mlp` may take the place of `last(activation(first(x)))`."""
    if not is_untouched(activation, nn.GELU) or activation.approximate != "none":
        return False
    return _fuses(x, first, last) and (_takes_onednn(x, first.weight) or _reuses_memory(x))  # type: ignore[arg-type]


def fused_mlp(x: Tensor, first: nn.Linear, last: nn.Linear) -> Tensor:
    """`last(gelu(first(x)))`, `[..., D]` -> `[..., D']`; for callers that `fuses_mlp` allows."""
    if _takes_onednn(x, first.weight):
        return _onednn(_onednn(x, first.weight, first.bias, "gelu"), last.weight, last.bias)
    return _in_buffer(x, first, torch.ops.aten.gelu_, last)


def fuses_swiglu(x: Tensor, first: nn.Module, last: nn.Module) -> bool:
    """Whether `fused_swiglu` may take the place of the layers."""
    return _fuses(x, first, last) and _reuses_memory(x) and not _takes_onednn(x, first.weight)  # type: ignore[arg-type]


def fused_swiglu(x: Tensor, first: nn.Linear, last: nn.Linear) -> Tensor:
    """`last(silu(gate) * value)`, gate and value from `first`; for callers that `fuses_swiglu` allows."""
    return _in_buffer(x, first, _gate_in_place, last)


def add_scaled(tokens: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
    """`tokens + branch * factors` for `[..., D]`, `[..., D]` and `[D]`; one pass over them without gradients."""
    if not (torch.is_grad_enabled() or is_recording()) and tokens.dtype == factors.dtype:
        return torch.addcmul(tokens, branch, factors)
    return tokens + branch * factors


def prefers_explicit_attention(query: Tensor, dropout: float) -> bool:  # [B, heads, T, d]
    """Whether `explicit_attention` is faster than PyTorch's fused kernel."""
    _, num_heads, length, _ = query.shape
    if query.device.type != "cpu" or dropout > 0.0 or is_recording():
        return False
    if query.requires_grad:
        return length <= _SHORT
    return query.dtype == torch.bfloat16 and num_heads * length**2 <= _MAX_SCORES and onednn_is_faster()


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # all [B, heads, T, d]
    """Scaled dot-product attention in two batched products, a few images at a time in inference."""
    scale = query.shape[-1] ** -0.5
    if query.requires_grad:
        return ((query * scale) @ key.transpose(-2, -1)).softmax(dim=-1).to(value.dtype) @ value
    batch, num_heads, length, _ = query.shape
    at_once = max(_MAX_SCORES // max(num_heads * length**2, 1), 1)
    if batch > at_once:
        slices = zip(query.split(at_once), key.split(at_once), value.split(at_once), strict=True)
        return torch.cat([explicit_attention(*images) for images in slices])
    query, key, value = (heads.contiguous().flatten(0, 1) for heads in (query, key, value))  # [B*heads, T, d] each
    weights = torch.bmm(query * scale, key.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(weights, value).unflatten(0, (batch, num_heads))


def patch_products(convolution: nn.Module, images: Tensor) -> Tensor:
    """`convolution(images)`, `[B, C, H, W]` -> `[B, D, h, w]`; as one matrix product where patches do not overlap."""
    if (
        not is_untouched(convolution, nn.Conv2d)
        or not cuts_patches(convolution)
        or not _cuts_evenly(convolution, images)
    ):
        output: Tensor = convolution(images)
        return output
    weight: Any = convolution.weight
    rows, columns = weight.shape[-2:]
    batch, channels, height, width = images.shape
    grid = (height // rows, width // columns)
    patches = images.reshape(batch, channels, grid[0], rows, grid[1], columns)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid[0] * grid[1], channels * rows * columns)
    tokens = fast_linear(patches, weight.flatten(1), convolution.bias)  # type: ignore[arg-type]
    return tokens.transpose(1, 2).unflatten(2, grid)


def cuts_patches(convolution: Any) -> bool:
    """Whether a convolution reads each pixel once: stride as large as the kernel, no padding, groups or dilation."""
    is_dense = convolution.padding in (0, (0, 0), "valid") and convolution.dilation in (1, (1, 1))
    return bool(is_dense and convolution.stride == convolution.kernel_size and convolution.groups == 1)


def packed_weight(weight: Tensor) -> Tensor:
    """A copy of `[D', D]` in the order in which oneDNN reads it: faster still, and of use to `fast_linear` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and a PyTorch with oneDNN."""
    return _on_amd_with_avx512()


# What torch.compiler.assume_constant_result does, without its import of the compiler.
onednn_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _on_amd_with_avx512() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _processor():
        return False
    _register_opaque_onednn()
    return True


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    if torch.compiler.is_compiling():
        opaque: Tensor = torch.ops.dinov2.linear(x, weight, bias, activation)
        return opaque
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return product


def _register_opaque_onednn() -> None:
    """Register `dinov2::linear`: the compiler would put MKL's operator in the place of oneDNN's if it knew it."""

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
        return product

    def compute_shape(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    operator = torch.library.custom_op("dinov2::linear", compute, mutates_args=(), device_types="cpu")
    operator.register_fake(compute_shape)


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    if not onednn_is_faster() or not _is_plain_inference(x, weight):
        return False
    in_bf16 = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return in_bf16 or x.dtype == torch.float32


def _is_plain_inference(x: Tensor, *weights: Tensor) -> bool:
    """Whether a CPU has to compute these numbers and nothing else: no gradients, no graph, no format of its own."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or is_recording():
        return False
    if torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    # Quantised and distributed weights are subclasses that look after themselves.
    return all(type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype for weight in weights)


def _fuses(x: Tensor, first: nn.Module, last: nn.Module) -> bool:
    if torch.is_grad_enabled() or not (is_untouched(first, nn.Linear) and is_untouched(last, nn.Linear)):
        return False
    return _is_plain_inference(x, first.weight, last.weight)  # type: ignore[arg-type]


def _reuses_memory(x: Tensor) -> bool:
    # A fake tensor has no memory, and vmap and the like have no operators that write into `out`.
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or type(x) is not Tensor:
        return False
    return not torch._C._are_functorch_transforms_active()


def _in_buffer(x: Tensor, first: nn.Linear, activate: Callable[[Tensor], Tensor], last: nn.Linear) -> Tensor:
    """Linear, activation (in place), linear, with all that is wide in the buffer."""
    wide, narrow = len(first.weight), len(last.weight)
    rows = x.reshape(-1, x.shape[-1])
    results = x.new_empty(len(rows), narrow)
    at_once = max(_BUFFER_SIZE // wide, 1)
    for some, result in zip(rows.split(at_once), results.split(at_once), strict=True):
        hidden = _product(some, first, out=_buffer(len(some) * wide).view(len(some), wide))
        _product(activate(hidden), last, out=result)
    return results.view(*x.shape[:-1], narrow)


def _gate_in_place(wide: Tensor) -> Tensor:  # [N, 2 * hidden] -> [N, hidden], a view
    gate, value = wide.chunk(2, dim=-1)
    return value.mul_(F.silu(gate, inplace=True))


def _product(x: Tensor, layer: nn.Linear, *, out: Tensor) -> Tensor:
    transposed = layer.weight.t()
    return torch.mm(x, transposed, out=out) if layer.bias is None else torch.addmm(layer.bias, x, transposed, out=out)


def _buffer(n_numbers: int) -> Tensor:
    kept: Tensor | None = getattr(_threads, "buffer", None)
    if kept is None or kept.numel() < n_numbers:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            kept = _threads.buffer = torch.empty(n_numbers, dtype=torch.float32, device="cpu")
    return kept[:n_numbers]


def _cuts_evenly(convolution: Any, images: Tensor) -> bool:
    # A recorded graph must not depend on a size; callers have checked that nothing is left over.
    sides = zip(images.shape[-2:], convolution.kernel_size, strict=True)
    return images.ndim == 4 and (is_recording() or not any(pixels % kernel for pixels, kernel in sides))
