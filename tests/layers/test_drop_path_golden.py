"""Stochastic depth draws the same subsets and gives the same figures as the public release."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dinov2.layers import NestedTensorBlock
from dinov2.layers.drop_path import subset_size
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.loading import assert_stats, golden_json, golden_tensors
from tests.golden.recipe import fill, values

CASES = golden_json("drop_path")
LISTS = golden_json("drop_path_list")


def golden_block(rate: float, layerscale: float | None = 1.0) -> NestedTensorBlock:
    return fill(
        NestedTensorBlock(
            64, 4, qkv_bias=True, init_values=layerscale, drop_path=rate, norm_layer=partial(nn.LayerNorm, eps=1e-6)
        )
    ).train()


def golden_input(name: str = "drop_path.input", shape: tuple[int, ...] = (8, 10, 64)) -> Tensor:
    return torch.from_numpy(values(name, shape)) * (shape[1] * shape[2]) ** 0.5


@pytest.mark.parametrize("case", [name for name in CASES if "seed" in name])
def test_a_block_drops_paths_as_the_release_does(case):
    golden, facts = golden_tensors("drop_path"), CASES[case]
    block, x = golden_block(facts["drop_path"]), golden_input().requires_grad_()
    torch.manual_seed(facts["seed"])
    output = block(x)
    assert_close(output[:, ::3, ::4], golden[f"{case}.output.slice"], atol=2e-5, rtol=0)
    assert_stats(output, golden[f"{case}.output.stats"])
    assert_close(output.flatten(1).norm(dim=1), torch.tensor(facts["output_l2_per_sample"]), rtol=1e-5, atol=0)
    (output * torch.from_numpy(values("drop_path.direction", (8, 10, 64)))).sum().backward()
    expected = golden[f"{case}.grad_input.slice"]
    assert (x.grad[:, ::3, ::4] - expected).norm() <= 1e-4 * expected.norm()
    for name, parameter in block.named_parameters():
        norm = parameter.grad.norm().item()
        assert norm == pytest.approx(facts["grad_l2"][name], rel=1e-4), name


def test_a_block_in_eval_mode_drops_nothing():
    golden = golden_tensors("drop_path")
    with torch.no_grad():
        output = golden_block(0.4).eval()(golden_input())
    assert_close(output[:, ::3, ::4], golden["eval.output.slice"], atol=2e-5, rtol=0)
    assert_stats(output, golden["eval.output.stats"])


@pytest.mark.parametrize("case", list(LISTS))
def test_a_list_of_crops_drops_one_subset_each(case):
    golden, facts = golden_tensors("drop_path_list"), LISTS[case]
    block = golden_block(facts["drop_path"], facts["layerscale"])
    torch.manual_seed(facts["seed"])
    outputs = block([golden_input(), golden_input("drop_path.input2", (6, 5, 64))])
    for i, output in enumerate(outputs):
        assert_close(output[:, ::3, ::4], golden[f"{case}.output{i}.slice"], atol=2e-5, rtol=0)
        assert_stats(output, golden[f"{case}.output{i}.stats"])


def test_subset_sizes_equal_the_release():
    for rate, by_batch in CASES["subset_sizes"].items():
        for batch, kept in by_batch.items():
            assert subset_size(int(batch), float(rate)) == kept


def test_rates_by_depth_equal_the_release():
    for kind, uniform in (("linear", False), ("uniform", True)):
        expected = CASES["rates"][kind]
        model = DinoVisionTransformer(
            img_size=28, patch_size=14, embed_dim=64, depth=len(expected), num_heads=1,
            drop_path_rate=expected[-1], drop_path_uniform=uniform, block_chunks=0,
        )  # fmt: skip
        assert [block.sample_drop_ratio for block in model.block_list] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_per_sample_drop_path_keeps_the_classic_form_at_high_rates():
    block = golden_block(0.6)
    block.drop_path_per_sample = True
    x = golden_input()
    torch.manual_seed(3)
    single = block(x)
    torch.manual_seed(3)
    (packed,) = block([x])
    assert_close(single, packed)
    torch.manual_seed(3)
    kept = torch.empty(8, 1, 1).bernoulli_(0.4)
    untouched = (single == x).flatten(1).all(dim=1)
    assert untouched.any() and not untouched[kept.flatten() == 1].any()
