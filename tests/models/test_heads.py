from functools import cache

import pytest
import torch
from torch import Tensor, nn

from dinov2.checkpoints.heads import head_from_state
from dinov2.errors import ConfigError, WeightsError
from dinov2.models.heads import LinearHead, classifier_input, linear_logits
from dinov2.models.vision_transformer import vit_small
from tests.golden import recipe
from tests.golden.loading import assert_stats, golden_json, golden_tensors


class Classifier(nn.Module):
    """The two children under which the release keeps its classifiers."""

    def __init__(self, registers: int, layers: int) -> None:
        super().__init__()
        rule = {"interpolate_offset": 0.0, "interpolate_antialias": True} if registers else {}
        self.backbone = vit_small(14, registers, img_size=518, init_values=1.0, block_chunks=0, **rule)
        self.linear_head = LinearHead(384, layers=layers)


@cache
def classifier(registers: int, layers: int) -> Classifier:
    model = Classifier(registers, layers).eval()
    recipe.fill(model)
    return model


def logits_of(registers: int, layers: int, size: str) -> Tensor:
    model = classifier(registers, layers)
    height, width = map(int, size.split("x"))
    images = recipe.images(2 if height == width else 1, height, width)
    with torch.no_grad():
        return linear_logits(model.backbone, model.linear_head, images)


@pytest.mark.parametrize("size", ["224x224", "98x154"])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("registers", [0, 4])
def test_logits_are_those_of_the_released_classifiers(registers: int, layers: int, size: str) -> None:
    golden = golden_tensors(f"hub_dinov2_vits14{'_reg' if registers else ''}_lc")
    logits = logits_of(registers, layers, size)
    expected = golden[f"layers{layers}.{size}.logits.slice"]
    torch.testing.assert_close(logits[:, ::8], expected, rtol=1e-4, atol=1e-4)
    assert_stats(logits, golden[f"layers{layers}.{size}.logits.stats"])
    assert torch.equal(logits.topk(5).indices, golden[f"layers{layers}.{size}.top5"].long())


@pytest.mark.parametrize("layers", [1, 4])
def test_the_keys_and_shapes_are_those_of_the_head_files(layers: int) -> None:
    released = golden_json("hub_lc.keys")["dinov2_vits14_lc"]["layers"][str(layers)]["head"]
    ours = LinearHead(384, layers=layers).state_dict()
    assert {f"linear_head.{key}": list(value.shape) for key, value in ours.items()} == released


def test_the_input_is_the_class_tokens_in_order_and_then_the_mean_of_the_patches() -> None:
    cls_tokens = [torch.full((2, 3), float(i)) for i in range(4)]
    patches = torch.arange(12.0).reshape(2, 2, 3)
    x = classifier_input(cls_tokens, patches)
    assert x.shape == (2, 15)
    assert x[1].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [7.5, 8.5, 9.5]
    assert torch.equal(classifier_input(cls_tokens, patches.unflatten(1, (1, 2))), x)  # a grid of patches


def head_state(width: int, *, classes: int = 10, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}weight": torch.randn(classes, width), f"{prefix}bias": torch.randn(classes)}


@pytest.mark.parametrize("prefix", ["", "linear_head.", "classifier."])
@pytest.mark.parametrize(("width", "layers"), [(256, 1), (640, 4)])
def test_the_number_of_layers_follows_from_the_width(width: int, layers: int, prefix: str) -> None:
    state = head_state(width, prefix=prefix)
    head = head_from_state({key: value.half() for key, value in state.items()}, embed_dim=128)
    assert (head.layers, head.out_features, head.training, head.weight.dtype) == (layers, 10, False, torch.float32)
    torch.testing.assert_close(head.weight, state[f"{prefix}weight"].half().float())
    assert torch.equal(head.bias, state[f"{prefix}bias"].half().float())


def test_reading_a_head_leaves_the_random_numbers_alone() -> None:
    state = head_state(256)
    before = torch.get_rng_state()
    head_from_state(state, embed_dim=128)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("width", "embed_dim", "layers", "message"),
    [
        (768, 768, None, r"reads 768 features, but .* width 768 gives 1536 .* 1-layer head of a ViT-S, which is 384"),
        (1920, 768, None, "4-layer head of a ViT-S"),
        (7680, 1024, None, "4-layer head of a ViT-g"),
        (1920, 384, 1, "gives 768 for a 1-layer head; it is a 4-layer head: ask for layers=4, or give the 1-layer"),
        (768, 384, 4, "gives 1920 for a 4-layer head; it is a 1-layer head: ask for layers=1, or give the 4-layer"),
        (333, 384, None, "768 for a 1-layer head or 1920 for a 4-layer head; it was trained on other features"),
    ],
)
def test_a_head_of_something_else_is_refused_with_the_likely_cause(
    width: int, embed_dim: int, layers: int | None, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        head_from_state(head_state(width), embed_dim=embed_dim, layers=layers, source="head.pth")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"blocks.0.norm1.weight": torch.zeros(3)}, "looks like a backbone, whose place is --model"),
        ({"state_dict": {}, "meta": {}}, "depth or segmentation head"),
        ({"decode_head.conv_seg.weight": torch.zeros(3)}, "depth or segmentation head"),
        ({"weight": torch.zeros(3, 2)}, "it holds weight;"),
        ({}, "it holds nothing"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}, r"\[3, 2\] and bias \[4\] of head.pth are no linear"),
        ({"weight": torch.zeros(3), "bias": torch.zeros(3)}, "are no linear head"),
    ],
)
def test_a_file_that_is_no_linear_head_is_refused(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        head_from_state(state, embed_dim=384, source="head.pth")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_a_head_of_other_numbers_is_refused(dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in head_state(768).items()}
    with pytest.raises(
        WeightsError, match=f"weight of head.pth is {str(dtype).removeprefix('torch.')}, and weights are"
    ):
        head_from_state(state, embed_dim=384, source="head.pth")


def test_only_one_or_four_layers_were_released() -> None:
    with pytest.raises(ConfigError, match="1 or 4 layers, not 2"):
        LinearHead(384, layers=2)
