"""Checkpoints that are quantised while they load; `row n` counts the known defects of the stock classes.

Saving them and reading them again stands in test_quantisation.py.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.hf.model_cases import FAMILIES, NETWORKS, images, stock_and_ours

torchao = pytest.importorskip("torchao")


def quantised(model: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The checkpoint of `folder` with weights of eight bits, and what loading said."""
    from torchao.quantization import Int8WeightOnlyConfig

    with warnings.catch_warnings():  # of the quantiser, on its own parts
        warnings.simplefilter("ignore")
        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        loaded, info = type(model).from_pretrained(folder, quantization_config=config, output_loading_info=True)
    return loaded.eval(), info


# Row 44: of a stock SwiGLU checkpoint every weight is loaded, and is the quantised one of the file.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("network", NETWORKS)
def test_quantising_while_loading_keeps_every_weight(family: str, network: str, tmp_path: Path) -> None:
    theirs, exact = stock_and_ours(family, "ForImageClassification", hidden_size=96, **NETWORKS[network])
    theirs.save_pretrained(tmp_path)
    model, info = quantised(exact, tmp_path)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    linear = [name for name, module in exact.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * (3 + 1 + 2) + 1
    for name in linear:
        weight, expected = model.get_submodule(name).weight, exact.get_submodule(name).weight
        if name == "classifier":
            continue  # some versions leave the head as it is
        assert type(weight) is not torch.nn.Parameter or not torch.equal(weight, expected), name
        step = expected.detach().abs().amax(dim=1, keepdim=True) / 127
        assert ((weight.dequantize() - expected).abs() <= 0.6 * step + 1e-6).all(), name
    with torch.inference_mode():
        found, logits = model(images()).logits, exact(images()).logits
    assert 0 < float((found - logits).norm() / logits.norm()) < 0.05
