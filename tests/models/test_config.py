"""The architecture of bare weights: what the tensors tell, what the releases tell, and what is refused."""

import pytest
import torch
from torch import Tensor

from dinov2.configs import load_config
from dinov2.errors import WeightsError
from dinov2.models import build_model_from_cfg
from dinov2.models.config import BackboneConfig
from dinov2.models.vision_transformer import ARCHITECTURES, DinoVisionTransformer
from tests.golden.loading import golden_json

TINY = golden_json("backbone_tiny")["constructor"]
RELEASED = {
    f"vit{letter}14{reg}": (arch, 4 if reg else 0)
    for letter, arch in (("s", "vit_small"), ("b", "vit_base"), ("l", "vit_large"), ("g", "vit_giant2"))
    for reg in ("", "_reg")
}


def released_tensors(name: str) -> dict[str, Tensor]:
    """The keys and shapes of a released file, without the numbers."""
    return {key: torch.empty(shape, device="meta") for key, shape in golden_json(f"backbone_{name}.keys").items()}


def chunked(state: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The same tensors under the keys of a model whose blocks are grouped."""
    split = {key: key.split(".", 2) for key in state}
    return {
        f"blocks.{int(part[1]) // size}.{part[1]}.{part[2]}" if part[0] == "blocks" else key: state[key]
        for key, part in split.items()
    }


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("in_chunks", [False, True])
def test_each_released_backbone_is_recognised(name, in_chunks):
    arch, registers = RELEASED[name]
    state = released_tensors(name)
    config = BackboneConfig.from_state_dict(chunked(state, 3) if in_chunks else state)
    assert (config.embed_dim, config.depth, config.num_heads) == ARCHITECTURES[arch]
    assert config.num_register_tokens == registers
    assert config.ffn_layer == ("swiglufused" if arch == "vit_giant2" else "mlp")
    assert (config.img_size, config.patch_size, config.in_chans) == ((518, 518), 14, 3)
    assert (config.interpolate_offset, config.interpolate_antialias) == ((0.0, True) if registers else (0.1, False))
    with torch.device("meta"):
        model = config.build()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", RELEASED)
def test_the_packaged_configuration_of_a_released_backbone_says_the_same(name):
    cfg = load_config(f"eval/{name.replace('_reg', '_reg4')}_pretrain")
    with torch.device("meta"):
        backbone, width = build_model_from_cfg(cfg, only_teacher=True)
    assert BackboneConfig.from_model(backbone) == BackboneConfig.from_state_dict(released_tensors(name))
    assert width == ARCHITECTURES[RELEASED[name][0]].embed_dim


@pytest.mark.parametrize("variant", TINY)
def test_what_the_tensors_do_not_tell_can_be_given(variant):
    model = DinoVisionTransformer(**TINY[variant])
    config = BackboneConfig.from_model(model)
    told = {key: getattr(config, key) for key in ("num_heads", "interpolate_offset", "interpolate_antialias")}
    assert BackboneConfig.from_state_dict(model.state_dict(), **told) == config


def test_weights_of_another_number_of_channels_without_layer_scale_or_biases():
    model = DinoVisionTransformer(
        img_size=32, patch_size=8, in_chans=5, embed_dim=64, depth=2, num_heads=1, mlp_ratio=1.5, block_chunks=0,
        qkv_bias=False, proj_bias=False, ffn_bias=False, interpolate_offset=0.1,
    )  # fmt: skip
    assert BackboneConfig.from_state_dict(model.state_dict()) == BackboneConfig.from_model(model)


@pytest.mark.parametrize("hidden", [61, 115, 230, 453, 1792])
def test_the_width_of_the_feed_forward_network_is_met_exactly(hidden):
    """448 * (61 / 448) is a little less than 61 in floating point."""
    model = DinoVisionTransformer(
        img_size=8, patch_size=8, embed_dim=448, depth=1, num_heads=7, mlp_ratio=(hidden + 0.5) / 448, block_chunks=0
    )
    rebuilt = BackboneConfig.from_state_dict(model.state_dict()).build()
    assert rebuilt.blocks[0].mlp.fc1.out_features == model.blocks[0].mlp.fc1.out_features == hidden


def altered(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**released_tensors("vits14"), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    "state, reason",
    [
        ({}, "w.pth holds no vision transformer of this kind: patch_embed.proj.weight is missing"),
        ({"weight": torch.zeros(10, 4), "bias": torch.zeros(10)}, "it looks like a linear head"),
        (altered(pos_embed=None), "pos_embed is missing"),
        (altered(pos_embed=torch.zeros(1370, 384)), "patch or position weights of another shape"),
        (altered(patch_embed__proj__weight=torch.zeros(384, 588)), "patch or position weights of another shape"),
        (altered(pos_embed=torch.zeros(1, 13, 384)), "a grid of 12 positions, which is not square"),
        (altered(pos_embed=torch.zeros(1, 0, 384)), "which is not square"),
        (altered(pos_embed=torch.zeros(1, 1370, 100)), "100 wide, which heads of 64 channels do not fill"),
        (altered(blocks__0__norm1__weight=None), "no transformer blocks, or not the first one"),
        ({k: v for k, v in released_tensors("vits14").items() if "blocks" not in k}, "no transformer blocks"),
        (altered(blocks__5__norm1__weight=None), "holds 11 of 12 transformer blocks; copy it again"),
        (altered(blocks__999999999__norm1__weight=torch.zeros(384)), "holds 13 of 1000000000 transformer blocks"),
    ],
)
def test_tensors_that_do_not_tell_an_architecture_are_refused(state, reason):
    with pytest.raises(WeightsError, match="w.pth.*") as refusal:
        BackboneConfig.from_state_dict(state, source="w.pth")
    assert reason in str(refusal.value)


def test_keys_that_merely_end_alike_are_no_blocks():
    state = altered(norm1__weight=torch.zeros(384), encoder__layers__x__norm1__weight=torch.zeros(384))
    assert BackboneConfig.from_state_dict(state).depth == 12
