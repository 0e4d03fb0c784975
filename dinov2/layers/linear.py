"""Linear layers, with the faster kernel where PyTorch's own choice is a slow one.

In float32 on a CPU, PyTorch multiplies with MKL, which uses half of the vector width on AMD processors: oneDNN, which
comes with PyTorch too, is about twice as fast there (benchmarks/inference.py). It knows no gradients, so that training
stays with PyTorch's choice.
"""

import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.recording import is_recording

__all__ = [
    "is_plain",
    "is_plain_inference",
    "linear",
    "linear_gelu",
    "onednn_is_faster",
    "packed_weight",
    "project",
    "takes_onednn",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., D]`, `[D', D]`, `[D']` or None -> `[..., D']`."""
    if takes_onednn(x, weight):
        return _kernel()(x, weight, bias, "none")
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(linear(x))`, the exact form, in one kernel where there is one."""
    if takes_onednn(x, weight):
        return _kernel()(x, weight, bias, "gelu")
    return F.gelu(F.linear(x, weight, bias))


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, by `linear` where that is the same."""
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    output: Tensor = layer(x)
    return output


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear layer that nobody hooked into, wrapped (adapters, quantisation) or patched."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    hooked = hooked or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and not hooked


def packed_weight(weight: Tensor) -> Tensor:
    """A copy of `[D', D]` in the order in which oneDNN reads it: faster still, but of use to `linear` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def _kernel() -> Callable[..., Tensor]:
    return _opaque_onednn if torch.compiler.is_compiling() else _onednn


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return product


# The compiler would take oneDNN's operator apart and put MKL's in its place; it leaves an operator alone that it does
# not know.
@torch.library.custom_op("dinov2::linear", mutates_args=(), device_types="cpu")
def _opaque_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _onednn(x, weight, bias, activation)


@_opaque_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies these two with oneDNN."""
    if not onednn_is_faster() or not is_plain_inference(x, weight):
        return False
    in_bf16 = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return in_bf16 or x.dtype == torch.float32


def is_plain_inference(x: Tensor, *weights: Tensor) -> bool:
    """Whether a CPU has to compute these numbers and nothing else: no gradients, no graph, no format of its own."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or is_recording():
        return False
    if torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    # Quantised and distributed weights are subclasses that look after themselves.
    return all(type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype for weight in weights)


def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and a PyTorch with oneDNN."""
    return _on_amd_with_avx512()


# What torch.compiler.assume_constant_result does, without its import of the compiler.
onednn_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _on_amd_with_avx512() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
