"""What `register()` changes, which is the whole process: tests run these functions in processes of their own."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

import dinov2.hf as hf
from tests.hf.model_cases import FAMILIES, difference, images, our_model, randomised, settings

__all__ = ["CONSUMERS", "answers_after_register", "differences_inside_consumers"]

CONSUMERS: dict[str, dict[str, Any]] = {
    "DPTForDepthEstimation": {
        "stages": {"reshape_hidden_states": False, "apply_layernorm": False},
        "config": {"neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16, "add_projection": False},
        "output": "predicted_depth",
    },
    "DepthAnythingForDepthEstimation": {
        "stages": {"reshape_hidden_states": False},
        "config": {
            "neck_hidden_sizes": [16] * 4,
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
            "reassemble_hidden_size": 32,
            "patch_size": 8,
        },
        "output": "predicted_depth",
    },
    "UperNetForSemanticSegmentation": {
        "stages": {},
        "config": {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 16},
        "output": "logits",
    },
    "Mask2FormerForUniversalSegmentation": {
        "stages": {},
        "config": {
            "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32,
            "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 32, "num_queries": 5,
        },
        "output": "masks_queries_logits",
    },
}  # fmt: skip


def differences_inside_consumers(folder: Path) -> dict[str, Any]:
    """Consumer -> class of its backbone after `register()`, keys that did not fit, and distance to the stock result."""
    expected: dict[str, Tensor] = {}
    torch.manual_seed(3)
    for family, consumer in _pairs():
        model = randomised(_stock_consumer(family, consumer))
        model.save_pretrained(folder / f"{family} {consumer}")
        expected[f"{family} {consumer}"] = _output(model, consumer)
    hf.register()
    found = {}
    for family, consumer in _pairs():
        name = f"{family} {consumer}"
        model, info = getattr(transformers, consumer).from_pretrained(folder / name, output_loading_info=True)
        backbones = [type(module) for module in model.modules() if type(module).__name__.endswith("Backbone")]
        found[name] = {
            "backbone": f"{backbones[0].__module__}.{backbones[0].__name__}",
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "difference": difference(_output(model.eval(), consumer), expected[name]),
            "spread": float(expected[name].std()),
        }
    return found


def answers_after_register(folder: Path) -> dict[str, Any]:
    """What the Auto classes of transformers build before and after `register()`; folders are one word each."""
    for family in FAMILIES:
        our_model(family, "ForImageClassification").save_pretrained(folder / family)
        _put_into_cache(folder / family, f"someone/{family}", folder / "cache")
    ours = {family: _without_registering(family, folder / "cache") for family in FAMILIES}
    before = [type(transformers.AutoModel.from_pretrained(family)).__module__ for family in FAMILIES]
    hf.register(replace=False)
    kept = type(transformers.AutoModel.from_config(transformers.Dinov2Config(**settings("Dinov2")))).__module__
    for _ in range(2):  # again changes nothing
        hf.register()
    answers: dict[str, Any] = {"ours": ours, "before": before, "stock config without replacing": kept}
    for family in FAMILIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answers[family] = _answers(family, folder / family)
    other = transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    other.save_pretrained(folder / "vit")
    answers["another model"] = type(transformers.AutoModel.from_pretrained("vit")).__name__
    return answers


def _put_into_cache(folder: Path, name: str, cache: Path) -> None:
    """Lays a folder where a download of the repository `name` would be kept."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(folder, repository / "snapshots" / commit)


def _without_registering(family: str, cache: Path) -> dict[str, Any]:
    """What our own Auto classes and pipeline make of a folder of one word, and of a downloaded repository."""
    name, picture = f"someone/{family}", Image.new("RGB", (90, 60), "red")
    backbones = [hf.AutoBackbone.from_pretrained(family), hf.AutoBackbone.from_pretrained(name, cache_dir=cache)]
    pipelines = [hf.pipeline(model=family), hf.pipeline(model=name, cache_dir=cache)]
    return {
        "backbones": [f"{type(one).__name__} {one.channels}" for one in backbones],
        "answers": [len(classify(picture)) for classify in pipelines],
        "crops": [classify.image_processor.crop_size["height"] for classify in pipelines],
    }


def _answers(family: str, folder: Path) -> dict[str, Any]:
    auto = transformers
    built = {
        "AutoConfig": auto.AutoConfig.from_pretrained(family),
        "AutoModel": auto.AutoModel.from_pretrained(family),
        "AutoModelForImageClassification": auto.AutoModelForImageClassification.from_pretrained(folder),
        "AutoBackbone absolute": auto.AutoBackbone.from_pretrained(folder, out_indices=[1]),
        "AutoBackbone relative": auto.AutoBackbone.from_pretrained(family, out_features=["stem", "stage2"]),
        "AutoBackbone from config": auto.AutoBackbone.from_config(auto.AutoConfig.from_pretrained(family)),
        "AutoImageProcessor": auto.AutoImageProcessor.from_pretrained(family),
        "stock config": auto.AutoModel.from_config(getattr(auto, family + "Config")(**settings(family))),
        "pipeline": auto.pipeline("image-classification", model=family).model,
        "feature pipeline": auto.pipeline("image-feature-extraction", model=family).model,
    }
    answers: dict[str, Any] = {name: f"{type(one).__module__}.{type(one).__name__}" for name, one in built.items()}
    answers["maps"] = [len(built[f"AutoBackbone {path}"](images()).feature_maps) for path in ("absolute", "relative")]
    return answers


def _pairs() -> list[tuple[str, str]]:
    # Heads that take all tokens know of no registers.
    return [(family, consumer) for consumer in CONSUMERS for family in FAMILIES if _fits(family, consumer)]


def _fits(family: str, consumer: str) -> bool:
    return family == "Dinov2" or not CONSUMERS[consumer]["stages"]


def _stock_consumer(family: str, consumer: str) -> Any:
    case = CONSUMERS[consumer]
    stages = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], **case["stages"]}
    backbone = getattr(transformers, family + "Config")(**settings(family, **stages))
    kind = getattr(transformers, consumer)
    model = kind(kind.config_class(backbone_config=backbone, **case["config"]))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == 1:
            # Depth comes out of a ReLU: a fresh head would answer 0 to everything, by chance.
            torch.nn.init.ones_(layer.bias)
    return model


def _output(model: Any, consumer: str) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(images(1, 64, 64))[CONSUMERS[consumer]["output"]]
    return output
