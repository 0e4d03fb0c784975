"""Devices and precisions."""

import pytest
import torch

from dinov2.engine import parallel
from dinov2.engine.parallel import autocast, choose_device, choose_precision
from dinov2.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda:0"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_prefers_cuda_then_mps_then_the_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == torch.device(expected)


def test_each_process_gets_the_gpu_of_its_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel, "get_local_rank", lambda: 1)
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="needs GPU number 2, but there are 2"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="PyTorch finds none here; use 'cpu' or 'auto'"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cpu:x"])
def test_an_unknown_device_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match="choose auto, cpu, mps, cuda"):
        choose_device(name)


@pytest.mark.parametrize(
    ("flags", "expected"), [({"avx512_bf16"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16), ({"avx2"}, None)]
)
def test_auto_precision_on_a_cpu_depends_on_its_instructions(monkeypatch, flags, expected):
    monkeypatch.setattr(parallel, "_cpu_features", lambda: flags)
    assert choose_precision("auto", CPU) is expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_precision_on_cuda_depends_on_its_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_precision("auto", torch.device("cuda", 0)) is expected


def test_auto_precision_on_mps_is_float32():
    assert choose_precision("auto", torch.device("mps")) is None


def test_an_older_torch_reads_the_instructions_from_the_system(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(parallel.Path, "read_text", lambda path: "processor: 0\nflags\t\t: fpu avx512_bf16 sse\n")
    assert "avx512_bf16" in parallel._cpu_features()
    assert choose_precision("auto", CPU) is torch.bfloat16


def test_named_precisions_and_an_unknown_one():
    assert choose_precision("fp32", CPU) is None
    assert choose_precision("bf16", CPU) is torch.bfloat16
    assert choose_precision("fp16", CPU) is torch.float16
    with pytest.raises(ConfigError, match="'fp8'; choose one of auto, fp32, bf16, fp16"):
        choose_precision("fp8", CPU)


def test_autocast_computes_in_the_dtype_and_none_changes_nothing():
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(CPU, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with autocast(CPU, None):
        assert layer(x).dtype == torch.float32
