"""Hooks, checkpoint wrappers, compiled blocks and FSDP2 take effect in a training step, which stays the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

from dinov2.layers import Block
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.eval.two_processes import on_two_processes
from tests.train.ssl_golden import HYPER, golden_batch, golden_ssl

VARIANT = "sinkhorn_separate_reg"


def step(ssl: SSLMetaArch) -> tuple[float, torch.Tensor]:
    """Loss of the golden step, and the gradient's norm of each student parameter."""
    torch.manual_seed(0)
    losses = ssl(golden_batch(), HYPER)
    losses.total.backward()
    norms = []
    for parameter in ssl.student.parameters():
        gradient = parameter.grad
        norm = gradient.norm()
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return losses.total.item(), torch.stack(norms)


@pytest.fixture(scope="module")
def plain() -> tuple[float, torch.Tensor]:
    return step(golden_ssl(VARIANT))


def test_hooks_fire_on_every_module_with_parameters(plain):
    ssl, counts = golden_ssl(VARIANT), {}
    for name, module in ssl.named_modules():
        if list(module.parameters(recurse=False)):
            counts[name] = 0

            def count(*_: Any, name: str = name) -> None:
                counts[name] += 1

            module.register_forward_hook(count)
    assert_close(step(ssl), plain, rtol=1e-5, atol=1e-7)
    assert len(counts) > 50
    assert not [name for name, n_calls in counts.items() if n_calls == 0]


def test_a_checkpoint_wrapper_on_each_block_recomputes_the_same_step(plain):
    ssl, calls = golden_ssl(VARIANT), []
    backbone = ssl.student["backbone"]
    for name, block in list(backbone.named_modules()):
        if isinstance(block, Block):
            block.register_forward_pre_hook(lambda *_: calls.append(1))
            place, _, index = name.rpartition(".")
            backbone.get_submodule(place)[int(index)] = checkpoint_wrapper(block)
    assert_close(step(ssl), plain, rtol=1e-5, atol=1e-7)
    assert len(calls) == 2 * backbone.n_blocks  # the backward pass runs every block again


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own
def test_compiled_blocks_compute_the_same_step(plain):
    ssl, graphs = golden_ssl(VARIANT), []
    for network in (ssl.student, ssl.teacher):
        for block in network["backbone"].block_list:
            block.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert_close(step(ssl), plain, rtol=1e-4, atol=1e-6)
    assert graphs


def sharded(rank: int, folder: Path) -> tuple[float, torch.Tensor, bool]:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    ssl = golden_ssl(VARIANT)
    for network in (ssl.student, ssl.teacher):
        for block in network["backbone"].block_list:
            fully_shard(block)
        for module in network.values():
            fully_shard(module)
    blocks = ssl.student["backbone"].block_list
    is_sharded = all(isinstance(block, FSDPModule) for block in blocks) and all(
        isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in ssl.parameters()
    )
    loss, norms = step(ssl)
    return loss, norms, is_sharded


def test_fully_shard_on_two_processes_computes_the_same_step(plain, tmp_path):
    """Both processes see the same batch, so that means over processes are those of one."""
    for loss, norms, is_sharded in on_two_processes(sharded, tmp_path):
        assert is_sharded
        assert_close((loss, norms), plain, rtol=1e-4, atol=1e-6)


def test_a_replaced_layer_changes_the_step(plain):
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for name in ("attn.qkv", "mlp.w3"):
        ssl = golden_ssl(VARIANT)
        layer = ssl.student["backbone"].block_list[0].get_submodule(name)
        layer.__class__ = Doubled
        assert abs(step(ssl)[0] - plain[0]) > 1e-6
