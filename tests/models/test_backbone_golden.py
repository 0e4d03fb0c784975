"""The backbones give the figures of the public release, computed once and stored under tests/golden."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small
from tests.golden.loading import assert_stats, golden_json, golden_tensors
from tests.golden.recipe import fill, images

TINY = golden_json("backbone_tiny")
VARIANTS = list(TINY["constructor"])
HUB = {"img_size": 518, "patch_size": 14, "init_values": 1.0, "block_chunks": 0}
REGISTERS = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}


def tiny(variant: str) -> DinoVisionTransformer:
    return fill(DinoVisionTransformer(**TINY["constructor"][variant])).eval()


def tiny_input(variant: str, name: str) -> tuple[Tensor, Tensor | None]:
    patch = TINY["constructor"][variant]["patch_size"]
    native = 7 if patch == 14 else 6
    count, rows, columns = {
        "native": (2, native, native),
        "wide": (2, 6, 8),
        "tall": (2, 8, 6),
        "large": (1, 11, 11),
        "small": (2, 3, 3),
    }[name.removesuffix("_masked")]
    return images(count, rows * patch, columns * patch), mask_formula(
        count, rows * columns
    ) if "_masked" in name else None


def mask_formula(count: int, patches: int) -> Tensor:
    return (7 * torch.arange(patches)[None] + 3 * torch.arange(count)[:, None]) % 5 < 2


def check_tokens(golden: dict[str, Tensor], prefix: str, tokens: Tensor, atol: float, step: tuple[int, int]) -> None:
    """Compares with whichever of the whole tensor, its slice and its stats are stored."""
    found = False
    if prefix in golden:
        assert_close(tokens, golden[prefix], atol=atol, rtol=0)
        found = True
    if f"{prefix}.slice" in golden:
        slicer = (slice(None), *(slice(None, None, s) for s in step))
        assert_close(tokens[slicer], golden[f"{prefix}.slice"], atol=atol, rtol=0)
        found = True
    if f"{prefix}.stats" in golden:
        assert_stats(tokens, golden[f"{prefix}.stats"])
        found = True
    assert found, f"nothing is stored for {prefix}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["native", "wide", "tall", "large", "small", "native_masked", "wide_masked"])
def test_tokens_equal_the_release(variant, name):
    golden, model = golden_tensors(f"backbone_tiny_{variant}"), tiny(variant)
    x, masks = tiny_input(variant, name)
    with torch.no_grad():
        features = model.forward_features(x, masks)
        assert_close(features["x_norm_clstoken"], golden[f"{name}.x_norm_clstoken"], atol=2e-5, rtol=0)
        if model.num_register_tokens:
            assert_close(features["x_norm_regtokens"], golden[f"{name}.x_norm_regtokens"], atol=2e-5, rtol=0)
        check_tokens(golden, f"{name}.x_norm_patchtokens", features["x_norm_patchtokens"], 2e-5, (5, 4))
        check_tokens(golden, f"{name}.x_prenorm", features["x_prenorm"], 2e-5, (5, 4))
        if masks is None:
            assert_close(model(x), features["x_norm_clstoken"], atol=0, rtol=0)
            position = model.interpolate_pos_encoding(x, *x.shape[-2:])
            check_tokens(golden, f"{name}.pos_embed", position, 2e-5, (5, 4))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["native", "wide"])
def test_intermediate_layers_equal_the_release(variant, name):
    golden, model = golden_tensors(f"backbone_tiny_{variant}"), tiny(variant)
    x, _ = tiny_input(variant, name)
    with torch.no_grad():
        (patches,) = model.get_intermediate_layers(x, n=1)
        check_tokens(golden, f"{name}.layers_a.0", patches, 2e-5, (5, 4))
        for i, (maps, cls) in enumerate(model.get_intermediate_layers(x, n=4, reshape=True, return_class_token=True)):
            check_tokens(golden, f"{name}.layers_b.{i}.map", maps, 2e-5, (8, 2, 2))
            assert_close(cls, golden[f"{name}.layers_b.{i}.cls"], atol=2e-5, rtol=0)
        for i, maps in enumerate(model.get_intermediate_layers(x, n=[2, 0], reshape=True, norm=False)):
            check_tokens(golden, f"{name}.layers_c.{i}.map", maps, 2e-5, (8, 2, 2))
        for i, (patches, cls) in enumerate(
            model.get_intermediate_layers(x, n=(1, 3), return_class_token=True, norm=False)
        ):
            check_tokens(golden, f"{name}.layers_d.{i}", patches, 2e-5, (5, 4))
            assert_close(cls, golden[f"{name}.layers_d.{i}.cls"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["native", "wide"])
def test_gradients_equal_the_release(variant, name):
    golden, model = golden_tensors(f"backbone_tiny_{variant}"), tiny(variant).train()
    x, masks = tiny_input(variant, f"{name}_masked")
    x.requires_grad_()
    features = model.forward_features(x, masks)
    scalar = (features["x_norm_clstoken"] ** 2).sum() + features["x_norm_patchtokens"].mean()
    scalar.backward()
    figures = TINY["gradients"][variant][name]
    assert scalar.item() == pytest.approx(figures["scalar"], rel=1e-5)
    assert x.grad.norm().item() == pytest.approx(figures["input"], rel=1e-4)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == figures["l2"].keys()
    for key, norm in figures["l2"].items():
        gradient = parameters[key].grad
        if key.endswith("qkv.bias"):
            width = model.embed_dim
            gradient = gradient.clone()
            gradient[width : 2 * width] = 0  # the key third is rounding noise
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), key
    stored = {
        key.removeprefix(f"grad.{name}."): value for key, value in golden.items() if key.startswith(f"grad.{name}.")
    }
    assert stored
    for key, expected in stored.items():
        gradient = x.grad if key.startswith("input") else parameters[key.removesuffix(".slice")].grad
        if key == "input.slice":
            gradient = gradient[:, :, ::9, ::9]
        elif key.endswith(".slice"):
            gradient = gradient[:, ::5, ::4]
        if key.endswith("qkv.bias"):
            width = model.embed_dim
            gradient, expected = (torch.cat([t[:width], t[2 * width :]]) for t in (gradient, expected))
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-7, key


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
@pytest.mark.parametrize("size", ["224x224", "224x224_masked", "98x154", "518x518"])
def test_vit_small_equals_the_release(registers, size):
    golden = golden_tensors("backbone_vits14_reg" if registers else "backbone_vits14")
    model = fill(vit_small(**HUB, **(REGISTERS if registers else {}))).eval()
    height, width = (int(side) for side in size.removesuffix("_masked").split("x"))
    x = images(1 if height == 518 else 2, height, width)
    masks = golden[f"{size}.masks"].bool() if "_masked" in size else None
    with torch.no_grad():
        features = model.forward_features(x, masks)
        assert_close(features["x_norm_clstoken"], golden[f"{size}.x_norm_clstoken"], atol=1e-4, rtol=0)
        for key in ("x_norm_patchtokens",) if masks is not None else ("x_norm_patchtokens", "x_prenorm"):
            step = max(1, features[key].shape[1] // 12)
            check_tokens(golden, f"{size}.{key}", features[key], 1e-4, (step, 16))
        if registers and masks is None:
            assert_close(features["x_norm_regtokens"], golden[f"{size}.x_norm_regtokens"], atol=1e-4, rtol=0)
        if masks is None:
            layers = model.get_intermediate_layers(x, n=[2, 5, 8, 11], reshape=True, return_class_token=True)
            for index, (maps, cls) in zip([2, 5, 8, 11], layers, strict=True):
                h, w = maps.shape[-2:]
                step = (32, max(1, h // 4), max(1, w // 4))
                check_tokens(golden, f"{size}.layer{index}.map", maps, 1e-4, step)
                assert_close(cls, golden[f"{size}.layer{index}.cls"], atol=1e-4, rtol=0)
            position = model.interpolate_pos_encoding(x, height, width)
            check_tokens(golden, f"{size}.pos_embed", position, 1e-4, (max(1, position.shape[1] // 12), 16))


@pytest.mark.parametrize("size", [(224, 224), (98, 154)])
def test_vit_base_equals_the_release(size):
    golden, name = golden_tensors("hub_dinov2_vitb14"), f"{size[0]}x{size[1]}"
    model = fill(vit_base(**HUB)).eval()
    x = images(1, *size)
    with torch.no_grad():
        assert_close(model(x), golden[f"{name}.output"], atol=1e-4, rtol=0)
        patches = model.forward_features(x)["x_norm_patchtokens"]
        check_tokens(golden, f"{name}.x_norm_patchtokens", patches, 1e-4, (max(1, patches.shape[1] // 12), 16))
        for i, (patches, cls) in enumerate(model.get_intermediate_layers(x, n=4, return_class_token=True)):
            check_tokens(golden, f"{name}.last4.{i}", patches, 1e-4, (max(1, patches.shape[1] // 12), 16))
            assert_close(cls, golden[f"{name}.last4.{i}.cls"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["vits14", "vitb14", "vitl14", "vitg14"])
@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_state_dict_keys_shapes_and_order_equal_the_release(name, registers):
    build = {"vits14": vit_small, "vitb14": vit_base, "vitl14": vit_large, "vitg14": vit_giant2}[name]
    options = {"ffn_layer": "swiglufused"} if name == "vitg14" else {}
    with torch.device("meta"):
        model = build(**HUB, **options, **(REGISTERS if registers else {}))
    expected = golden_json(f"backbone_{name}{'_reg' if registers else ''}.keys")
    expected = expected.get("keys", expected) if isinstance(expected, dict) else dict(expected)
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == [
        (key, list(shape)) for key, shape in expected.items()
    ]
