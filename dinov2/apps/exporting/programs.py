"""`torch.export` programs as files, with what they say of themselves in `dinov2.json` inside the archive."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["open_program", "write_program"]

_METADATA_FILE = "dinov2.json"


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


def open_program(path: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """The model of a file: images to outputs by name, without gradients."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            found: dict[str, Tensor] = module(images)
        return found

    return run
