"""Exported files: ONNX, opened with onnxruntime and reduced to int8, and `torch.export` programs.

An ONNX file holds everything up to the 2 GB that its format allows; above that the weights lie in `<name>.data` beside
it.
"""

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError, MissingDependency

__all__ = ["open_onnx", "open_program", "require_onnx", "write_int8", "write_onnx", "write_program"]

_Runner = Callable[[Tensor], dict[str, Tensor]]

_PACKAGES = {"onnx": "onnx>=1.18", "onnxscript": "onnxscript>=0.5", "onnxruntime": "onnxruntime>=1.20"}
# Protocol buffers end at 2 GiB; the graph beside the weights takes a few MB.
_LARGEST_FILE = 2_000_000_000
_OLDEST_OPSET = 18
_METADATA_FILE = "dinov2.json"
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


def open_onnx(path: str | os.PathLike[str]) -> _Runner:
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


def write_program(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a program; raises `OSError` when the disk refuses."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # lines of this machine's source files
    # Through memory: on a full disk the archive's own writer ends the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_METADATA_FILE: json.dumps(metadata)})
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())


def open_program(path: Path) -> _Runner:
    """The model of a file: images to outputs by name, without gradients."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            found: dict[str, Tensor] = module(images)
        return found

    return run
