"""The fast kernels of linear layers give what PyTorch's own give, and stay away where they may not be used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from dinov2.layers.attention import Attention, attend
from dinov2.layers.layer_scale import LayerScale, add_scaled
from dinov2.layers.linear import is_plain, linear, linear_gelu, project
from dinov2.layers.mlp import Mlp
from dinov2.layers.swiglu_ffn import SwiGLUFFN


class Doubled(nn.Linear):
    """An adapter, as it is put in the place of a layer."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8), (2, 0, 8), (8,)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float64, 1e-12)])
def test_products_without_gradients_equal_torch_s(shape, has_bias, dtype, tolerance):
    x, weight = torch.randn(shape).to(dtype), torch.randn(16, 8).to(dtype)
    bias = torch.randn(16).to(dtype) if has_bias else None
    with torch.no_grad():
        assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=tolerance, rtol=tolerance)
        exact = F.gelu(F.linear(x, weight, bias))
        assert_close(linear_gelu(x, weight, bias), exact, atol=tolerance, rtol=tolerance)


def test_strided_inputs_are_taken():
    x, weight = torch.randn(8, 6, 4).transpose(0, 2)[:, ::2], torch.randn(16, 8)
    with torch.no_grad():
        assert_close(linear(x, weight, None), F.linear(x, weight, None), atol=1e-5, rtol=1e-5)


def test_with_gradients_torch_s_own_product_is_taken():
    x, weight, bias = torch.randn(3, 8), torch.randn(16, 8, requires_grad=True), torch.randn(16)
    ours = linear(x, weight, bias)
    assert_close(ours, F.linear(x, weight, bias), atol=0, rtol=0)
    ours.sum().backward()
    assert weight.grad is not None


def test_autocast_has_its_way():
    x, weight = torch.randn(3, 8), torch.randn(16, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16


def test_a_layer_that_is_hooked_wrapped_or_patched_is_called():
    x = torch.randn(2, 4)
    plain, hooked, patched = (nn.Linear(4, 4) for _ in range(3))
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    patched.forward = lambda x: x
    assert is_plain(plain) and not any(map(is_plain, (hooked, patched, Doubled(4, 4), nn.Identity())))
    with torch.no_grad():
        assert_close(project(hooked, x), F.linear(x, hooked.weight, hooked.bias) + 1)
        assert project(patched, x) is x


@pytest.mark.parametrize(
    "build, names",
    [
        (lambda: Attention(8, num_heads=2, qkv_bias=True), ["qkv", "proj"]),
        (lambda: Mlp(8, 16), ["fc1", "fc2"]),
        (lambda: SwiGLUFFN(8, 16), ["w12", "w3"]),
    ],
)
def test_adapters_in_the_place_of_a_layer_take_effect(build, names):
    x = torch.randn(2, 3, 8)
    for name in names:
        module = build()
        with torch.no_grad():
            before = module(x)
            layer = getattr(module, name)
            adapter = Doubled(layer.in_features, layer.out_features)
            adapter.load_state_dict(layer.state_dict())
            setattr(module, name, adapter)
            after = module(x)
        assert not torch.allclose(before, after), name


def test_hooks_on_the_activation_and_its_tanh_form_take_effect():
    x, module = torch.randn(2, 3, 8), Mlp(8, 16)
    with torch.no_grad():
        handle = module.act.register_forward_hook(lambda *_: torch.zeros(2, 3, 16))
        assert_close(module(x), module.fc2.bias.expand(2, 3, 8))
        handle.remove()
        tanh = Mlp(8, 16, act_layer=lambda: nn.GELU(approximate="tanh"))
        tanh.load_state_dict(module.state_dict())
        exact = tanh.fc2(F.gelu(tanh.fc1(x), approximate="tanh"))
        assert_close(tanh(x), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("branch_type", [torch.float32, torch.bfloat16])
def test_scaled_residuals_equal_multiply_and_add(branch_type):
    scale = LayerScale(8, init_values=0.3)
    tokens, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8).to(branch_type)
    exact = tokens + branch.float() * scale.gamma
    assert_close(add_scaled(tokens, branch, scale), exact, atol=0, rtol=0)
    with torch.no_grad():
        assert_close(add_scaled(tokens, branch, scale), exact, atol=1e-6, rtol=1e-6)
        assert_close(add_scaled(tokens, branch, nn.Identity()), tokens + branch)


@pytest.mark.parametrize("length", [3, 80])
def test_attention_in_bfloat16_equals_float32_up_to_rounding(length):
    attention, x = Attention(128, num_heads=2), torch.randn(2, length, 128)
    with torch.no_grad():
        exact = attention(x)
        ours = attention.bfloat16()(x.bfloat16()).float()
    assert_close(ours, exact, atol=0.02, rtol=0.05)


def test_attention_over_a_few_images_at_once_equals_that_over_all(monkeypatch):
    qkv = torch.randn(5, 20, 3 * 128).bfloat16()
    together = attend(qkv, num_heads=2)
    monkeypatch.setattr("dinov2.layers.attention._SCORES", 2 * 2 * 20 * 20)
    assert_close(attend(qkv, num_heads=2), together, atol=0, rtol=0)
    assert attend(qkv[:0], num_heads=2).shape == (0, 20, 128)


def test_hooks_on_gradients_are_called():
    layer, seen = torch.nn.Linear(4, 4), []
    layer.register_full_backward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    project(layer, torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after"]
