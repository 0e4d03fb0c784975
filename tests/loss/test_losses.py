"""Behaviour of the losses that no stored figure shows: extremes, empty batches, memory-lean forms."""

import math

import pytest
import torch
from torch.testing import assert_close

from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss import cross_entropy as cross_entropy_module
from dinov2.loss.centering import Center
from dinov2.loss.cross_entropy import assignment_cross_entropy, log_softmax_cross_entropy
from dinov2.loss.dino import dino_loss
from dinov2.loss.koleo import koleo_loss
from dinov2.loss.sinkhorn import sinkhorn_knopp


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_chunks_equals_the_plain_formula(monkeypatch, chunk, dtype):
    monkeypatch.setattr(cross_entropy_module, "_CHUNK", chunk)
    scores = torch.randn(9, 13).to(dtype).requires_grad_()
    assignments = torch.rand(9, 13) * 2  # rows need not sum to 1
    weights = torch.rand(9)
    lean = assignment_cross_entropy(scores, assignments, 0.1, weights)
    (lean_gradient,) = torch.autograd.grad(3 * lean, scores)
    plain = (log_softmax_cross_entropy(scores, assignments, 0.1) * weights).sum()
    (plain_gradient,) = torch.autograd.grad(3 * plain, scores)
    assert_close(lean, plain, rtol=1e-5, atol=1e-5)
    assert lean_gradient.dtype == dtype
    assert_close(lean_gradient, plain_gradient)


def test_cross_entropy_passes_the_gradient_check():
    scores = torch.randn(4, 6, dtype=torch.float64)
    assignments = torch.rand(4, 6).softmax(dim=-1)
    weights = torch.rand(4)
    analytic = torch.autograd.functional.jacobian(
        lambda s: assignment_cross_entropy(s, assignments, 0.3, weights), scores.float()
    )
    step = 1e-2
    for index in range(scores.numel()):
        bump = torch.zeros_like(scores).flatten()
        bump[index] = step
        bump = bump.view_as(scores)
        upper, lower = (
            (log_softmax_cross_entropy((scores + sign * bump).float(), assignments, 0.3) * weights).sum()
            for sign in (1, -1)
        )
        assert analytic.flatten()[index].item() == pytest.approx(((upper - lower) / (2 * step)).item(), abs=2e-3)


def test_sinkhorn_shares_the_mass_equally_between_prototypes():
    assignments = sinkhorn_knopp(torch.randn(64, 8), temperature=0.5, n_iterations=50)
    assert_close(assignments.sum(dim=1), torch.ones(64))
    assert_close(assignments.sum(dim=0), torch.full((8,), 64 / 8), rtol=1e-3, atol=0)


def test_sinkhorn_survives_scores_that_overflow_an_exponential():
    scores = torch.tensor([[5.0, 4.9, 0.0], [0.0, 5.1, 5.0]]) * 10
    assignments = sinkhorn_knopp(scores, temperature=0.1)
    assert assignments.isfinite().all()
    assert_close(assignments.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "scores, expected",
    [([[0.5, -0.2, 0.1], [0, 0.3, -0.4]], [[0.499550, 0.000901, 0.499550], [0.023974, 0.952052, 0.023974]])],
)
def test_sinkhorn_worked_example(scores, expected):
    assert_close(sinkhorn_knopp(torch.tensor(scores), 0.1), torch.tensor(expected), atol=1e-5, rtol=0)


def test_dino_loss_worked_examples():
    student = torch.tensor([[0.2, 0, 0], [0, 0.1, 0]])
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    loss = DINOLoss(3)
    assert loss([student], [teacher]).item() == pytest.approx(0.795495, abs=1e-5)
    assert loss([student, student], [teacher, teacher.flip(0)]).item() == pytest.approx(4.981979, abs=1e-5)


def test_dino_loss_is_the_sum_over_all_pairs_of_crops():
    scores, assignments = torch.randn(3, 5, 7), torch.randn(2, 5, 7).softmax(dim=-1)
    pairs = [log_softmax_cross_entropy(s, t, 0.1).mean() for s in scores for t in assignments]
    assert_close(dino_loss(scores, assignments), torch.stack(pairs).sum())


def test_pairs_of_a_crop_with_itself_are_left_out():
    scores, assignments = torch.randn(3, 5, 7), torch.randn(3, 5, 7).softmax(dim=-1)
    pairs = [
        log_softmax_cross_entropy(scores[i], assignments[j], 0.1).mean() for i in range(3) for j in range(3) if i != j
    ]
    assert_close(dino_loss(scores, assignments, skip_same_crop=True), torch.stack(pairs).sum())


def test_ibot_loss_worked_example():
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    student = torch.diag(torch.tensor([0.2, 0.1, 0.3]))
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    assert iBOTPatchLoss(3).forward_masked(student, teacher, masks).item() == pytest.approx(0.522604, abs=1e-5)


def test_ibot_loss_without_a_masked_patch_is_zero_and_leaves_the_center_alone():
    loss = iBOTPatchLoss(3)
    loss.center.fill_(0.25)
    nothing = torch.zeros(0, 3, requires_grad=True)
    value = loss.forward_masked(nothing, torch.zeros(0, 3), torch.zeros(2, 4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    loss.update_center(nothing.detach())
    loss.apply_center_update()
    assert_close(loss.center, torch.full((1, 1, 3), 0.25))
    assert sinkhorn_knopp(nothing.detach(), 0.1).shape == (0, 3)


def test_centering_worked_example():
    scores = torch.tensor([[0.5, -0.2, 0.1], [0, 0.3, -0.4]])
    loss = DINOLoss(3)
    loss.update_center(scores)
    targets = loss.softmax_center_teacher(scores, 0.07)
    assert_close(loss.center, torch.tensor([[0.025, 0.005, -0.015]]))
    expected = [[0.994133, 0.000060, 0.005807], [0.010237, 0.989703, 0.000060]]
    assert_close(targets, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_center_update_can_be_thrown_away():
    center = Center(3)
    center.update(torch.ones(2, 3))
    center.apply_pending(keep=torch.tensor(False))
    assert center.center.abs().max() == 0
    center.apply_pending()  # nothing is left to apply
    assert center.center.abs().max() == 0


def test_koleo_worked_example_and_float16_duplicates():
    assert KoLeoLoss()(torch.tensor([[1.0, 0], [0.6, 0.8], [0, -1]])).item() == pytest.approx(-0.041143, abs=1e-5)
    duplicates = torch.ones(2, 8, dtype=torch.float16, requires_grad=True)
    loss = koleo_loss(duplicates)
    loss.backward()
    assert math.isfinite(loss.item()) and duplicates.grad.isfinite().all()


def test_koleo_of_a_single_sample_is_zero_with_a_gradient():
    features = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == 0 and features.grad.abs().max() == 0
