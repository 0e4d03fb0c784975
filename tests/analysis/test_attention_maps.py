import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from dinov2.analysis.attention_maps import attention_rows, block_number, look_into_block, patch_token
from dinov2.errors import ConfigError
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill, images


def small(**changes):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "block_chunks": 0}
    return fill(DinoVisionTransformer(**{**options, **changes})).eval()


def test_the_rows_are_what_torchs_own_attention_gives_to_unit_values():
    qkv = torch.randn(2, 7, 3 * 8)
    query, key, _ = qkv.reshape(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    everything = scaled_dot_product_attention(query, key, torch.eye(7).expand(2, 2, 7, 7))
    assert_close(attention_rows(qkv, 2, range(7)), everything)
    assert_close(attention_rows(qkv, 2, [5, 0]), everything[:, :, [5, 0]])


def test_the_rows_explain_what_the_attention_layer_computed():
    layer = small().block_list[0].attn
    tokens = torch.randn(1, 9, 32)
    with torch.no_grad():
        qkv = layer.qkv(tokens)
        values = qkv[..., 64:].unflatten(-1, (2, 16)).transpose(1, 2)
        mixed = (attention_rows(qkv, 2, range(9)) @ values).transpose(1, 2).flatten(2)
        assert_close(layer.proj(mixed), layer(tokens), atol=1e-5, rtol=1e-5)


def test_rows_stay_in_float32_under_autocast():
    qkv = torch.randn(1, 5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = attention_rows(qkv, 2, [0])
    assert rows.dtype == torch.float32
    assert torch.equal(rows, attention_rows(qkv, 2, [0]))


@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("registers", [0, 4])
def test_attention_is_taken_apart_into_class_token_registers_and_a_grid_of_patches(registers, chunks):
    model = small(num_register_tokens=registers, block_chunks=chunks)
    view = look_into_block(model, images(2, 24, 40), block=1, queries=[0, 1])
    to_cls, to_registers, to_patches = view.attention
    assert to_cls.shape == (2, 2, 2)
    assert to_registers.shape == (2, 2, 2, registers)
    assert to_patches.shape == (2, 2, 2, 3, 5)
    assert_close(to_cls + to_registers.sum(-1) + to_patches.sum((-2, -1)), torch.ones(2, 2, 2))


def test_the_key_of_a_patch_lands_on_its_place_in_the_grid():
    model = small(num_register_tokens=2)
    token = patch_token(2, 1, grid=(3, 5), num_register_tokens=2)
    assert token == 1 + 2 + 2 * 5 + 1
    block = model.block_list[0]
    with torch.no_grad():  # an identity as queries and keys: a token looks at itself most
        block.attn.qkv.weight.zero_()
        block.attn.qkv.weight[:32] = block.attn.qkv.weight[32:64] = 3 * torch.eye(32)
        block.attn.qkv.bias.zero_()
    view = look_into_block(model, torch.randn(1, 3, 24, 40), block=0, queries=[token])
    assert int(view.attention.to_patches[0].mean(dim=(0, 1)).argmax()) == 2 * 5 + 1


@pytest.mark.parametrize("block, same", [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_tokens_are_those_behind_the_block_before_the_final_norm(block, same):
    model, batch = small(num_register_tokens=2), images(1, 24, 40)
    view = look_into_block(model, batch, block=block)
    with torch.no_grad():
        patches, cls, registers = model.get_intermediate_layers(
            batch, [same], norm=False, return_class_token=True, return_register_tokens=True
        )[0]
    assert_close(view.tokens, torch.cat([cls[:, None], registers, patches], dim=1))


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_does_not_exist_is_refused(block):
    with pytest.raises(ConfigError, match=f"there is no block {block} in a model of 3 blocks; choose 0 to 2, or -1"):
        look_into_block(small(), images(1, 16, 16), block=block)


def test_blocks_are_counted_from_either_end():
    assert [block_number(block, 3) for block in (0, 2, -1, -3)] == [0, 2, 2, 0]


def test_a_patch_outside_of_the_grid_is_refused():
    with pytest.raises(ConfigError, match=r"no patch \(3, 0\) on a grid of 3 rows and 5 columns"):
        patch_token(3, 0, grid=(3, 5))


def test_models_without_queries_and_keys_are_refused_by_name():
    with pytest.raises(ConfigError, match="which a Conv2d does not show; leave attention out"):
        look_into_block(nn.Conv2d(3, 3, 1), images(1, 16, 16))
