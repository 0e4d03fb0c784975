"""The fast kernels give what the layers themselves give, and stay away wherever somebody could tell the difference."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from dinov2.layers import kernels
from dinov2.layers.attention import Attention
from dinov2.layers.kernels import (
    add_scaled,
    fast_linear,
    fuses_mlp,
    fuses_swiglu,
    is_untouched,
    patch_products,
    project,
)
from dinov2.layers.mlp import Mlp
from dinov2.layers.swiglu_ffn import SwiGLUFFN


class Doubled(nn.Linear):
    """An adapter, as it is put in the place of a layer."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN is the faster one it comes before the buffer, so that it is left out here."""
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: False)


@pytest.fixture
def buffers(without_onednn: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the buffers that were asked for."""
    sizes: list[int] = []
    whole = kernels._buffer

    def counted(n_numbers: int) -> Tensor:
        sizes.append(n_numbers)
        return whole(n_numbers)

    monkeypatch.setattr(kernels, "_buffer", counted)
    return sizes


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Mlp(24, 96), Mlp(24, 96, 8, bias=False), SwiGLUFFN(24, 40), SwiGLUFFN(24, 40, bias=False)]


NETWORKS = pytest.mark.parametrize("network", networks(), ids=["mlp", "mlp-no-bias", "swiglu", "swiglu-no-bias"])


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8), (2, 0, 8), (8,)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float64, 1e-12)])
def test_products_without_gradients_equal_torch_s(shape, has_bias, dtype, tolerance):
    x, layer = torch.randn(shape).to(dtype), nn.Linear(8, 16, bias=has_bias).to(dtype)
    expected = F.linear(x, layer.weight, layer.bias).detach()
    with torch.no_grad():
        assert_close(fast_linear(x, layer.weight, layer.bias), expected, atol=tolerance, rtol=tolerance)
        assert_close(project(layer, x), expected, atol=tolerance, rtol=tolerance)


def test_strided_inputs_are_taken():
    x, weight = torch.randn(8, 6, 4).transpose(0, 2)[:, ::2], torch.randn(16, 8)
    with torch.no_grad():
        assert_close(fast_linear(x, weight, None), F.linear(x, weight, None), atol=1e-5, rtol=1e-5)


def test_with_gradients_torch_s_own_product_is_taken():
    x, weight, bias = torch.randn(3, 8), torch.randn(16, 8, requires_grad=True), torch.randn(16)
    ours = fast_linear(x, weight, bias)
    assert_close(ours, F.linear(x, weight, bias), atol=0, rtol=0)
    ours.sum().backward()
    assert weight.grad is not None


def test_autocast_has_its_way():
    x, weight = torch.randn(3, 8), torch.randn(16, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast_linear(x, weight, None).dtype == torch.bfloat16
        assert Mlp(8, 16)(x).dtype == torch.bfloat16


def test_a_layer_that_is_hooked_wrapped_patched_or_compiled_is_touched(monkeypatch):
    plain, hooked, patched, compiled = (nn.Linear(4, 4) for _ in range(4))
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    patched.forward = lambda x: x
    compiled.compile()
    assert is_untouched(plain, nn.Linear)
    assert not any(is_untouched(layer, nn.Linear) for layer in (hooked, patched, compiled, Doubled(4, 4)))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_untouched(plain, nn.Linear)
    handle.remove()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not is_untouched(plain, nn.Linear)


def test_a_forward_patched_on_the_class_takes_effect(monkeypatch):
    x, network = torch.randn(2, 8), Mlp(8, 16)
    with torch.no_grad():
        before = network(x)
        original = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x))
        assert not torch.allclose(network(x), before)


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


def test_dropout_of_a_network_acts_in_training_without_gradients_too():
    x, network = torch.ones(4, 8), Mlp(8, 16, drop=0.9)
    with torch.no_grad():
        assert (network.train()(x) == 0).any()
        assert not (network.eval()(x) == 0).any()


def test_hooks_on_gradients_are_called():
    layer, seen = nn.Linear(4, 4), []
    layer.register_full_backward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    project(layer, torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("branch_type", [torch.float32, torch.bfloat16])
def test_scaled_residuals_equal_multiply_and_add(branch_type):
    factors = torch.rand(8)
    tokens, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8).to(branch_type)
    exact = tokens + branch.float() * factors
    assert_close(add_scaled(tokens, branch, factors), exact, atol=0, rtol=0)
    with torch.no_grad():
        assert_close(add_scaled(tokens, branch, factors), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [3, 80])
def test_attention_in_bfloat16_equals_float32_up_to_rounding(length):
    attention, x = Attention(128, num_heads=2), torch.randn(2, length, 128)
    with torch.no_grad():
        exact = attention(x)
        ours = attention.bfloat16()(x.bfloat16()).float()
    assert_close(ours, exact, atol=0.02, rtol=0.05)


def test_explicit_attention_over_a_few_images_at_once_equals_that_over_all(monkeypatch):
    query, key, value = torch.randn(3, 5, 2, 20, 64).bfloat16()
    together = kernels.explicit_attention(query, key, value)
    assert_close(together, F.scaled_dot_product_attention(query, key, value), atol=0.02, rtol=0.05)
    monkeypatch.setattr(kernels, "_MAX_SCORES", 2 * 2 * 20 * 20)
    assert_close(kernels.explicit_attention(query, key, value), together, atol=0, rtol=0)
    assert kernels.explicit_attention(query[:0], key[:0], value[:0]).shape == (0, 2, 20, 64)


@pytest.mark.parametrize("options", [{}, {"stride": 7}, {"padding": 7}, {"dilation": 2}, {"bias": False}])
def test_patch_products_equal_the_convolution(options):
    convolution = nn.Conv2d(3, 8, 14, **{"stride": 14, **options})
    images = torch.randn(2, 3, 56, 84)
    assert_close(patch_products(convolution, images), convolution(images), atol=1e-5, rtol=1e-5)
    grouped = nn.Conv2d(4, 8, 14, stride=14, groups=2)
    images = torch.randn(2, 4, 60, 30)
    assert_close(patch_products(grouped, images), grouped(images), atol=1e-5, rtol=1e-5)


@NETWORKS
@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (1, 1, 24)])
def test_memory_used_again_gives_the_values_with_gradients(network, shape, buffers):
    x = torch.randn(shape)
    expected = network(x).detach()
    assert not buffers
    with torch.no_grad():
        assert_close(network(x), expected, rtol=0, atol=1e-6)
        assert_close(network(x.mT.contiguous().mT), expected, rtol=0, atol=1e-6)  # columns lie together
    assert len(buffers) == 2


@NETWORKS
def test_many_rows_go_through_a_small_buffer_in_turns(network, buffers, monkeypatch):
    x = torch.randn(50, 24)
    expected = network(x).detach()
    monkeypatch.setattr(kernels, "_BUFFER_SIZE", 7 * 96)
    with torch.no_grad():
        assert_close(network(x), expected, rtol=0, atol=1e-6)
    assert len(buffers) >= 7
    assert max(buffers) <= 7 * 96


def test_results_do_not_share_the_buffer():
    network = networks()[0]
    x, y = torch.randn(2, 4, 24)
    with torch.no_grad():
        first = network(x)
        copy = first.clone()
        network(y)
    assert torch.equal(first, copy)


def test_threads_have_buffers_of_their_own():
    network = networks()[0].requires_grad_(False)
    inputs = [torch.randn(64, 24) for _ in range(8)]
    with torch.no_grad():
        expected = [network(x) for x in inputs]

    def repeat(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [network(x) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for result, right in zip(pool.map(repeat, inputs), expected, strict=True):
            assert all(torch.equal(one, right) for one in result)


def test_inference_mode_and_no_grad_share_the_buffer():
    network = networks()[0]
    x = torch.randn(1_000, 24)
    with torch.inference_mode():
        first = network(x)
    with torch.no_grad():
        assert torch.equal(network(x), first)


def test_defaults_of_dtype_and_device_do_not_matter(monkeypatch):
    network = networks()[0]
    x = torch.randn(3, 24)
    monkeypatch.setattr(kernels, "_threads", threading.local())  # a buffer that is yet to be made
    with torch.no_grad(), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            result = network(x)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_close(result, network(x).detach(), rtol=0, atol=1e-6)


def test_an_activation_of_ones_own_is_never_given_the_buffer(buffers):
    with torch.no_grad():
        Mlp(24, 96, act_layer=nn.ReLU)(torch.randn(3, 24))
    assert not buffers


def test_works_under_vmap(buffers):
    network = networks()[0]
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        expected = network(x)
        buffers.clear()
        assert_close(torch.vmap(network)(x), expected, rtol=0, atol=1e-6)
    assert not buffers


def test_layers_are_fused_only_where_nothing_is_lost(without_onednn, monkeypatch):
    def fuses(x: Tensor, first: nn.Module, last: nn.Module) -> bool:
        mlp, gated = fuses_mlp(x, first, nn.GELU(), last), fuses_swiglu(x, first, last)
        assert mlp == gated
        return mlp

    x, first, last = torch.randn(3, 24), nn.Linear(24, 96), nn.Linear(96, 24)
    assert not fuses(x, first, last)  # gradients are wanted
    with torch.no_grad():
        assert fuses(x, first, last)
        assert not fuses(x.bfloat16(), nn.Linear(24, 96).bfloat16(), nn.Linear(96, 24).bfloat16())
        assert not fuses(x, nn.Linear(24, 96).double(), last)
        assert not fuses(x, first, nn.Linear(96, 24).double())
        assert not fuses(x.to("meta"), first, last)
        assert not fuses(x[:0], first, last)
        with torch.autocast("cpu", torch.bfloat16):
            assert not fuses(x, first, last)
        monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
        assert fuses_mlp(x, first, nn.GELU(), last)
        assert not fuses_swiglu(x, first, last)


def test_importing_the_layers_and_models_registers_no_operator():
    code = "import torch, dinov2.layers, dinov2.models; print(hasattr(torch.ops.dinov2, 'linear'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
