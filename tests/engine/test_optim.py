"""Groups against those of the release, steps against formulas, and steps that must not happen."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dinov2.engine import optim as optim_module
from dinov2.engine.optim import (
    LossScaler,
    apply_hyper,
    build_optimizer,
    clip_gradients,
    ema_update,
    fuse_groups,
    guarded_step,
    param_groups,
)
from dinov2.engine.schedules import Hyper

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["tiny", "tiny_chunked", "vits14", "vits14_chunked"]
OPTIM = SimpleNamespace(layerwise_decay=0.9, patch_embed_lr_mult=0.2, adamw_beta1=0.9, adamw_beta2=0.99)
HYPER = Hyper(lr=1e-2, weight_decay=0.1, momentum=0.99, teacher_temp=0.05, last_layer_lr=0.0)


def module_with(names):
    """A module whose parameters have exactly these names, in this order."""
    root = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(leaf, nn.Parameter(torch.zeros(2)))
    return root


def student(seed=0):
    """A miniature student: a backbone with one block and a head, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "backbone": module_with(["cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.bias", "norm.weight"]),
        "dino_head": module_with(["mlp.0.weight", "last_layer.weight_v"]),
    }
    for part in parts.values():
        for parameter in part.parameters():
            parameter.data = torch.randn(2, generator=generator)
            parameter.grad = torch.randn(2, generator=generator)
    return parts


def snapshot(parts, optimizer):
    weights = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    return weights, copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("case", CASES)
def test_groups_have_the_multipliers_of_the_release_in_its_order(case):
    golden = json.loads((GOLDEN / f"param_groups_{case}.json").read_text())
    for expected in golden["groups"].values():
        groups = param_groups(
            module_with(expected),
            layerwise_decay=golden["layerwise_decay"],
            patch_embed_lr_mult=golden["patch_embed_lr_mult"],
        )
        assert [group["name"] for group in groups] == list(expected)
        for group, (lr, wd, is_last) in zip(groups, expected.values(), strict=True):
            assert group["lr_multiplier"] == pytest.approx(lr, rel=1e-12), group["name"]
            assert (group["wd_multiplier"], group["is_last_layer"]) == (wd, is_last), group["name"]


@pytest.mark.parametrize("case", CASES)
def test_fused_groups_are_those_of_the_release_in_its_order(case):
    golden = json.loads((GOLDEN / f"param_groups_{case}.json").read_text())
    decays = {key: golden[key] for key in ("layerwise_decay", "patch_embed_lr_mult")}
    for part, expected in golden["fused"].items():
        module = module_with(golden["groups"][part])
        fused = fuse_groups(param_groups(module, **decays))
        for group, wanted in zip(fused, expected, strict=True):
            assert group["lr_multiplier"] == pytest.approx(wanted["lr_multiplier"], rel=1e-12)
            for key in ("wd_multiplier", "is_last_layer"):
                assert group[key] == wanted[key]
            assert len(group["params"]) == wanted["tensors"]
        assert {id(p) for group in fused for p in group["params"]} == {id(p) for p in module.parameters()}


@pytest.mark.filterwarnings("ignore:dinov2.utils:DeprecationWarning")
def test_groups_are_fused_by_the_keys_asked_for_under_the_release_s_argument_names():
    from dinov2.utils.param_groups import fuse_params_groups

    rates = {"lr_multiplier": 0.5, "is_last_layer": False}
    groups = [{"params": n, "name": f"p{n}", "wd_multiplier": n / 2, **rates} for n in (2, 1, 2)]
    assert list(fuse_params_groups(all_params_groups=groups)) == [
        {"params": [2, 2], "wd_multiplier": 1.0, **rates},
        {"params": [1], "wd_multiplier": 0.5, **rates},
    ]
    by_rate = fuse_params_groups(all_params_groups=groups, keys=("lr_multiplier",))
    assert list(by_rate) == [{"params": [2, 1, 2], "lr_multiplier": 0.5}]
    assert fuse_groups([]) == []


def test_frozen_parameters_have_no_group_and_wrappers_leave_no_trace():
    module = module_with(["_orig_mod.blocks.0._checkpoint_wrapped_module.norm1.weight", "_orig_mod.cls_token"])
    module._orig_mod.cls_token.requires_grad_(False)
    (group,) = param_groups(module, layerwise_decay=0.5, patch_embed_lr_mult=1.0)
    assert (group["name"], group["lr_multiplier"]) == ("blocks.0.norm1.weight", 0.5)


def test_a_given_depth_overrides_the_names():
    (group,) = param_groups(module_with(["blocks.0.x"]), layerwise_decay=0.5, patch_embed_lr_mult=1.0, n_blocks=3)
    assert group["lr_multiplier"] == 0.5**3


