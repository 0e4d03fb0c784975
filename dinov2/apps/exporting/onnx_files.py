"""ONNX files: written from a recorded graph, opened with onnxruntime, reduced to int8, and timed side by side.

One file holds everything up to the 2 GB that its format allows; above that the weights lie in `<name>.data` beside it.
"""

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError, MissingDependency

__all__ = ["interleaved_milliseconds", "open_onnx", "require_onnx", "write_int8", "write_onnx"]

_PACKAGES = {"onnx": "onnx>=1.18", "onnxscript": "onnxscript>=0.5", "onnxruntime": "onnxruntime>=1.20"}
# Protocol buffers end at 2 GiB; the graph beside the weights takes a few MB.
_LARGEST_FILE = 2_000_000_000
_OLDEST_OPSET = 18
# With this mark the quantiser takes the graph as it is; without it, it logs advice to simplify what is simple already.
_SIMPLIFIED = ("onnx.quant.pre_process", "onnxruntime.quant")


def require_onnx() -> None:
    """Raises `MissingDependency` that names every missing package at once (together they are the extra `export`)."""
    missing = []
    for name, requirement in _PACKAGES.items():
        try:
            import_module(name)
        except ImportError:
            missing.append(requirement)
    if missing:
        raise MissingDependency("' '".join(missing), "export to ONNX (extra `export`)")


def write_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    dynamic_shapes: Mapping[str, Any],
    outputs: Sequence[str],
    opset: int,
    metadata: Mapping[str, str],
) -> None:
    """Writes `model`, called with `images`, as ONNX.

    Raises `ConfigError` when the graph cannot be written in that opset.
    """
    if opset < _OLDEST_OPSET:
        raise ConfigError(f"opset {opset} lacks operators of this graph; the oldest that has them is {_OLDEST_OPSET}")
    with _quiet("onnxscript", "torch.onnx"):
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=dict(dynamic_shapes),
            input_names=["images"],
            output_names=list(outputs),
        )
    if program is None:
        raise ConfigError("the ONNX exporter gave no program; update torch")
    written = program.model.opset_imports.get("")
    if written != opset:
        raise ConfigError(f"the graph cannot be written in ONNX opset {opset}, only in {written}; ask for {written}")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of this machine's source files
    program.model.metadata_props.update(metadata)
    n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    program.save(path, external_data=n_bytes > _LARGEST_FILE)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Without the loggers' remarks on what they left as it was; the comparison afterwards is what counts."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_onnx(path: str | os.PathLike[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The model of an ONNX file on the CPU, with as many threads as torch has: images to outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run


def write_int8(path: Path, target: Path) -> None:
    """Writes the model of `path` with int8 weights, one scale a column; activations are quantised while it runs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) > _LARGEST_FILE
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**metadata, _SIMPLIFIED[0]: _SIMPLIFIED[1]})
    # The quantiser transposes weights and then trips over their recorded shapes; it infers them again without.
    del model.graph.value_info[:]
    # Signed weights are the fast form where the processor multiplies bytes (measured 1.6 times faster than unsigned).
    quantize_dynamic(model, target, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=large)
    if not large:
        reduced = onnx.load(target)
        onnx.helper.set_model_props(reduced, {**metadata, "precision": "int8, activations quantised at run time"})
        onnx.save(reduced, target)


def interleaved_milliseconds(runs: Sequence[Callable[[], object]], *, rounds: int = 7) -> list[float]:
    """Median time of each function, taking turns, so that a busy moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()  # the first call allocates
    for _ in range(rounds):
        for run, measured in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            measured.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(measured) for measured in times]
