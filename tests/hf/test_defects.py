"""Calls that some version of the stock classes gets wrong; `row n` counts the known defects of the stock classes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hf.model_cases import CLASSES, FAMILIES, difference, images, our_model

pytestmark = pytest.mark.parametrize("family", FAMILIES)

EVERY_CLASS = pytest.mark.parametrize("kind", CLASSES)
N_LAYERS, N_HEADS, N_PATCHES = 2, 4, 35  # of `our_model` and `images`


def registers_of(model: Any) -> int:
    return int(model.base_model.embeddings.num_register_tokens)


# Rows 2, 3 and 4.
@EVERY_CLASS
def test_a_config_without_output_objects_gives_tuples(family: str, kind: str) -> None:
    model = our_model(family, kind)
    expected = model(images()).to_tuple()
    model.config.return_dict = False
    assert difference(model(images()), expected) == 0
    assert difference(model(images(), return_dict=True).to_tuple(), expected) == 0


# Row 5.
@EVERY_CLASS
def test_the_argument_return_dict_gives_tuples(family: str, kind: str) -> None:
    model = our_model(family, kind)
    output = model(images(), return_dict=False)
    assert type(output) is tuple
    assert difference(output, model(images()).to_tuple()) == 0


# Row 9.
@EVERY_CLASS
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_attention_maps_come_under_every_implementation(family: str, kind: str, implementation: str) -> None:
    model = our_model(family, kind)
    model.set_attn_implementation(implementation)
    output = model(images(), output_attentions=True)
    n_tokens = 1 + registers_of(model) + N_PATCHES
    assert [tuple(one.shape) for one in output.attentions] == [(2, N_HEADS, n_tokens, n_tokens)] * N_LAYERS
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, N_HEADS, n_tokens))
    plain = model(images())
    assert plain.attentions is None
    assert difference(output[0], plain[0]) < 1e-5


# Row 10.
@EVERY_CLASS
def test_attention_maps_come_when_the_config_asks_for_them(family: str, kind: str) -> None:
    model = our_model(family, kind, output_attentions=True)
    assert len(model(images()).attentions) == N_LAYERS
    assert model(images(), output_attentions=False).attentions is None


# Row 11: a masked head contributes nothing, as if its columns of the output projection were zero.
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_head_mask_takes_the_head_out(family: str, implementation: str) -> None:
    model, cut = our_model(family, "Model"), our_model(family, "Model")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        cut.encoder.layer[1].attention.output.dense.weight[:, 8:16] = 0
    mask = torch.ones(N_LAYERS, N_HEADS)
    mask[1, 1] = 0
    expected = cut(images()).last_hidden_state
    assert difference(model(images(), head_mask=mask).last_hidden_state, expected) < 1e-5
    assert difference(model(images()).last_hidden_state, expected) > 1e-2


# Row 11.
@EVERY_CLASS
def test_a_mask_of_all_heads_leaves_the_bias_of_the_projection(family: str, kind: str) -> None:
    model, cut = our_model(family, kind), our_model(family, kind)
    for layer in cut.base_model.encoder.layer:
        nn.init.zeros_(layer.attention.output.dense.weight)
    masked = model(images(), head_mask=torch.zeros(N_HEADS), return_dict=False)
    assert difference(masked, cut(images(), return_dict=False)) < 1e-5


# Row 12.
@EVERY_CLASS
def test_pruned_heads_are_those_that_a_mask_takes_out(family: str, kind: str, tmp_path: Any) -> None:
    model = our_model(family, kind)
    mask = torch.ones(N_LAYERS, N_HEADS)
    mask[0, [1, 2]] = 0
    mask[1, 3] = 0
    expected = model(images(), head_mask=mask, return_dict=False)
    model.prune_heads({0: [1], 1: [3]})
    model.prune_heads({0: [2]})
    assert model.base_model.encoder.layer[0].attention.attention.query.weight.shape == (16, 32)
    assert difference(model(images(), return_dict=False), expected) < 1e-5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert difference(again(images(), return_dict=False), expected) < 1e-5


# Row 13.
@EVERY_CLASS
@pytest.mark.parametrize("unknown", ["interpolate_pos_encoding", "output_hidden_state", "pixels"])
def test_unknown_keywords_are_refused(family: str, kind: str, unknown: str) -> None:
    model = our_model(family, kind)
    with pytest.raises(TypeError, match=f"{family}{kind} got an unexpected keyword argument '{unknown}'"):
        model(images(), **{unknown: True})


# Row 13.
def test_a_mistyped_keyword_is_answered_with_the_nearest(family: str) -> None:
    with pytest.raises(TypeError, match="did you mean 'output_attentions'"):
        our_model(family, "Model")(images(), output_attention=True)


# Row 21, row 22: the one rate of the config in every layer, as stock.
def test_stochastic_depth_drops_branches_in_training_at_the_same_rate_everywhere(family: str) -> None:
    model = our_model(family, "Model", drop_path_rate=0.4, num_hidden_layers=3)
    assert [layer.drop_path.drop_prob for layer in model.encoder.layer] == [0.4] * 3
    x = images(1).expand(200, -1, -1, -1)
    rates = []
    for layer in model.train().encoder.layer:
        seen: list[Tensor] = []
        layer.drop_path.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        tokens = model.embeddings(x)
        layer(tokens)
        rates += [float((output.flatten(1).abs().sum(dim=1) == 0).float().mean()) for output in seen]
    assert len(rates) == 6
    assert all(0.25 < rate < 0.55 for rate in rates)
    assert difference(model.eval()(x[:2])[0], model(x[:2])[0]) == 0


# Row 23.
def test_hidden_dropout_acts_on_embeddings_and_on_the_output_of_attention(family: str) -> None:
    model = our_model(family, "Model", hidden_dropout_prob=0.5).train()
    embedded = model.embeddings(images())
    assert 0.4 < float((embedded == 0).float().mean()) < 0.6
    attended, _ = model.encoder.layer[0].attention(embedded)
    assert 0.4 < float((attended == 0).float().mean()) < 0.6
    # Row 24: nothing is dropped within the network behind it, in no version.
    assert float((model.encoder.layer[0].mlp(embedded) == 0).float().mean()) == 0


# Row 25.
@EVERY_CLASS
def test_patches_may_be_given_as_height_and_width(family: str, kind: str) -> None:
    assert difference(
        our_model(family, kind, patch_size=(8, 8))(images(), return_dict=False),
        our_model(family, kind)(images(), return_dict=False),
    ) == 0  # fmt: skip
    oblong = our_model(family, "Backbone", patch_size=[8, 4])
    assert oblong(images()).feature_maps[0].shape == (2, 32, 5, 14)


# Row 26.
def test_a_native_size_need_not_be_square(family: str) -> None:
    model = our_model(family, "Model", image_size=(40, 56))
    positions = model.embeddings.interpolate_pos_encoding(torch.zeros(()), 40, 56)
    assert torch.equal(positions, model.embeddings.position_embeddings)
    assert model(images()).last_hidden_state.shape[1] == 1 + registers_of(model) + N_PATCHES
    assert model(images(2, 56, 40)).last_hidden_state.isfinite().all()


# Row 27.
@EVERY_CLASS
def test_an_image_below_one_patch_is_refused_in_a_sentence(family: str, kind: str) -> None:
    with pytest.raises(ValueError, match="image width 7 is smaller than a patch of 8 pixels"):
        our_model(family, kind)(images(1, 32, 7))


# Row 28: as stock, and documented: whole patches are seen.
def test_what_is_left_beyond_whole_patches_is_not_seen(family: str) -> None:
    model, x = our_model(family, "Model"), images(2, 45, 39)
    assert difference(model(x)[0], model(x[:, :, :40, :32])[0]) == 0


# Row 29.
@EVERY_CLASS
def test_missing_pixels_are_a_value_error(family: str, kind: str) -> None:
    with pytest.raises(ValueError, match="You have to specify pixel_values"):
        our_model(family, kind)(pixel_values=None)


# Row 30.
@EVERY_CLASS
def test_one_image_without_a_batch_is_refused_with_the_way_out(family: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 40, 56\]; give a batch .* pixel_values\[None\]"):
        our_model(family, kind)(images()[0])


# Row 31.
@EVERY_CLASS
def test_an_empty_batch_gives_empty_outputs(family: str, kind: str) -> None:
    model = our_model(family, kind)
    output = model(images()[:0], output_hidden_states=True, output_attentions=True)
    first = output.feature_maps[0] if kind == "Backbone" else output[0]
    assert first.shape[1:] == (model(images()).feature_maps[0] if kind == "Backbone" else model(images())[0]).shape[1:]
    assert len(first) == 0


# Row 32.
def test_a_mask_for_a_model_without_a_mask_token_is_refused(family: str) -> None:
    if family == "Dinov2WithRegisters":
        model = our_model(family, "Model")
        assert model.embeddings.mask_token is not None  # this family always has one
        return
    model = our_model(family, "Model", use_mask_token=False)
    with pytest.raises(ValueError, match="this model has no mask token .*use_mask_token=False"):
        model(images(), bool_masked_pos=torch.ones(2, N_PATCHES, dtype=torch.bool))


# Row 33.
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_masks_of_zeros_and_ones_are_masks(family: str, dtype: torch.dtype) -> None:
    model = our_model(family, "Model")
    mask = torch.arange(2 * N_PATCHES).view(2, N_PATCHES) % 3 == 0
    output = model(images(), bool_masked_pos=mask)
    assert difference(model(images(), bool_masked_pos=mask.to(dtype))[0], output[0]) == 0
    assert difference(model(images())[0], output[0]) > 1e-2


# Row 34.
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_under_a_mask_does_not_spread(family: str, value: float) -> None:
    model, x = our_model(family, "Model"), images()
    mask = torch.zeros(2, N_PATCHES, dtype=torch.bool)
    mask[:, 0] = True
    broken = x.clone()
    broken[:, :, :8, :8] = value
    assert difference(model(broken, bool_masked_pos=mask)[0], model(x, bool_masked_pos=mask)[0]) < 1e-5


# Rows 38 and 39; the resize itself is compared with the framework's in tests/layers.
def test_positions_are_resized_as_the_installed_class_does_or_as_in_training(family: str) -> None:
    model = our_model(family, "Model")
    registers = family == "Dinov2WithRegisters"
    grid = model.embeddings.position_embeddings[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    as_stock = F.interpolate(grid, size=(3, 6), mode="bicubic", antialias=registers)
    found = model.embeddings.interpolate_pos_encoding(torch.zeros(()), 24, 48)
    assert difference(found[:, 1:], as_stock.flatten(2).transpose(1, 2)) < 1e-6
    model.config.position_interpolation = "original"
    in_training = as_stock
    if not registers:
        in_training = F.interpolate(grid, scale_factor=(3.1 / 4, 6.1 / 4), mode="bicubic", recompute_scale_factor=False)
    found = model.embeddings.interpolate_pos_encoding(torch.zeros(()), 24, 48)
    assert difference(found[:, 1:], in_training.flatten(2).transpose(1, 2)) < 1e-6


# Row 51: as the newest version.
def test_softmax_of_half_precision_stays_in_half_precision(family: str) -> None:
    model = our_model(family, "Model").bfloat16()
    output = model(images(), output_attentions=True)
    assert {one.dtype for one in output.attentions} == {torch.bfloat16}


# Row 52.
def test_a_backbone_stops_behind_its_last_stage(family: str) -> None:
    backbone = our_model(family, "Backbone", num_hidden_layers=4, out_indices=[0, 1])
    ran: list[int] = []
    for index, layer in enumerate(backbone.encoder.layer):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    expected = backbone(images(), output_hidden_states=True)
    assert ran == [0, 1, 2, 3]
    ran.clear()
    output = backbone(images())
    assert ran == [0]
    assert difference(output.feature_maps, expected.feature_maps) == 0


# Rows 52 and 53.
def test_a_backbone_that_is_cut_to_its_last_stage_leaves_no_parameter_without_gradient(
    family: str, tmp_path: Any
) -> None:
    whole = our_model(family, "Backbone", num_hidden_layers=4, out_indices=[1, 2])
    whole.save_pretrained(tmp_path)
    backbone = type(whole).from_pretrained(tmp_path, num_hidden_layers=2)
    maps = backbone(images()).feature_maps
    assert difference(maps, whole(images()).feature_maps) == 0
    backbone.train()
    sum(one.square().sum() for one in backbone(images()).feature_maps).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


# Row 53.
@pytest.mark.parametrize("kind", CLASSES[:2])
def test_training_without_masks_reaches_every_parameter(family: str, kind: str) -> None:
    model = our_model(family, kind).train()
    model(images())[0].square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not model.base_model.embeddings.mask_token.grad.any()


# Row 59.
@pytest.mark.parametrize("extra", [-1, 1])
def test_an_attention_mask_of_another_length_is_refused_also_when_it_masks_nothing(family: str, extra: int) -> None:
    model = our_model(family, "Model")
    length = 1 + registers_of(model) + N_PATCHES
    with pytest.raises(ValueError, match=f"there are 2 images of {length} tokens .* give .2, {length}."):
        model(images(), attention_mask=torch.ones(2, length + extra))


def test_an_attention_mask_hides_tokens(family: str) -> None:
    model = our_model(family, "Model")
    first = 1 + registers_of(model)
    attends = torch.ones(2, first + N_PATCHES)
    attends[:, first:first + 7] = 0  # fmt: skip
    other = images()
    other[:, :, :8] += 1  # the first row of patches
    hidden, shown = (model(x, attention_mask=attends).pooler_output for x in (images(), other))
    assert difference(hidden, shown) < 1e-6
    assert difference(model(images()).pooler_output, model(other).pooler_output) > 1e-3


# Rows 63 and 64: what documents of transformers say otherwise.
def test_the_pooled_output_is_the_normed_class_token_and_the_head_sees_it_beside_the_mean_patch(family: str) -> None:
    model = our_model(family, "ForImageClassification")
    output = model.base_model(images(), output_hidden_states=True)
    tokens = model.base_model.layernorm(output.hidden_states[-1])
    assert torch.equal(output.pooler_output, tokens[:, 0])
    patches = tokens[:, 1 + registers_of(model) :]
    seen = torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)
    torch.testing.assert_close(model(images()).logits, seen @ model.classifier.weight.T + model.classifier.bias)


# Row 66.
@EVERY_CLASS
def test_flex_attention_trains_on_a_cpu(family: str, kind: str) -> None:
    model, other = our_model(family, kind), our_model(family, kind)
    model.set_attn_implementation("flex_attention")
    for each in (model, other):
        first = each(images(), return_dict=False)[0]
        (first[0] if kind == "Backbone" else first).square().sum().backward()
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    assert max(difference(one.grad, another.grad) for (_, one), another in pairs if one.grad is not None) < 1e-3


# Row 68.
@EVERY_CLASS
def test_a_flag_that_is_none_means_what_the_config_says(family: str, kind: str) -> None:
    model = our_model(family, kind, output_hidden_states=True)
    assert len(model(images(), output_hidden_states=None).hidden_states) == N_LAYERS + 1
    assert model(images(), output_hidden_states=False).hidden_states is None
