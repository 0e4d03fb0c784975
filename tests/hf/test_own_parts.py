"""What users put around our models and into them: heads, adapters, activations, hooks, parts of pipelines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dinov2.hf as hf
from dinov2.errors import WeightsError
from dinov2.hf.processing import BitImageProcessor, default_image_processor
from tests.hf.common_cases import EVERY_FAMILY, our_class, picture, saved_folder
from tests.hf.model_cases import difference, images, our_model, randomised, settings, stock_and_ours


class HeadOfManyParts(hf.Dinov2PreTrainedModel):
    """A backbone below what heads are made of; some parts have names that transformers gives to ours in memory."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dinov2 = hf.Dinov2Model(config)
        self.batch_norm = nn.BatchNorm2d(32)
        self.group_norm = nn.GroupNorm(4, 32)
        self.layer_norm = nn.LayerNorm(32, bias=False)
        self.larger = nn.ConvTranspose2d(32, 16, 2, 2)
        self.queries = nn.Embedding(20, 32)
        self.decoder = nn.ModuleDict({f"{name}_proj": nn.Linear(32, 32) for name in ("q", "v", "o", "gate", "up")})
        self.post_init()


def test_every_part_of_a_head_that_a_checkpoint_lacks_starts_with_values(tmp_path: Path) -> None:
    our_model("Dinov2", "Model").save_pretrained(tmp_path)
    model = HeadOfManyParts.from_pretrained(tmp_path)
    for norm in (model.batch_norm, model.group_norm, model.layer_norm):
        assert (norm.weight == 1).all() and (norm.bias is None or not norm.bias.any())
    assert not model.batch_norm.running_mean.any() and (model.batch_norm.running_var == 1).all()
    assert model.batch_norm.num_batches_tracked == 0
    for part in (model.larger, model.queries, model.decoder["q_proj"]):
        assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not model.larger.bias.any()


def test_projections_of_a_head_are_loaded_by_their_own_names(tmp_path: Path) -> None:
    model = randomised(HeadOfManyParts(hf.Dinov2Config(**settings("Dinov2"))))
    model.save_pretrained(tmp_path)
    loaded, info = HeadOfManyParts.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@EVERY_FAMILY
def test_a_state_dict_of_either_layout_can_be_given_for_loading(family: str) -> None:
    theirs, ours = stock_and_ours(family, "ForImageClassification", use_swiglu_ffn=True)
    model, info = our_class(family, "ForImageClassification").from_pretrained(
        None, config=ours.config, state_dict=theirs.state_dict(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(model(images()).logits, ours(images()).logits) == 0


@EVERY_FAMILY
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_local_files_with_names_in_memory_load_whatever_their_kind(
    family: str, ending: str, variant: str | None, shards: int, tmp_path: Path
) -> None:
    theirs, ours = stock_and_ours(family, "Model", use_swiglu_ffn=True)
    tensors = dict(theirs.state_dict())
    if "gate_proj" not in "".join(tensors):
        pytest.skip("this version of transformers keeps the names on disk in memory")
    ours.config.save_pretrained(tmp_path)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    middle = f".{variant}" if variant else ""
    places = {}
    for shard in range(shards):
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        number = f"-{shard + 1:05}-of-{shards:05}" if shards > 1 else ""
        name = f"{stem}{middle}{number}.{ending}"
        places.update(dict.fromkeys(part, name))
        if ending == "bin":
            torch.save(part, tmp_path / name)
        else:
            save_file(part, tmp_path / name, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (tmp_path / f"{stem}.{ending}.index{middle}.json").write_text(json.dumps(index))
    model, info = our_class(family, "Model").from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(model(images())[0], ours(images())[0]) == 0


@EVERY_FAMILY
def test_names_that_would_leave_blocks_without_weights_are_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, _ = stock_and_ours(family, "Model", use_swiglu_ffn=True)
    if "gate_proj" not in "".join(theirs.state_dict()):
        pytest.skip("this version of transformers keeps the names on disk in memory")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    # As for a repository that is downloaded, whose files are not looked at before.
    monkeypatch.setattr("dinov2.hf.pretrained.files_with_names_in_memory", lambda *_: [])
    with pytest.raises(WeightsError, match="names that transformers has in memory since 5.18"):
        our_class(family, "Model").from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "fc1"], ["o_proj", "down_proj"]])
