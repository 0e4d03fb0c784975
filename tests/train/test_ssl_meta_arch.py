"""Every term of the objective can be switched off, and nothing it does not need is computed or required."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from dinov2.data.crops.collate import CropBatch
from dinov2.engine.optim import apply_hyper, build_optimizer, guarded_step
from dinov2.engine.schedules import Hyper
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.train.ssl_golden import HYPER
from tests.train.tiny_run import tiny_config

MASKS = "ibot.mask_sample_probability=0.5"


def batch_of(batch: int = 3, n_local: int = 2, masked: bool = True, size: int = 32) -> CropBatch:
    masks = torch.zeros(2 * batch, 16, dtype=torch.bool)
    if masked:
        masks[0, :5] = masks[-1, 3:6] = True
    return CropBatch.from_crops(
        torch.randn(2 * batch, 3, size, size),
        torch.randn(n_local * batch, 3, 16, 16) if n_local else None,
        masks,
        sample_numbers=torch.arange(batch),
    )


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize(
    "overrides, batch, off",
    [
        (("ibot.loss_weight=1",), {}, []),
        (("ibot.loss_weight=1", "ibot.separate_head=true"), {}, []),
        (("ibot.loss_weight=1", "dino.loss_weight=0"), {}, ["dino_local_crops_loss", "dino_global_crops_loss"]),
        (("ibot.loss_weight=1", "dino.loss_weight=0", "ibot.separate_head=true"), {}, ["dino_global_crops_loss"]),
        (("ibot.loss_weight=0",), {}, ["ibot_loss"]),
        (("ibot.loss_weight=0", "dino.loss_weight=0"), {}, ["ibot_loss", "dino_global_crops_loss"]),
        (("dino.koleo_loss_weight=0",), {}, ["koleo_loss"]),
        (("crops.local_crops_number=0",), {"n_local": 0}, ["dino_local_crops_loss"]),
        (("dino.koleo_loss_weight=0", "train.batch_size_per_gpu=1"), {"batch": 1}, ["koleo_loss"]),
        (("ibot.loss_weight=1",), {"masked": False}, []),
        (("ibot.loss_weight=1", "ibot.separate_head=true"), {"masked": False}, []),
    ],
)
def test_each_term_can_be_switched_off(overrides, batch, off, centering):
    ssl = SSLMetaArch(tiny_config(f"train.centering={centering}", MASKS, *overrides)).train()
    losses = ssl(batch_of(**batch), HYPER)
    losses.total.backward()
    ssl.update_teacher(0.9)
    assert math.isfinite(losses.total.item())
    assert all(math.isfinite(value.item()) for value in losses.logged.values())
    assert not set(off) & set(losses.logged)
    gradient = ssl.student["backbone"].patch_embed.proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_without_local_crops_the_mean_is_over_the_two_global_pairs():
    ssl = SSLMetaArch(tiny_config("crops.local_crops_number=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0"))
    batch = batch_of(n_local=0, masked=False)
    losses = ssl.eval()(batch, HYPER)
    with torch.no_grad():
        assignments = ssl._teacher_assignments(batch, 0.05).cls.flip(0).flatten(0, 1)
        scores = ssl._student_scores(batch).global_cls.flatten(0, 1)
    expected = -(assignments * (scores / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
    assert_close(losses.total, expected)


def test_the_temperature_of_the_student_acts():
    totals = []
    for temperature in (0.1, 0.2):
        torch.manual_seed(0)
        ssl = SSLMetaArch(tiny_config("ibot.loss_weight=1", MASKS), student_temp=temperature).train()
        totals.append(ssl(batch_of(), HYPER).logged)
    for name in ("dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"):
        assert totals[0][name] != totals[1][name], name
    assert totals[0]["koleo_loss"] == totals[1]["koleo_loss"]


def test_the_teacher_starts_as_the_student_stays_in_eval_mode_and_follows_it():
    ssl = SSLMetaArch(tiny_config()).train()
    assert not ssl.teacher["backbone"].training and ssl.student["backbone"].training
    for ours, theirs in zip(ssl.teacher.parameters(), ssl.student.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad
    before = copy.deepcopy(ssl.teacher.state_dict())
    with torch.no_grad():
        for parameter in ssl.student.parameters():
            parameter.add_(1.0)
    ssl.update_teacher(0.75)
    for name, value in ssl.teacher.state_dict().items():
        assert_close(value, before[name] + 0.25)
    ssl.eval()


def test_a_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    ssl = SSLMetaArch(tiny_config("ibot.loss_weight=1", MASKS, "teacher.teacher_temp=0.04")).train()
    parts = dict(ssl.student.items())
    optimizer = build_optimizer(parts, tiny_config().optim)
    batch = batch_of(batch=4)
    totals = []
    for _ in range(60):
        apply_hyper(optimizer, Hyper(3e-3, 0.0, 1.0, 0.04, 3e-3))
        losses = ssl(batch, HYPER._replace(teacher_temp=0.04))
        losses.total.backward()
        guarded_step(optimizer, parts, 3.0, loss=losses.total)
        optimizer.zero_grad(set_to_none=True)
        totals.append(losses.total.item())
    # With a fixed teacher the loss cannot fall below the entropy of its assignments; half the way is plenty.
    assert totals[-1] < 0.6 * totals[0]


def test_one_packed_pass_equals_a_plain_step_crop_by_crop():
    """The same objective written out plainly: every crop size on its own, unchunked losses, every pair in a loop."""
    ssl = SSLMetaArch(tiny_config("ibot.loss_weight=1", MASKS)).train()
    batch = batch_of()
    losses = ssl(batch, HYPER)
    losses.total.backward()
    packed = {name: p.grad.clone() for name, p in ssl.student.named_parameters()}
    ssl.zero_grad()

    def log_probabilities(tokens: torch.Tensor) -> torch.Tensor:
        return (ssl.student["dino_head"](tokens) / 0.1).log_softmax(dim=-1)

    with torch.no_grad():
        targets = ssl._teacher_assignments(batch, 0.05)
    global_tokens = ssl.student["backbone"].forward_features(batch.global_crops, batch.masks)
    local_tokens = ssl.student["backbone"].forward_features(batch.local_crops)
    total, pairs = torch.zeros(()), 0
    for crop in log_probabilities(local_tokens["x_norm_clstoken"]).chunk(2):
        for target in targets.cls:
            total, pairs = total - (target * crop).sum(dim=-1).mean(), pairs + 1
    for crop, target in zip(
        log_probabilities(global_tokens["x_norm_clstoken"]).chunk(2), targets.cls.flip(0), strict=True
    ):
        total, pairs = total - (target * crop).sum(dim=-1).mean(), pairs + 1
    total = total / pairs
    patches = log_probabilities(global_tokens["x_norm_patchtokens"][batch.masks])
    total = total - ((targets.patches * patches).sum(dim=-1) * batch.mask_weights).sum() / len(batch.masks)
    for crop in global_tokens["x_norm_clstoken"].chunk(2):
        z = torch.nn.functional.normalize(crop, dim=-1)
        nearest = (z @ z.T - 2 * torch.eye(len(z))).argmax(dim=1)
        total = total - 0.02 * torch.log((z - z[nearest] + 1e-8).norm(dim=1) + 1e-8).mean()
    assert_close(losses.total, total, rtol=1e-5, atol=1e-5)
    total.backward()
    for name, parameter in ssl.student.named_parameters():
        assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
