"""Whether a graph is being recorded, so that what depends on one size is not frozen into it."""

import torch

__all__ = ["is_recording"]


def is_recording() -> bool:
    """True within `torch.jit.trace`, `torch.export` and the ONNX exporter on top of it; False under `torch.compile`.

    A recorded graph keeps the branch that Python took and has no way back, whereas a compiled function is guarded and
    compiled anew. So while one is recorded, nothing branches on a size and every number made of a size stays a tensor.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch.compiler.is_exporting()