def test_hyper_parameters_reach_each_group_by_its_multipliers():
    optimizer = build_optimizer(student(), OPTIM)
    apply_hyper(optimizer, HYPER)
    lr, wd = HYPER.lr, HYPER.weight_decay
    found_lr = [group["lr"] for group in optimizer.param_groups]
    assert found_lr == pytest.approx([lr * 0.81, lr * 0.81 * 0.2, lr * 0.9, lr, lr, 0.0])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [wd, wd, 0.0, 0.0, wd, wd]


def test_a_step_is_adamw_and_a_frozen_last_layer_only_gathers_moments():
    parts = student()
    optimizer = build_optimizer(parts, OPTIM)
    apply_hyper(optimizer, HYPER)
    token, last = parts["backbone"].cls_token, parts["dino_head"].last_layer.weight_v
    before, last_before = token.detach().double(), last.detach().clone()
    outcome = guarded_step(optimizer, parts, None, loss=torch.tensor(1.0))
    assert bool(outcome.finite)
    # First step: bias-corrected moments are the gradient and its square.
    gradient, lr = token.grad.double(), HYPER.lr * 0.81
    expected = before * (1 - lr * HYPER.weight_decay) - lr * gradient / (gradient.abs() + 1e-8)
    assert_close(token.detach().double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(last, last_before)
    assert_close(optimizer.state[last]["exp_avg"], 0.1 * last.grad)


def test_each_part_is_clipped_by_its_own_norm():
    parts, reference = student(), student()
    parts["backbone"].cls_token.grad *= 100
    reference["backbone"].cls_token.grad *= 100
    norms = clip_gradients(parts, 3.0)
    for name, part in reference.items():
        expected = torch.nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        assert_close(norms[name], expected)
        for got, wanted in zip(parts[name].parameters(), part.parameters(), strict=True):
            assert_close(got.grad, wanted.grad)
    assert float(norms["backbone"]) > 3.0 > float(norms["dino_head"])
    untouched = student()["dino_head"].last_layer.weight_v.grad
    assert torch.equal(parts["dino_head"].last_layer.weight_v.grad, untouched)


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_without_clipping_norms_are_still_measured(off):
    parts = student()
    norms = clip_gradients(parts, off)
    gradients = [p.grad for p in parts["backbone"].parameters()]
    assert_close(norms["backbone"], torch.cat(gradients).norm())
    assert torch.equal(parts["backbone"].cls_token.grad, student()["backbone"].cls_token.grad)


def test_a_part_without_gradients_has_norm_zero_and_does_not_stop_a_step():
    parts = student()
    for parameter in parts["dino_head"].parameters():
        parameter.grad = None
    optimizer = build_optimizer(parts, OPTIM)
    outcome = guarded_step(optimizer, parts, 3.0, loss=torch.tensor(1.0))
    assert float(outcome.grad_norms["dino_head"]) == 0.0
    assert bool(outcome.finite)


@pytest.fixture(params=["branch", "on the device"])
def way(request, monkeypatch):
    """Both ways to skip a step; the fused kernel's own way works on the CPU as well."""
    monkeypatch.setattr(optim_module, "_decides_on_device", lambda optimizer: request.param == "on the device")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fault", ["nan loss", "infinite loss", "nan gradient", "infinite gradient"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_non_finite_loss_or_gradient_changes_nothing_at_all(fault, steps_before):
    parts = student()
    optimizer = build_optimizer(parts, OPTIM)
    apply_hyper(optimizer, HYPER)
    for _ in range(steps_before):
        guarded_step(optimizer, parts, 3.0, loss=torch.tensor(1.0))
    weights, state = snapshot(parts, optimizer)
    value = math.nan if "nan" in fault else math.inf
    loss = torch.tensor(value if "loss" in fault else 1.0)
    if "gradient" in fault:
        parts["dino_head"].last_layer.weight_v.grad[1] = value
    outcome = guarded_step(optimizer, parts, 3.0, loss=loss)

    assert not bool(outcome.finite)
    assert bool(outcome.loss_finite) == ("gradient" in fault)
    now, state_now = snapshot(parts, optimizer)
    for part, tensors in weights.items():
        for name, tensor in tensors.items():
            assert torch.equal(now[part][name], tensor), name
    if steps_before:
        assert_close(state_now, state, rtol=0, atol=0)
    else:  # moments may have been created, but hold nothing
        assert all(not tensor.any() for entry in state_now.values() for tensor in entry.values())


@pytest.mark.usefixtures("way")
def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been():
    def train(with_fault):
        parts = student()
        optimizer = build_optimizer(parts, OPTIM)
        apply_hyper(optimizer, HYPER)
        for step in range(3):
            if with_fault and step == 1:
                guarded_step(optimizer, parts, 3.0, loss=torch.tensor(math.nan))
            for source, part in zip(student(seed=step).values(), parts.values(), strict=True):
                for new, parameter in zip(source.parameters(), part.parameters(), strict=True):
                    parameter.grad = new.grad
            guarded_step(optimizer, parts, 3.0, loss=torch.tensor(1.0))
        return snapshot(parts, optimizer)

    assert_close(train(with_fault=True), train(with_fault=False), rtol=0, atol=0)


def test_one_process_must_not_step_when_another_has_a_bad_loss(monkeypatch):
    monkeypatch.setattr(optim_module, "all_reduce_max", torch.ones_like)  # what the other process says
    parts = student()
    optimizer = build_optimizer(parts, OPTIM)
    outcome = guarded_step(optimizer, parts, 3.0, loss=torch.tensor(1.0))
    assert (bool(outcome.finite), bool(outcome.loss_finite)) == (False, True)
    assert not optimizer.state


def on_device(teacher, student, momentum, *, finite):
    optim_module._ema_update_on_device(teacher, student, momentum, finite)


@pytest.mark.parametrize("update", [ema_update, on_device])
def test_the_teacher_moves_towards_the_student_or_stays(update):
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(3, i + 1, generator=generator) for i in range(70)]
    teacher = [torch.randn(3, i + 1, generator=generator) for i in range(70)]
    before = [tensor.clone() for tensor in teacher]
    update(teacher, student, 0.992, finite=torch.tensor(False))
    assert all(torch.equal(now, then) for now, then in zip(teacher, before, strict=True))
    update(teacher, student, 0.992, finite=torch.tensor(True))
    for now, then, towards in zip(teacher, before, student, strict=True):
        assert_close(now, 0.992 * then + (1 - 0.992) * towards, rtol=1e-6, atol=1e-7)


