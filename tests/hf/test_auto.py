"""Auto classes, `pipeline` and `register`; `row n` counts the known defects of the stock classes."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import dinov2.hf as hf
from dinov2.hf.auto import MODELS
from tests.hf.model_cases import CLASSES, FAMILIES, difference, images, our_model, settings
from tests.hf.processes import run_alone
from tests.hf.stock_versions import OLDER_VERSIONS, run_under

AUTO = {"Model": "AutoModel", "ForImageClassification": "AutoModelForImageClassification", "Backbone": "AutoBackbone"}

# The name of the argument differs between versions.
PROCESSORS: dict[str, Any] = (
    {"image_processor_classes": {"pil": hf.BitImageProcessorPil}}
    if "image_processor_classes" in inspect.signature(transformers.AutoImageProcessor.register).parameters
    else {"slow_image_processor_class": hf.BitImageProcessor}
)

each_family = pytest.mark.parametrize("family", FAMILIES)
each_class = pytest.mark.parametrize("kind", CLASSES)


def saved(family: str, kind: str, folder: Path, **changes: Any) -> Any:
    model = our_model(family, kind, **changes)
    model.save_pretrained(folder)
    return model


def picture() -> Image.Image:
    ramp = np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3) * 7 % 256
    return Image.fromarray(ramp.astype(np.uint8))


# Row 40.
@each_family
@each_class
def test_auto_classes_build_ours_from_folders(family: str, kind: str, tmp_path: Path) -> None:
    model = saved(family, kind, tmp_path)
    for source in (tmp_path, str(tmp_path)):
        again = getattr(hf, AUTO[kind]).from_pretrained(source)
        assert type(again) is getattr(hf, family + kind)
        assert difference(again(images(), return_dict=False), model(images(), return_dict=False)) == 0


# Row 41: what looks like an id of the hub is a folder when there is one.
@each_family
def test_a_folder_of_one_word_is_a_folder(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(family, "Model", tmp_path / "word")
    monkeypatch.chdir(tmp_path)
    backbone = hf.AutoBackbone.from_pretrained("word", out_features=["stem", "stage1"])
    assert type(backbone) is getattr(hf, family + "Backbone")
    assert backbone.out_indices == [0, 1]
    assert [tuple(one.shape) for one in backbone(images()).feature_maps] == [(2, 32, 5, 7)] * 2


@each_family
def test_arguments_reach_models_and_configs(family: str, tmp_path: Path) -> None:
    saved(family, "ForImageClassification", tmp_path)
    model, info = hf.AutoModelForImageClassification.from_pretrained(
        tmp_path, dtype=torch.float16, attn_implementation="eager", output_hidden_states=True, output_loading_info=True
    )
    assert (model.dtype, model.config._attn_implementation) == (torch.float16, "eager")
    assert not info["missing_keys"]
    assert len(model(images()).hidden_states) == 3


@each_family
@each_class
def test_configurations_build_ours_whosever_they_are(family: str, kind: str) -> None:
    stock = getattr(transformers, family + "Config")(**settings(family))
    for config in (
        stock,
        getattr(hf, family + "Config")(**settings(family)),
        hf.AutoConfig.for_model(stock.model_type, **settings(family)),
    ):
        model = getattr(hf, AUTO[kind]).from_config(config, attn_implementation="eager")
        assert type(model) is getattr(hf, family + kind)
        assert (model.config.hidden_size, model.config._attn_implementation) == (32, "eager")


@each_family
def test_stock_checkpoints_and_stock_configs_load_together(family: str, tmp_path: Path) -> None:
    model = saved(family, "Model", tmp_path)
    stock = getattr(transformers, family + "Config").from_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path, config=stock)
    assert type(again.config) is getattr(hf, family + "Config")
    assert difference(again(images())[0], model(images())[0]) == 0


def test_other_models_are_left_to_transformers(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert type(hf.AutoModel.from_pretrained(tmp_path)) is transformers.ViTModel
    assert type(hf.AutoModel.from_config(config)) is transformers.ViTModel
    assert type(hf.AutoConfig.from_pretrained(tmp_path)) is transformers.ViTConfig
    with pytest.raises(OSError, match="AutoModel builds models and is none"):
        hf.AutoModel()


class OwnConfig(hf.Dinov2Config):
    """Of a model type that a user invents; without a constructor, as configurations are written since version 5."""

    model_type = "own_dinov2"


class OwnModel(hf.Dinov2Model):
    """A user's model of that type."""

    config_class = OwnConfig


