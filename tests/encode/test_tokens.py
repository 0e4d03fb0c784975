"""Tokens of one backbone, however they are asked for."""

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.tokens import ImageFeatures, as_float32_on_cpu, backbone_tokens, packed_tokens, split_tokens
from dinov2.errors import ConfigError
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill, images


@pytest.fixture(scope="module")
def model() -> DinoVisionTransformer:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "block_chunks": 0}
    return fill(DinoVisionTransformer(num_register_tokens=2, **options)).eval()


@torch.no_grad()
def test_tokens_are_those_of_forward_features_with_the_patches_as_a_grid(model):
    x = images(2, 24, 40)
    tokens, output = backbone_tokens(model, x), model.forward_features(x)
    assert tokens.patches.shape == (2, 3, 5, 64)
    assert torch.equal(tokens.patches[:, 1, 2], output["x_norm_patchtokens"][:, 1 * 5 + 2])
    assert torch.equal(tokens.cls, output["x_norm_clstoken"])
    assert torch.equal(tokens.registers, output["x_norm_regtokens"])
    assert tokens.layers == {}


@torch.no_grad()
def test_layers_come_under_the_index_that_was_given_and_the_last_block_always_comes(model):
    x = images(2, 32, 32)
    tokens = backbone_tokens(model, x, layers=[0, -1])
    assert sorted(tokens.layers) == [-1, 0]
    assert_close(tokens.cls, backbone_tokens(model, x).cls)
    assert torch.equal(tokens.layers[-1].patches, tokens.patches)
    ((patches, cls),) = model.get_intermediate_layers(x, [0], return_class_token=True)
    assert torch.equal(tokens.layers[0].patches.flatten(1, 2), patches)
    assert torch.equal(tokens.layers[0].cls, cls)
    assert not torch.allclose(tokens.layers[0].cls, tokens.cls)


def test_a_block_that_does_not_exist_is_refused(model):
    with pytest.raises(ConfigError, match="there is no block 3; this model has blocks 0 to 2"):
        backbone_tokens(model, images(1, 32, 32), layers=[3])


@torch.no_grad()
def test_one_packed_pass_equals_batch_by_batch(model):
    batches = [images(2, 32, 32), images(1, 24, 40), images(3, 8, 16)]
    for packed, batch in zip(packed_tokens(model, batches), batches, strict=True):
        alone = backbone_tokens(model, batch)
        assert packed.patches.shape == alone.patches.shape
        for ours, theirs in zip(packed[:3], alone[:3], strict=True):
            assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_sequence_is_cut_into_class_token_registers_and_patches():
    sequence = torch.arange(2 * 9).reshape(2, 9, 1).float()
    tokens = split_tokens(sequence, (2, 3), has_cls=True)
    assert tokens.cls[:, 0].tolist() == [0, 9]
    assert tokens.registers[0, :, 0].tolist() == [1, 2]
    assert tokens.patches[0, :, :, 0].tolist() == [[3, 4, 5], [6, 7, 8]]


def test_without_a_class_token_the_mean_of_the_patches_stands_for_the_image():
    tokens = split_tokens(torch.arange(6.0).reshape(1, 6, 1), (2, 3), has_cls=False)
    assert tokens.cls.tolist() == [[2.5]]
    assert tokens.registers.shape == (1, 0, 1)
    with pytest.raises(ConfigError, match="6 tokens for a grid of 2 x 3"):
        split_tokens(torch.zeros(1, 6, 1), (2, 3), has_cls=True)


@torch.no_grad()
def test_features_of_an_image_do_not_keep_its_batch_in_memory(model):
    tokens = as_float32_on_cpu(backbone_tokens(model, images(4, 32, 32), layers=[1]))
    kept = ImageFeatures.of(tokens, 2, (32, 32))
    assert torch.equal(kept.patches, tokens.patches[2]) and torch.equal(kept.layers[1].cls, tokens.layers[1].cls[2])
    assert kept.patches.untyped_storage().nbytes() == kept.patches.nbytes
