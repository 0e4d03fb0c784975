"""Quantised on the fly: every matrix is found, none is lost, errors are small, what is saved loads again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import TorchAoConfig

import dinov2.hf as hf
from tests.hf.common_cases import EVERY_FAMILY
from tests.hf.model_cases import difference, images, settings

torchao = pytest.importorskip("torchao.quantization")

PerGroup = pytest.importorskip("torchao.quantization.granularity").PerGroup

NETWORKS = pytest.mark.parametrize("network", [{}, {"use_swiglu_ffn": True}], ids=["MLP", "SwiGLU"])
WIDE = {"hidden_size": 96, "num_attention_heads": 4}


def logits_of(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(images()).logits.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def quantised(model: nn.Module) -> set[str]:
    """Names of the matrices that are no plain parameters any more."""
    return {name for name, one in model.named_parameters() if type(one.data) is not Tensor}


def new_classifier(family: str, **changes: Any) -> Any:
    """As trained weights, small and centred: a few large channels are another matter than a method's correctness."""
    config = getattr(hf, family + "Config")(**settings(family, **WIDE, initializer_range=0.05, **changes))
    return getattr(hf, family + "ForImageClassification")(config).eval()


# Use 3.
@EVERY_FAMILY
@NETWORKS
def test_int8_weights_are_quantised_while_loading(family: str, network: dict[str, Any], tmp_path: Path) -> None:
    plain = new_classifier(family, **network)
    plain.save_pretrained(tmp_path / "plain")
    load = hf.AutoModelForImageClassification.from_pretrained
    settings_of_int8 = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model, info = load(tmp_path / "plain", quantization_config=settings_of_int8, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    linear = {name + ".weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert quantised(model) >= {name for name in linear if not name.startswith("classifier")}
    expected = logits_of(plain)
    limit = 0.02 if network else 0.03
    assert 0 < relative_error(logits_of(model), expected) < limit

    in_memory = copy.deepcopy(plain)
    torchao.quantize_(in_memory, torchao.Int8WeightOnlyConfig())
    assert relative_error(logits_of(in_memory), expected) < limit

    older = {"safe_serialization": False} if transformers.__version__.startswith("4.") else {}
    model.save_pretrained(tmp_path / "quantised", **older)
    again = load(tmp_path / "quantised")
    assert quantised(again) == quantised(model)
    assert difference(logits_of(again), logits_of(model)) == 0


@EVERY_FAMILY
@NETWORKS
def test_int4_weights_in_the_form_that_needs_no_gpu(family: str, network: dict[str, Any], tmp_path: Path) -> None:
    plain = new_classifier(family, **network)
    plain.save_pretrained(tmp_path)
    int4 = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    model, info = hf.AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(int4), output_loading_info=True
    )
    assert not info["missing_keys"]
    expected = logits_of(plain)
    assert 0 < relative_error(logits_of(model), expected) < 0.35


# Use 3.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the packed int4 weights of torchao need an NVIDIA GPU")
@EVERY_FAMILY
@NETWORKS
def test_int4_weights_on_a_gpu(family: str, network: dict[str, Any], tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "num_attention_heads": 4, "patch_size": 8}
    config = getattr(hf, family + "Config")(**settings(family, **wide, initializer_range=0.05, **network))
    plain = getattr(hf, family + "ForImageClassification")(config).to("cuda", torch.bfloat16).eval()
    plain.save_pretrained(tmp_path)
    int4 = torchao.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    model, info = hf.AutoModelForImageClassification.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        device_map="cuda",
        quantization_config=TorchAoConfig(int4),
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    with torch.inference_mode():
        x = images().to("cuda", torch.bfloat16)
        expected, found = plain(x).logits.float(), model(x).logits.float()
    assert 0 < relative_error(found, expected) < 0.35