class OwnBackbone(hf.Dinov2Backbone):
    """A user's class for a model type that is there already."""


def test_models_of_users_are_registered_as_with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.AutoConfig.register("own_dinov2", OwnConfig, exist_ok=True)
    hf.AutoModel.register(OwnConfig, OwnModel, exist_ok=True)
    hf.AutoImageProcessor.register(OwnConfig, **PROCESSORS, exist_ok=True)
    config = OwnConfig(**settings("Dinov2"))
    assert config.hidden_size == 32
    OwnModel(config).save_pretrained(tmp_path)
    assert type(hf.AutoConfig.from_pretrained(tmp_path)) is OwnConfig
    assert type(hf.AutoModel.from_pretrained(tmp_path)) is OwnModel
    assert type(hf.AutoModel.from_config(config)) is OwnModel
    # A class of one's own for a known type takes the place of ours.
    monkeypatch.setattr("dinov2.hf.auto.MODELS", {**MODELS, "AutoBackbone": {**MODELS["AutoBackbone"]}})
    with monkeypatch.context() as patched:
        patched.setattr(transformers.AutoBackbone, "register", lambda *_args, **_kwargs: None)
        hf.AutoBackbone.register(hf.Dinov2Config, OwnBackbone)
    assert type(hf.AutoBackbone.from_config(hf.Dinov2Config(**settings("Dinov2")))) is OwnBackbone


