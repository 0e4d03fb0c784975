"""What a backbone accepts, and what it says when it does not."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dinov2.models.vision_transformer import ARCHITECTURES, DinoVisionTransformer, vit_large, vit_nano, vit_small


def tiny(**options) -> DinoVisionTransformer:
    settings = {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 4, "num_heads": 2, "block_chunks": 0}
    return DinoVisionTransformer(**{**settings, **options}).eval()


@pytest.mark.parametrize("from_chunks, to_chunks", [(0, 2), (2, 0), (4, 2), (2, 2)])
def test_a_state_dict_of_either_form_loads_into_the_other(from_chunks, to_chunks):
    source, target = tiny(block_chunks=from_chunks), tiny(block_chunks=to_chunks)
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 56, 56)
    assert_close(target(x), source(x), atol=0, rtol=0)


def test_chunked_keys_keep_the_global_index():
    keys = tiny(block_chunks=2).state_dict()
    assert "blocks.1.3.norm1.weight" in keys and "blocks.0.2.norm1.weight" not in keys


def test_a_missing_block_is_reported_by_strict_loading():
    state = tiny().state_dict()
    del state["blocks.2.attn.qkv.weight"]
    with pytest.raises(RuntimeError, match="blocks.2.attn.qkv.weight"):
        tiny().load_state_dict(state)


def test_a_rectangular_native_size_works_at_its_own_and_other_sizes():
    model = tiny(img_size=(28, 70))
    assert model.pos_embed.shape == (1, 11, 64)
    assert model(torch.randn(2, 3, 28, 70)).shape == (2, 64)
    assert model(torch.randn(2, 3, 42, 14)).shape == (2, 64)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels):
    assert tiny(in_chans=channels)(torch.randn(2, channels, 56, 28)).shape == (2, 64)


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.zeros(1, 3, 60, 56), "height 60 .* 56 or 70"),
        (torch.zeros(1, 3, 56, 9), "width 9 .* 14"),
        (torch.zeros(1, 4, 56, 56), "4 channels.*in_chans=3"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_with_the_way_out(x, words):
    with pytest.raises(ValueError, match=words):
        tiny()(x)


@pytest.mark.parametrize("n, words", [(5, "4 blocks"), ([0, 0], "distinct"), ([4], "0 to 3"), (-1, "4 blocks")])
def test_blocks_that_do_not_exist_are_refused(n, words):
    with pytest.raises(ValueError, match=words):
        tiny().get_intermediate_layers(torch.zeros(1, 3, 56, 56), n=n)


def test_intermediate_layers_take_negative_indices_and_return_registers():
    model, x = tiny(num_register_tokens=2), torch.randn(1, 3, 28, 42)
    ((patches, cls, registers),) = model.get_intermediate_layers(
        x, n=[-1], return_class_token=True, return_register_tokens=True
    )
    features = model.forward_features(x)
    assert_close(patches, features["x_norm_patchtokens"])
    assert_close(cls, features["x_norm_clstoken"])
    assert_close(registers, features["x_norm_regtokens"])
    assert model.get_intermediate_layers(x, n=0) == ()


def test_lists_of_images_and_masks_must_have_equal_lengths():
    images = [torch.zeros(1, 3, 28, 28)] * 2
    with pytest.raises(ValueError, match="2 image tensors came with 1 masks"):
        tiny().forward_features(images, [None])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ffn_layer": "glu"}, "swiglufused"),
        ({"block_chunks": 3}, "divide the depth 4"),
        ({"num_register_tokens": -1}, "0 for none"),
        ({"num_heads": 7}, "multiple of num_heads"),
    ],
)
def test_options_that_make_no_model_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


def test_identity_feed_forward_adds_the_normalised_tokens():
    model, x = tiny(ffn_layer="identity", depth=1, block_chunks=0), torch.randn(1, 3, 56, 56)
    block = model.block_list[0]
    tokens = model.prepare_tokens_with_masks(x)
    after = tokens + block.attn(block.norm1(tokens))
    assert_close(block(tokens), after + block.norm2(after))


def test_construction_on_the_meta_device():
    with torch.device("meta"):
        model = vit_large(patch_size=14, img_size=518, init_values=1.0, block_chunks=4)
    assert model.pos_embed.is_meta and sum(p.numel() for p in model.parameters()) == 304_368_640


def test_initialisation_follows_the_paper():
    model = vit_small(init_values=1e-5, num_register_tokens=4)
    assert model.mask_token.abs().max() == 0
    assert model.cls_token.std() < 1e-5 and model.register_tokens.std() < 1e-5
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    block = model.block_list[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.qkv.bias.abs().max() == 0 and torch.all(block.ls1.gamma == 1e-5)
    bound = (3 * 16 * 16) ** -0.5
    assert model.patch_embed.proj.weight.abs().max() <= bound
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_every_architecture_has_heads_of_64_channels():
    for name, (dim, _, heads) in ARCHITECTURES.items():
        assert dim == 64 * heads, name


def test_half_precision_models_keep_their_type_and_copies_work():
    model = copy.deepcopy(vit_nano(patch_size=8, img_size=32)).bfloat16().eval()
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model(torch.randn(1, 3, 40, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.3, 1 / 3, 0.4, 0.7])
def test_drop_path_rates_are_those_of_numpy_linspace_bit_for_bit(rate):
    with torch.device("meta"):
        for depth in (1, 2, 3, 4, 6, 7, 12, 24, 40):
            rates = [block.sample_drop_ratio for block in tiny(depth=depth, drop_path_rate=rate).block_list]
            assert rates == np.linspace(0, rate, depth).tolist(), depth
