"""What transformers checks of every model: signatures, states, attention maps, output forms, batches, backbones."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dinov2.hf as hf
from tests.hf.common_cases import EVERY_CLASS, EVERY_FAMILY, leaves, our_class
from tests.hf.model_cases import difference, images, our_model, settings

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
N_LAYERS, N_HEADS, N_PATCHES = 2, 4, 35  # of `our_model` and `images`

# Largest difference between two kernels at values of about one.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


def n_tokens(model: Any) -> int:
    return 1 + int(model.base_model.embeddings.num_register_tokens) + N_PATCHES


# Signatures and parts.


@EVERY_CLASS
def test_the_first_argument_is_the_main_input(family: str, kind: str) -> None:
    wanted = our_class(family, kind)
    first = list(inspect.signature(wanted.forward).parameters)[1]
    assert first == wanted.main_input_name == "pixel_values"


@EVERY_CLASS
@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_all_parts_are_of_the_family(family: str, kind: str, use_swiglu_ffn: bool) -> None:
    model = our_model(family, kind, use_swiglu_ffn=use_swiglu_ffn, drop_path_rate=0.1)
    names = {type(module).__name__ for module in model.modules() if type(module).__module__.startswith("dinov2.hf")}
    network = "SwiGLUFFN" if use_swiglu_ffn else "MLP"
    parts = "Embeddings PatchEmbeddings Encoder Layer Attention SelfAttention SelfOutput LayerScale DropPath".split()
    head = {"Model"} if kind == "ForImageClassification" else set()
    assert names == {family + part for part in {*parts, network, kind, *head}}


@EVERY_CLASS
def test_two_calls_agree(family: str, kind: str) -> None:
    model = our_model(family, kind)
    assert difference(leaves(model(images())), leaves(model(images()))) == 0


# States and attention maps.


@EVERY_CLASS
@pytest.mark.parametrize("by", ["argument", "config"])
def test_hidden_states_come_before_every_block_and_after_the_last(family: str, kind: str, by: str) -> None:
    told = {"output_hidden_states": True}
    model = our_model(family, kind, **(told if by == "config" else {}))
    output = model(images(), **(told if by == "argument" else {}))
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, n_tokens(model), 32)] * (N_LAYERS + 1)
    assert model(images(), output_hidden_states=False).hidden_states is None


@EVERY_CLASS
@pytest.mark.parametrize("by", ["argument", "config"])
def test_attention_maps_come_one_a_layer(family: str, kind: str, by: str) -> None:
    told = {"output_attentions": True}
    model = our_model(family, kind, **(told if by == "config" else {}))
    told = told if by == "argument" else {}
    shape = (2, N_HEADS, n_tokens(model), n_tokens(model))
    alone = model(images(), **told)
    assert [tuple(one.shape) for one in alone.attentions] == [shape] * N_LAYERS
    both = model(images(), output_hidden_states=True, **told)
    assert difference(both.attentions, alone.attentions) == 0
    assert len(both.hidden_states) == N_LAYERS + 1
    assert len(both) == len(alone) + 1


@EVERY_CLASS
def test_gradients_reach_returned_states_and_maps(family: str, kind: str) -> None:
    model = our_model(family, kind).train()
    output = model(images(), output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], output.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    leaves(output)[0].flatten()[0].backward()
    assert all(bool(tensor.grad.any()) for tensor in kept)


@EVERY_CLASS
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_hidden_states": True, "output_attentions": True},
    ],
)
def test_tuples_hold_what_the_named_output_holds(family: str, kind: str, told: dict[str, Any]) -> None:
    model = our_model(family, kind)
    if kind == "ForImageClassification":
        told = {**told, "labels": torch.tensor([0, 1])}
    named, plain = model(images(), return_dict=True, **told), model(images(), return_dict=False, **told)
    assert type(plain) is tuple
    assert difference(plain, named.to_tuple()) == 0
    assert len(plain) == len([name for name in named if named[name] is not None])


# Batches.


@EVERY_CLASS
@pytest.mark.parametrize("network", [{}, {"use_swiglu_ffn": True}], ids=["MLP", "SwiGLU"])
def test_a_row_of_a_batch_is_what_the_image_gives_alone(family: str, kind: str, network: dict[str, Any]) -> None:
    model = our_model(family, kind, **network)
    x = images(3)
    told = {"output_hidden_states": True, "output_attentions": True}
    whole = leaves(model(x, **told))
    for row in range(3):
        alone = leaves(model(x[row : row + 1], **told))
        assert difference([tensor[row : row + 1] for tensor in whole], alone) < 1e-5


# Implementations of attention.


@EVERY_CLASS
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left", "scores"])
def test_fused_attention_agrees_with_explicit_weights(family: str, kind: str, dtype: torch.dtype, padding: str) -> None:
    agrees_with_explicit_weights("sdpa", family, kind, dtype, padding)


@pytest.mark.slow  # flex attention is compiled
@EVERY_FAMILY
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left", "scores"])
def test_flex_attention_agrees_with_explicit_weights(family: str, dtype: torch.dtype, padding: str) -> None:
    torch._dynamo.reset()
    agrees_with_explicit_weights("flex_attention", family, "Model", dtype, padding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@EVERY_FAMILY
def test_flash_attention_agrees_with_explicit_weights(family: str) -> None:
    pytest.importorskip("flash_attn")
    agrees_with_explicit_weights("flash_attention_2", family, "Model", torch.bfloat16, "none", device="cuda")


def agrees_with_explicit_weights(
    implementation: str, family: str, kind: str, dtype: torch.dtype, padding: str, *, device: str = "cpu"
) -> None:
    model, x = our_model(family, kind).to(device, dtype), images().to(device)
    told: dict[str, Any] = {}
    length = n_tokens(model)
    if padding == "scores":  # a mask that is added to the scores
        told["attention_mask"] = torch.randn(2, 1, length, length).to(device, dtype)
    elif padding != "none":
        mask = torch.ones(2, length, dtype=torch.long, device=device)
        mask[1, slice(-9, None) if padding == "right" else slice(1, 9)] = 0
        told["attention_mask"] = mask
    results = {}
    with torch.no_grad():
        for name in ("eager", implementation):
            model.set_attn_implementation(name)
            results[name] = leaves(model(x, **told))
            with_maps = model(x, **told, output_attentions=True)
            assert len(with_maps.attentions) == N_LAYERS
            scale = max(float(tensor.abs().max()) for tensor in results["eager"])
            assert difference(results[name], leaves(with_maps)[: len(results[name])]) <= TOLERANCES[dtype] * scale
    assert difference(results["eager"], results[implementation]) <= TOLERANCES[dtype] * scale


@EVERY_CLASS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_implementation_is_chosen_at_loading_at_building_and_afterwards(
    family: str, kind: str, implementation: str, tmp_path: Path
) -> None:
    model = our_model(family, kind)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    wanted = our_class(family, kind)
    loaded = wanted.from_pretrained(tmp_path, attn_implementation=implementation)
    built = wanted._from_config(model.config, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    for one in (loaded, built, model):
        assert one.config._attn_implementation == implementation
        assert one.base_model.encoder.layer[0].attention.attention.config._attn_implementation == implementation
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())


@EVERY_CLASS
def test_an_implementation_that_is_not_installed_is_refused(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    model.save_pretrained(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
            our_class(family, kind).from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="no_such_attention"):
        our_class(family, kind).from_pretrained(tmp_path, attn_implementation="no_such_attention")


@EVERY_FAMILY
def test_a_registered_kernel_gets_heads_and_the_mask_in_its_form(family: str) -> None:
    seen: list[Any] = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, **told: Any) -> Any:
        seen.append((tuple(query.shape), None if mask is None else tuple(mask.shape), told["scaling"]))
        bias = None if mask is None or mask.ndim == 4 else (mask != 0)[:, None, None, :]
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return attended.transpose(1, 2), None

    model = our_model(family, "Model")
    length = n_tokens(model)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 5:9] = 0
    expected = model(images(), attention_mask=mask).last_hidden_state
    ALL_ATTENTION_FUNCTIONS.register("flash_attention_of_a_test", kernel)
    model.config._attn_implementation_internal = "flash_attention_of_a_test"
    output = model(images(), attention_mask=mask).last_hidden_state
    # Flash attention takes masks of tokens.
    assert seen == [((2, N_HEADS, length, 8), (2, length), 8**-0.5)] * N_LAYERS
    assert difference(output, expected) < 1e-5


# Configurations.


@EVERY_FAMILY
def test_a_config_has_the_common_attributes_and_takes_them_back(family: str) -> None:
    wanted = getattr(hf, family + "Config")
    config = wanted(hidden_size=37, num_attention_heads=1, num_hidden_layers=3)
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        value = getattr(config, name)
        setattr(config, name, value + 1)
        assert getattr(config, name) == value + 1
        assert getattr(wanted(**{name: 5}), name) == 5


@EVERY_FAMILY
def test_a_config_survives_json_files_and_folders(family: str, tmp_path: Path) -> None:
    wanted = getattr(hf, family + "Config")
    config = wanted(**settings(family, out_indices=[0, 2], drop_path_rate=0.1, apply_layernorm=False))
    plain = json.loads(config.to_json_string())
    assert {name: plain[name] for name in ("hidden_size", "out_indices", "drop_path_rate")} == {
        "hidden_size": 32,
        "out_indices": [0, 2],
        "drop_path_rate": 0.1,
    }
    config.to_json_file(tmp_path / "settings.json")
    assert wanted.from_json_file(tmp_path / "settings.json").to_dict() == config.to_dict()
    for folder in (tmp_path, tmp_path / "inner"):
        config.save_pretrained(folder)
        assert wanted.from_pretrained(folder).to_dict() == config.to_dict()
    assert wanted.from_pretrained(tmp_path, subfolder="inner").to_dict() == config.to_dict()
    assert wanted.from_dict(config.to_dict()).to_dict() == config.to_dict()


@EVERY_FAMILY
def test_the_number_of_labels_follows_and_sets_their_names(family: str) -> None:
    config = getattr(hf, family + "Config")(num_labels=5)
    assert (len(config.id2label), len(config.label2id)) == (5, 5)
    config.num_labels = 3
    assert (len(config.id2label), len(config.label2id)) == (3, 3)


@EVERY_FAMILY
def test_a_config_needs_no_argument_and_keeps_the_common_ones(family: str) -> None:
    wanted = getattr(hf, family + "Config")
    assert wanted().model_type in hf.auto._CONFIGS
    told = {
        "output_hidden_states": True,
        "output_attentions": True,
        "return_dict": False,
        "problem_type": "regression",
        "architectures": ["One"],
        "id2label": {0: "a"},
        "label2id": {"a": 0},
        "chunk_size_feed_forward": 5,
    }
    config = wanted(**told)
    assert {name: getattr(config, name) for name in told} == told


# Backbones.


@EVERY_FAMILY
def test_a_backbone_says_what_it_gives(family: str) -> None:
    backbone = our_model(family, "Backbone", out_indices=[0, 1])
    assert backbone.stage_names == ["stem", "stage1", "stage2"]
    assert len(backbone.stage_names) == len(backbone.num_features) == 3
    assert backbone.out_features == ["stem", "stage1"]
    assert backbone.out_indices == [0, 1]
    assert backbone.out_feature_channels == {"stem": 32, "stage1": 32, "stage2": 32}
    assert backbone.channels == [backbone.num_features[index] for index in backbone.out_indices]
    assert getattr(backbone.backbone_type, "value", backbone.backbone_type) == "transformers"


@EVERY_FAMILY
def test_a_backbone_without_a_choice_gives_the_last_stage(family: str) -> None:
    for told in ({}, {"out_features": None}, {"out_indices": None}):
        backbone = our_model(family, "Backbone", **told)
        assert backbone.out_features == ["stage2"]
        assert len(backbone.channels) == len(backbone(images()).feature_maps) == 1


@EVERY_FAMILY
def test_a_backbone_can_be_built_from_a_changed_config(family: str) -> None:
    config = getattr(hf, family + "Config")(**settings(family, out_indices=[1, 2]))
    config.use_pretrained_backbone = False
    backbone = our_class(family, "Backbone")(config).eval()
    output = backbone(images())
    assert [tuple(one.shape) for one in output.feature_maps] == [(2, 32, 5, 7)] * 2
    assert len(backbone.channels) == 2
    config.out_features = None
    assert len(our_class(family, "Backbone")(config)(images()).feature_maps) == 1


@EVERY_FAMILY
def test_a_backbone_gives_maps_alone_unless_asked_for_more(family: str) -> None:
    backbone = our_model(family, "Backbone", out_indices=[1, 2])
    output = backbone(images())
    assert isinstance(output.feature_maps, tuple)
    assert (output.hidden_states, output.attentions) == (None, None)
    assert len(backbone(images(), output_hidden_states=True).hidden_states) == 3
    assert len(backbone(images(), output_attentions=True).attentions) == 2
    filtered = backbone.forward_with_filtered_kwargs(images(), output_hidden_states=True, a_word_of_a_head=1)
    assert difference(filtered.feature_maps, output.feature_maps) == 0


@EVERY_FAMILY
def test_unshaped_maps_are_all_tokens(family: str) -> None:
    backbone = our_model(family, "Backbone", apply_layernorm=False, reshape_hidden_states=False)
    (tokens,) = backbone(images()).feature_maps
    assert tokens.shape == (2, n_tokens(backbone), 32)
    assert difference(tokens, backbone(images(), output_hidden_states=True).hidden_states[-1]) == 0


@EVERY_CLASS
def test_grey_images_work(family: str, kind: str) -> None:
    model = our_model(family, kind, num_channels=1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in leaves(model(images(channels=1))))
    with pytest.raises(ValueError, match="expected 1 channels"):
        model(images())