def test_a_momentum_of_one_keeps_the_teacher_exactly_and_no_parameters_are_fine():
    teacher = [torch.randn(5)]
    before = teacher[0].clone()
    ema_update(teacher, [torch.randn(5)], 1.0)
    assert torch.equal(teacher[0], before)
    ema_update([], [], 0.9)


def test_the_loss_scaler_gives_true_gradients_and_finds_its_scale():
    parts = {"head": module_with(["mlp.0.weight"])}
    weight = next(parts["head"].parameters())
    optimizer = build_optimizer(parts, OPTIM)
    scaler = LossScaler("cpu", initial_scale=1024.0, growth_interval=2)

    def step(value):
        optimizer.zero_grad()
        loss = (weight * torch.tensor([value, 2.0])).sum()
        scaler.scaled(loss).backward()
        return guarded_step(optimizer, parts, None, loss=loss, scaler=scaler)

    outcome = step(3.0)
    assert_close(weight.grad, torch.tensor([3.0, 2.0]))
    assert_close(outcome.grad_norms["head"], torch.tensor([3.0, 2.0]).norm())
    assert float(scaler.scale) == 1024.0
    step(3.0)
    assert float(scaler.scale) == 2048.0
    outcome = step(3e38)  # finite loss, but the scaled gradient overflows
    assert (bool(outcome.finite), bool(outcome.loss_finite)) == (False, True)
    assert float(scaler.scale) == 1024.0

    resumed = LossScaler("cpu")
    resumed.load_state_dict(scaler.state_dict())
    assert float(resumed.scale) == 1024.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_on_cuda_nothing_waits_for_the_device(loss):
    parts = student()
    for part in parts.values():
        part.cuda()
        for parameter in part.parameters():
            parameter.grad = torch.randn(2, device="cuda")
    optimizer = build_optimizer(parts, OPTIM)
    apply_hyper(optimizer, HYPER)
    guarded_step(optimizer, parts, 3.0, loss=torch.tensor(1.0, device="cuda"))
    weights, state = snapshot(parts, optimizer)
    value = torch.tensor(loss, device="cuda")
    teacher = [parameter.detach().clone() for parameter in parts["backbone"].parameters()]
    then = [tensor.clone() for tensor in teacher]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = guarded_step(optimizer, parts, 3.0, loss=value)
        ema_update(teacher, [p.detach() + 1 for p in parts["backbone"].parameters()], 0.9, finite=outcome.finite)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moved = not math.isnan(loss)
    assert bool(outcome.finite) == moved
    assert all(torch.equal(a, b) != moved for a, b in zip(teacher, then, strict=True))
    if not moved:
        assert_close(snapshot(parts, optimizer), (weights, state), rtol=0, atol=0)
