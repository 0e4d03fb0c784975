"""Reads the golden figures that lie beside this file."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["assert_stats", "golden_json", "golden_tensors"]

HERE = Path(__file__).parent


@cache
def golden_tensors(name: str) -> dict[str, Tensor]:
    """All tensors of `<name>.safetensors`."""
    return load_file(HERE / f"{name}.safetensors")


@cache
def golden_json(name: str) -> Any:
    """The content of `<name>.json`."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def assert_stats(tensor: Tensor, expected: Tensor) -> None:
    """Mean (absolute 1e-5), population standard deviation and L2 norm (relative 1e-5) of the whole tensor."""
    x = tensor.detach().double()
    mean, std, norm = (float(value) for value in expected)
    assert abs(x.mean().item() - mean) <= 1e-5
    actual = torch.tensor([x.std(correction=0).item(), x.norm().item()])
    torch.testing.assert_close(actual, torch.tensor([std, norm]), rtol=1e-5, atol=1e-6)
