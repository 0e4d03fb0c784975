"""Frozen copies in low precision, and the fast kernels of the float32 model, against the plain computation."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dinov2.layers.kernels import onednn_is_faster
from dinov2.models.inference import cast_blocks, optimize_for_inference
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill, images

REGISTERS = {"num_register_tokens": 4, "interpolate_offset": 0.0, "interpolate_antialias": True}
KINDS = {"plain": {}, "registers": REGISTERS, "gated": {"ffn_layer": "swiglufused"}, "unscaled": {"init_values": None}}
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "inference.py"


def tiny(**options) -> DinoVisionTransformer:
    settings = {"img_size": 98, "patch_size": 14, "embed_dim": 128, "depth": 3, "num_heads": 2, "block_chunks": 0}
    return fill(DinoVisionTransformer(**{**settings, "init_values": 1.0, **options})).eval()


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [cast_blocks, optimize_for_inference])
def test_a_copy_in_bfloat16_gives_float32_features_close_to_the_model_s(kind, make):
    model, x = tiny(**KINDS[kind]), images(2, 70, 84)
    with torch.inference_mode():
        exact, ours = model.forward_features(x), make(model, torch.bfloat16).forward_features(x)
        for key in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
            assert ours[key].dtype == torch.float32
            assert 1e-5 < error(ours[key], exact[key]) < 0.02, key


def test_a_copy_is_as_exact_as_autocast():
    # More exact where the processor multiplies bfloat16; elsewhere both round in their own places, and a model as small
    # as this one shows either a little ahead.
    model, x = tiny(depth=6), images(2, 98, 98)
    with torch.inference_mode():
        exact, ours = model(x), cast_blocks(model, torch.bfloat16)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(ours, exact) < 1.25 * error(model(x), exact)


def test_a_copy_leaves_the_model_alone_and_is_not_reached_by_its_changes():
    model, x = tiny(), images(1, 42, 56)
    before = copy.deepcopy(model.state_dict())
    frozen = optimize_for_inference(model)
    with torch.inference_mode():
        features = frozen(x)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert_close(model.state_dict(), before, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with torch.inference_mode():
        assert_close(frozen(x), features, atol=0, rtol=0)


def test_float32_needs_no_copy():
    model = tiny()
    assert optimize_for_inference(model, None) is model and optimize_for_inference(model, torch.float32) is model


def test_a_copy_takes_lists_masks_and_gives_layers():
    model, sizes = tiny(num_register_tokens=2), [(2, 56, 70), (1, 98, 42)]
    frozen, batches = optimize_for_inference(model), [images(*size) for size in sizes]
    masks = [torch.arange(20).expand(2, 20) % 3 == 0, None]
    with torch.inference_mode():
        for packed, batch, mask in zip(frozen.forward_features(batches, masks), batches, masks, strict=True):
            alone = frozen.forward_features(batch, mask)
            assert error(packed["x_norm_patchtokens"], alone["x_norm_patchtokens"]) < 0.01
        for ours, exact in zip(*(m.get_intermediate_layers(batches[0], n=2) for m in (frozen, model)), strict=True):
            assert error(ours, exact) < 0.02


def test_without_gradients_features_equal_those_with_gradients():
    model, x = tiny(num_register_tokens=2), images(3, 70, 98)
    with_gradients = model.forward_features(x)["x_prenorm"]
    assert with_gradients.requires_grad
    with torch.no_grad():
        assert_close(model.forward_features(x)["x_prenorm"], with_gradients.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["load_state_dict", "data", "step", "inference mode"])
def test_a_changed_position_embedding_is_seen_at_once(change):
    model, x = tiny(), images(1, 42, 56)
    other = tiny()
    with torch.no_grad():
        other.pos_embed.mul_(3)
    with torch.inference_mode():
        before = model(x)
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "data":
        model.pos_embed.data.copy_(other.pos_embed.data)
    elif change == "step":
        model.pos_embed.grad = -2 * model.pos_embed.detach()
        torch.optim.SGD([model.pos_embed], lr=1.0).step()
    else:
        with torch.inference_mode():
            model.pos_embed.mul_(3)
    with torch.inference_mode():
        assert_close(model(x), other(x))
        assert error(model(x), before) > 1e-3


def test_inference_before_training_does_not_stand_in_its_way():
    model, x = tiny(), images(1, 42, 56)
    with torch.inference_mode():
        model(x)
    model(x).square().sum().backward()
    assert model.pos_embed.grad is not None and model.pos_embed.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_copy_is_one_graph_and_runs_at_a_second_size(dtype):
    model = tiny(depth=1)
    model = model if dtype == torch.float32 else cast_blocks(model, dtype)
    graph = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        for size in [(2, 56, 70), (3, 98, 42)]:
            assert error(graph(images(*size)), model(images(*size))) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.slow
def test_the_benchmark_runs():
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    result = subprocess.run(
        [sys.executable, BENCHMARK, "--quick", "--threads", "1"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "x transformers" in result.stdout and "x timm" in result.stdout and "mixed" in result.stdout


@pytest.mark.skipif(not onednn_is_faster(), reason="needs an AMD processor with AVX-512")
def test_prepared_weights_are_packed_where_that_pays():
    assert optimize_for_inference(tiny()).block_list[0].attn.qkv.weight.is_mkldnn
