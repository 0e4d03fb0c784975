"""Models of transformers around a backbone of ours, and adapters on our models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dinov2.hf as hf
from tests.hf.consumer_cases import CONSUMERS
from tests.hf.model_cases import FAMILIES, difference, images, our_model, settings
from tests.hf.processes import run_alone
from tests.hf.stock_versions import OLDER_VERSIONS, run_under

SCRIPT = """
from tests.hf.consumer_cases import differences_inside_consumers
result = differences_inside_consumers(pathlib.Path(".").resolve())
"""


def all_agree(found: dict[str, Any]) -> None:
    assert len(found) == 6
    for name, told in found.items():
        family = name.split()[0]
        assert told["backbone"] == f"dinov2.hf.models.{family}Backbone", name
        assert (told["missing"], told["unexpected"]) == ([], []), name
        # Fresh heads answer with a small spread, how small depends on the version that drew them.
        assert told["spread"] > 1e-4, name
        assert told["difference"] <= 1e-3 * told["spread"] + 1e-6, name


@pytest.mark.slow
def test_depth_and_segmentation_models_load_our_backbone_and_answer_as_before(tmp_path: Path) -> None:
    all_agree(run_alone(SCRIPT, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER_VERSIONS)
def test_older_versions_build_our_backbone_too(version: str, tmp_path: Path) -> None:
    all_agree(run_under(version, SCRIPT, tmp_path))


@pytest.mark.parametrize("consumer", ["DPTForDepthEstimation", "DepthAnythingForDepthEstimation"])
def test_heads_without_registers_take_a_backbone_that_drops_them(consumer: str) -> None:
    case = CONSUMERS[consumer]
    config = hf.Dinov2WithRegistersConfig(
        **settings("Dinov2WithRegisters", num_hidden_layers=4, out_indices=[1, 2, 3, 4], drop_register_tokens=True),
        **case["stages"],
    )
    model = getattr(transformers, consumer)
    plain = hf.Dinov2Config.from_dict({**config.to_dict(), "model_type": "dinov2"})
    built = model(model.config_class(backbone_config=plain, **case["config"])).eval()
    built.backbone = hf.Dinov2WithRegistersBackbone(config).eval()
    maps = built.backbone(images(1, 64, 64)).feature_maps
    assert {tuple(one.shape) for one in maps} == {(1, 65, 32)}
    with torch.no_grad():
        assert built(images(1, 64, 64)).predicted_depth.isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_find_the_names_on_disk_and_refuse_the_newer_ones(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, plain = our_model(family, "ForImageClassification"), our_model(family, "ForImageClassification")
    with pytest.raises(ValueError, match=r"Target modules .*(q_proj|v_proj).* not found in the base model"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    )
    assert adapted.get_nb_trainable_parameters()[0] == 2 * 2 * (2 * 2 * 32) + 5 * 64 + 5
    assert difference(adapted(images()).logits, plain(images()).logits) < 1e-4
    loss = adapted(pixel_values=images(), labels=torch.tensor([1, 4])).loss
    loss.backward()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    adapted.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert difference(again(images()).logits, adapted(images()).logits) < 1e-3
    merged = again.merge_and_unload()
    assert difference(merged(images()).logits, adapted(images()).logits) < 1e-3