@each_family
def test_the_registry_of_transformers_stays_as_it_is(family: str, tmp_path: Path) -> None:
    saved(family, "Model", tmp_path)
    hf.AutoModel.from_pretrained(tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is getattr(transformers, family + "Model")
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is getattr(transformers, family + "Config")


# Row 43.
@each_family
def test_a_folder_without_a_preprocessor_gets_that_of_the_released_models(family: str, tmp_path: Path) -> None:
    saved(family, "Model", tmp_path, image_size=224)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert dict(processor.size) == {"shortest_edge": 256}
    assert processor(picture(), return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
    small = hf.AutoImageProcessor.from_pretrained(tmp_path, crop_size={"height": 32, "width": 48})
    assert small(picture(), return_tensors="pt").pixel_values.shape == (1, 3, 32, 48)
    small.save_pretrained(tmp_path)
    again = hf.AutoImageProcessor.from_pretrained(tmp_path)
    assert again(picture(), return_tensors="pt").pixel_values.shape == (1, 3, 32, 48)


# Row 42.
@each_family
@pytest.mark.parametrize("task", ["image-classification", None])
def test_a_pipeline_classifies_with_a_folder_alone(family: str, task: str | None, tmp_path: Path) -> None:
    model = saved(family, "ForImageClassification", tmp_path)
    classify = hf.pipeline(task, model=tmp_path)
    assert type(classify.model) is type(model)
    answers = classify(picture())
    with torch.no_grad():
        x = hf.AutoImageProcessor.from_pretrained(tmp_path)(picture(), return_tensors="pt").pixel_values
        expected = model(x).logits[0].softmax(dim=0)
    assert [answer["label"] for answer in answers] == [f"LABEL_{index}" for index in expected.argsort(descending=True)]
    assert [answer["score"] for answer in answers] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)


@each_family
def test_a_pipeline_gives_features_with_a_folder_alone(family: str, tmp_path: Path) -> None:
    model = saved(family, "Model", tmp_path, image_size=224)
    extract = hf.pipeline("image-feature-extraction", model=str(tmp_path), dtype=torch.float16)
    assert (type(extract.model), extract.model.dtype) == (type(model), torch.float16)
    features = torch.tensor(extract(picture()))
    assert features.shape == (1, 1 + model.embeddings.num_register_tokens + 28 * 28, 32)
    assert features.isfinite().all()


SCRIPT = """
from tests.hf.consumer_cases import answers_after_register
result = answers_after_register(pathlib.Path(".").resolve())
"""


def all_ours(answers: dict[str, Any]) -> None:
    stock = [f"transformers.models.{name}.modeling_{name}" for name in ("dinov2", "dinov2_with_registers")]
    assert answers["before"] == stock
    assert answers["stock config without replacing"] == stock[0]
    assert answers["another model"] == "ViTModel"
    for family in FAMILIES:
        # A downloaded repository without a preprocessor file is taken for a released one, of 224 pixels.
        assert answers["ours"][family] == {
            "backbones": [f"{family}Backbone [32]"] * 2,
            "answers": [5, 5],
            "crops": [32, 224],
        }
        found = answers[family]
        assert found.pop("maps") == [1, 2]
        assert found == {
            "AutoConfig": f"dinov2.hf.configuration.{family}Config",
            "AutoModel": f"dinov2.hf.models.{family}Model",
            "AutoModelForImageClassification": f"dinov2.hf.models.{family}ForImageClassification",
            "AutoBackbone absolute": f"dinov2.hf.models.{family}Backbone",
            "AutoBackbone relative": f"dinov2.hf.models.{family}Backbone",
            "AutoBackbone from config": f"dinov2.hf.models.{family}Backbone",
            "AutoImageProcessor": found["AutoImageProcessor"],
            "stock config": f"dinov2.hf.models.{family}Model",
            "pipeline": f"dinov2.hf.models.{family}ForImageClassification",
            "feature pipeline": f"dinov2.hf.models.{family}Model",
        }
        assert found["AutoImageProcessor"].startswith("dinov2.hf.processing")


# Rows 40 to 43, offline.
def test_register_makes_the_auto_classes_of_transformers_build_ours(tmp_path: Path) -> None:
    all_ours(run_alone(SCRIPT, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER_VERSIONS)
def test_register_does_the_same_under_older_versions(version: str, tmp_path: Path) -> None:
    all_ours(run_under(version, SCRIPT, tmp_path))


WITHOUT = """
import sys
sys.modules["transformers"] = None  # any import of it fails
try:
    import dinov2.hf
except ImportError as error:
    result = {"refusal": [type(error).__name__, str(error)]}
import torch
import dinov2
from dinov2.cli import main
for family in ("Dinov2", "Dinov2WithRegisters"):
    model = dinov2.load(family)
    with torch.inference_mode():
        tokens = model.backbone.forward_features(torch.load("images.pt"))
    torch.save([tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]], f"{family}.pt")
    result[family] = [
        main(["convert", family, f"{family}.pth", "--to", "original"]),
        main(["convert", f"{family}.pth", f"{family}-again", "--to", "hf", "--skip-library"]),
    ]
"""


def test_without_transformers_the_same_folders_load_and_convert(tmp_path: Path) -> None:
    # Heads of 64 channels, as the released models have and a bare weight file lets guess.
    models = {
        family: saved(family, "Model", tmp_path / family, hidden_size=64, num_attention_heads=1) for family in FAMILIES
    }
    x = images(2, 32, 32)
    torch.save(x, tmp_path / "images.pt")
    told = run_alone(WITHOUT, tmp_path)
    assert told["refusal"][0] == "MissingDependency"
    assert "pip install 'transformers>=4.56'" in told["refusal"][1]
    for family, model in models.items():
        assert told[family] == [0, 0]
        expected = model(x).last_hidden_state.detach()
        cls, patches = torch.load(tmp_path / f"{family}.pt")
        assert difference(cls, expected[:, 0]) <= 1e-5
        assert difference(patches, expected[:, 1 + model.embeddings.num_register_tokens :]) <= 1e-5
        again = hf.AutoModel.from_pretrained(tmp_path / f"{family}-again")
        assert difference(again(x)[0], model(x)[0]) <= 1e-5