def test_an_adapter_by_names_in_memory_is_refused_whole(target: Any, swiglu: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs, _ = stock_and_ours("Dinov2", "Model", use_swiglu_ffn=swiglu)
    if "o_proj" not in "".join(theirs.state_dict()):
        pytest.skip("this version of transformers keeps the names on disk in memory")
    theirs.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    # PEFT finds no module at all (a ValueError of its own), or some of them.
    refusal = "would load in part|not found in the base model"
    with pytest.raises((ValueError, WeightsError), match=refusal):
        peft.PeftModel.from_pretrained(hf.Dinov2Model.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises((ValueError, WeightsError), match=refusal):
        hf.Dinov2Model.from_pretrained(tmp_path / "base").load_adapter(tmp_path / "adapter")
    expected = adapted(images())[0]
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert difference(hf.Dinov2Model.from_pretrained(tmp_path / "merged").eval()(images())[0], expected) < 1e-4


@EVERY_FAMILY
def test_a_folder_of_an_adapter_loads_with_the_model_below_it(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = hf.AutoModelForImageClassification.from_pretrained(saved_folder(tmp_path / "base", family))
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is our_class(family, "ForImageClassification")
    assert difference(loaded(images()).logits, adapted(images()).logits) < 1e-5
    classify = hf.pipeline("image-classification", model=str(tmp_path / "adapter"))
    assert type(classify.model) is our_class(family, "ForImageClassification")
    assert len(classify(picture(60, 80))) == 5


@EVERY_FAMILY
def test_a_pipeline_takes_its_parts_in_the_order_of_transformers(family: str, tmp_path: Path) -> None:
    folder, processor = saved_folder(tmp_path, family, "Model"), BitImageProcessor(size=56, crop_size=56)
    extract = hf.pipeline("image-feature-extraction", str(folder), str(folder), None, None, processor)
    assert type(extract.model) is our_class(family, "Model")
    assert extract.image_processor is processor


@EVERY_FAMILY
def test_a_processor_file_without_a_type_is_ours_beside_our_model(family: str, tmp_path: Path) -> None:
    our_model(family, "Model").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 40, "crop_size": 32}')
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is default_image_processor()
    assert processor.crop_size == {"height": 32, "width": 32}


@EVERY_FAMILY
def test_an_activation_can_be_replaced_and_listened_to(family: str) -> None:
    model = our_model(family, "Model")
    seen: list[torch.Tensor] = []
    model.encoder.layer[0].mlp.activation.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    plain = model(images())[0]
    assert [tuple(one.shape[-1:]) for one in seen] == [(128,)]
    for layer in model.encoder.layer:
        layer.mlp.activation = nn.ReLU()
    relu = our_model(family, "Model", hidden_act="relu")(images())[0]
    assert difference(model(images())[0], relu) < 1e-5
    assert difference(plain, relu) > 1e-3


@EVERY_FAMILY
def test_frozen_layers_stay_frozen_when_heads_are_pruned(family: str) -> None:
    model = our_model(family, "Model").requires_grad_(False)
    model.prune_heads({0: [1]})
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []


@EVERY_FAMILY
def test_autocast_is_as_near_to_float32_as_the_stock_class(family: str) -> None:
    theirs, ours = stock_and_ours(family, "Model")
    x = images(4)
    with torch.inference_mode():
        exact = ours(x).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [model(x).last_hidden_state for model in (theirs, ours)]
    errors = [float((one - exact).abs().mean()) for one in found]
    assert 0 < errors[1] <= 1.03 * errors[0]


@EVERY_FAMILY
def test_a_zero_asks_for_no_states_as_in_every_version(family: str) -> None:
    assert our_model(family, "Model")(images(), output_hidden_states=0).hidden_states is None


@EVERY_FAMILY
def test_every_image_of_a_list_needs_a_mask_or_none(family: str) -> None:
    x = images()
    with pytest.raises(ValueError, match="there are 2 images and 1 masks"):
        our_model(family, "Model")([x, x[0, :, :, :24]], [torch.ones(2, 35, dtype=torch.bool)])


@EVERY_FAMILY
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_image_of_which_all_is_masked_has_finite_tokens_and_maps(family: str, implementation: str) -> None:
    model, x = our_model(family, "Model"), images()
    model.set_attn_implementation(implementation)
    plain = model(x)
    attends = torch.ones(plain.last_hidden_state.shape[:2])
    attends[1] = 0
    for told in ({}, {"output_attentions": True}):
        found = model(x, attention_mask=attends, **told)
        assert found.last_hidden_state.isfinite().all()
        assert difference(found.last_hidden_state[0], plain.last_hidden_state[0]) < 1e-5
