"""One packed pass over crops of several sizes equals a pass for each."""

import pytest
import torch
from torch.testing import assert_close

from dinov2.layers.attention import attend_heads
from dinov2.layers.packing import pack, unpack
from dinov2.models.vision_transformer import DinoVisionTransformer


def tiny(**options) -> DinoVisionTransformer:
    return DinoVisionTransformer(
        img_size=56, patch_size=14, embed_dim=64, depth=3, num_heads=2, init_values=0.1, block_chunks=0, **options
    )


def test_unpack_undoes_pack():
    groups = [torch.randn(2, 5, 3), torch.randn(4, 1, 3)]
    tokens, layout = pack(groups)
    assert tokens.shape == (14, 3) and layout == ((2, 5), (4, 1))
    for group, back in zip(groups, unpack(tokens, layout), strict=True):
        assert_close(back, group)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_a_list_of_images_equals_one_by_one_with_gradients(registers, ffn_layer):
    model = tiny(num_register_tokens=registers, ffn_layer=ffn_layer)
    images = [torch.randn(2, 3, 56, 56), torch.randn(3, 3, 28, 42), torch.randn(1, 3, 70, 14)]
    masks = [torch.rand(2, 16) < 0.5, None, torch.rand(1, 5) < 0.5]

    def loss_and_gradients(features):
        model.zero_grad()
        sum((f["x_norm_clstoken"] ** 2).sum() + f["x_norm_patchtokens"][:, 0].sum() for f in features).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    together = model.forward_features(images, masks)
    alone = [model.forward_features(x, m) for x, m in zip(images, masks, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one["masks"] is other["masks"]
        for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            assert_close(one[key], other[key], atol=1e-5, rtol=1e-5)
    packed, separate = loss_and_gradients(together), loss_and_gradients(alone)
    for name in packed:
        assert_close(packed[name], separate[name], atol=1e-4, rtol=1e-4, msg=name)


def test_a_list_without_is_training_gives_class_tokens():
    model = tiny()
    images = [torch.randn(2, 3, 56, 56), torch.randn(1, 3, 28, 28)]
    first, second = model(images)
    assert first.shape == (2, 64) and second.shape == (1, 64)


def test_explicit_attention_of_short_sequences_equals_the_fused_kernel():
    heads = torch.randn(3, 3, 2, 17, 32, dtype=torch.float64, requires_grad=True)
    explicit = attend_heads(*heads)
    with torch.no_grad():
        fused = attend_heads(*heads)
    assert_close(explicit.detach(), fused)
    small = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda heads: attend_heads(*heads), (small,))
