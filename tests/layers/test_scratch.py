"""Feed-forward networks that write what is wide into memory used again."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers import linear, scratch
from dinov2.layers.mlp import Mlp, mlp
from dinov2.layers.scratch import reuses_memory
from dinov2.layers.swiglu_ffn import SwiGLUFFN


@pytest.fixture(autouse=True)
def _without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN is the faster one it comes before scratch memory, so that it is left out here."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the buffers that were asked for."""
    sizes: list[int] = []
    whole = scratch._buffer

    def counted(n_numbers: int) -> Tensor:
        sizes.append(n_numbers)
        return whole(n_numbers)

    monkeypatch.setattr(scratch, "_buffer", counted)
    return sizes


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Mlp(24, 96), Mlp(24, 96, 8, bias=False), SwiGLUFFN(24, 40), SwiGLUFFN(24, 40, bias=False)]


@pytest.mark.parametrize("network", networks(), ids=["mlp", "mlp-no-bias", "swiglu", "swiglu-no-bias"])
@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (1, 1, 24)])
def test_same_values_as_with_gradients(network: nn.Module, shape: tuple[int, ...], taken: list[int]) -> None:
    x = torch.randn(shape)
    expected = network(x).detach()
    assert not taken
    with torch.no_grad():
        result = network(x)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(network(x.mT.contiguous().mT), expected, rtol=0, atol=1e-6)  # columns lie together
    assert len(taken) == 2


@pytest.mark.parametrize("network", networks(), ids=["mlp", "mlp-no-bias", "swiglu", "swiglu-no-bias"])
def test_many_rows_go_through_a_small_buffer_in_parts(
    network: nn.Module, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(50, 24)
    expected = network(x).detach()
    monkeypatch.setattr(scratch, "_MOST", 7 * 96)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-6)
    assert len(taken) >= 7
    assert max(taken) <= 7 * 96


def test_results_do_not_share_the_buffer() -> None:
    network = networks()[0]
    x, y = torch.randn(2, 4, 24)
    with torch.no_grad():
        first = network(x)
        kept = first.clone()
        network(y)
    assert torch.equal(first, kept)


def test_threads_have_buffers_of_their_own() -> None:
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


def test_inference_mode_and_no_grad_share_it() -> None:
    network = networks()[0]
    x = torch.randn(1_000, 24)
    with torch.inference_mode():
        first = network(x)
    with torch.no_grad():
        assert torch.equal(network(x), first)


def test_defaults_of_dtype_and_device_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    network = networks()[0]
    x = torch.randn(3, 24)
    monkeypatch.setattr(scratch, "_threads", threading.local())  # a buffer that is yet to be made
    with torch.no_grad(), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            result = network(x)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(result, network(x).detach(), rtol=0, atol=1e-6)


def test_an_activation_of_ones_own_is_never_given_the_buffer(taken: list[int]) -> None:
    seen: list[Tensor] = []

    def activation(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return F.relu(hidden)

    x, first, last = torch.randn(3, 24), torch.randn(96, 24), torch.randn(24, 96)
    mlp(x, first, None, last, None, activation)
    assert len(seen) == 1
    assert not taken


def test_works_under_vmap(taken: list[int]) -> None:
    network = networks()[0]
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        expected = network(x)
        taken.clear()
        torch.testing.assert_close(torch.vmap(network)(x), expected, rtol=0, atol=1e-6)
    assert not taken


def test_only_where_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    x, first, last = torch.randn(3, 24), nn.Parameter(torch.randn(96, 24)), nn.Parameter(torch.randn(24, 96))
    assert not reuses_memory(x, first, last)  # gradients are wanted
    with torch.no_grad():
        assert reuses_memory(x, first, last)
        assert not reuses_memory(x.bfloat16(), first.bfloat16(), last.bfloat16())
        assert not reuses_memory(x, nn.Parameter(first.double()), last)
        assert not reuses_memory(x, first, nn.Parameter(last.double()))
        assert not reuses_memory(x.to("meta"), first, last)
        assert not reuses_memory(x[:0], first, last)
        with torch.autocast("cpu", torch.bfloat16):
            assert not reuses_memory(x, first, last)
        monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
        assert not reuses_memory(x, first, last)
