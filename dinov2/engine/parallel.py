"""On which device and in which precision a process computes.

The precision `auto` is bfloat16 autocast where the hardware multiplies it fast (CUDA capability 8.0 and CPUs with
AVX512-BF16 or AMX) and float32 elsewhere; float16 only when asked for, because it needs a loss scaler.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from dinov2.distributed import get_local_rank
from dinov2.errors import ConfigError

__all__ = ["PRECISIONS", "autocast", "choose_device", "choose_precision"]

PRECISIONS: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of precisions and the dtype that autocast computes in; None is plain float32."""


def choose_device(name: str = "auto") -> torch.device:
    """The device of this process: `auto` (CUDA, else MPS, else CPU), `cpu`, `mps`, `cuda` or `cuda:<n>`.

    `auto` and `cuda` give each process of a machine the GPU of its local rank. Raises `ConfigError` when the device
    that was asked for is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    match device.type:
        case "cpu":
            return torch.device("cpu")
        case "mps" if torch.backends.mps.is_available():
            return torch.device("mps")
        case "cuda" if torch.cuda.is_available():
            index = get_local_rank() if device.index is None else device.index
            if index < torch.cuda.device_count():
                return torch.device("cuda", index)
            n_gpus = torch.cuda.device_count()
            raise ConfigError(f"the device {name!r} needs GPU number {index}, but there are {n_gpus}, counted from 0")
        case "cuda" | "mps":
            raise ConfigError(f"the device {name!r} was asked for, but PyTorch finds none here; use 'cpu' or 'auto'")
    raise ConfigError(f"no device is called {name!r}; choose auto, cpu, mps, cuda or cuda:<n>")


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `auto`, `fp32`, `bf16` or `fp16` on `device`; None means plain float32."""
    if name == "auto":
        return torch.bfloat16 if _computes_bf16_fast(device) else None
    if name not in PRECISIONS:
        raise ConfigError(f"no precision is called {name!r}; choose one of auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to `dtype` on `device`, or nothing where `dtype` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _computes_bf16_fast(device: torch.device) -> bool:
    match device.type:
        case "cuda":
            # ROCm numbers its devices otherwise; all that PyTorch supports there compute bfloat16.
            return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu":
            return bool({"avx512_bf16", "amx_bf16"} & _cpu_features())
    return False


def _cpu_features() -> set[str]:
    """Instruction sets of the CPU in the words of Linux; empty where they cannot be found out."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch that is supported
    if capabilities is not None:
        return {name for name, supported in capabilities().items() if supported is True}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
