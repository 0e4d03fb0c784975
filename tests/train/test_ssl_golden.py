"""One and two training steps give the losses, gradients and weights of the public release."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dinov2.engine.optim import apply_hyper, build_optimizer, guarded_step
from dinov2.engine.schedules import Hyper, Schedules
from tests.golden.loading import golden_json, golden_tensors
from tests.train.ssl_golden import STEP, golden_batch, golden_config, golden_ssl

TWO = golden_json("ssl_step_two")


# KoLeo is a small share of a mean of logarithms that nearly cancel; float32 rounds those terms to about this much.
KOLEO_ROUNDING = 5e-8


def sliced(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("pos_embed"):
        return tensor[:, ::5, ::4]
    if name.endswith("last_layer.weight_v"):
        return tensor[::8, ::4]
    if name.endswith("patch_embed.proj.weight"):
        return tensor[::8, :, ::5, ::5]
    return tensor


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """The gradient of the key bias is rounding noise."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("variant", list(STEP["config"]))
def test_a_step_equals_the_release(variant):
    golden, expected = golden_tensors(f"ssl_step_{variant}"), STEP["results"][variant]
    ssl, batch = golden_ssl(variant), golden_batch()
    assignments = ssl._teacher_assignments(batch, STEP["teacher_temp"])
    scores = ssl._student_scores(batch)
    losses = ssl._loss_terms(batch, assignments, scores)
    assert_close(assignments.cls.flip(0), golden["teacher_dino"], atol=2e-5, rtol=0)
    assert_close(assignments.patches, golden["teacher_ibot"], atol=2e-5, rtol=0)
    assert_close(scores.local_cls.flatten(0, 1)[:, ::4], golden["student_local_logits.slice"], atol=2e-5, rtol=0)
    assert_close(scores.global_cls.flatten(0, 1)[:, ::4], golden["student_global_logits.slice"], atol=2e-5, rtol=0)
    assert_close(scores.masked_patches[::3, ::4], golden["student_masked_logits.slice"], atol=2e-5, rtol=0)
    for name, value in expected["loss_dict"].items():
        assert losses.logged[name].item() == pytest.approx(value, rel=1e-5, abs=KOLEO_ROUNDING), name
    assert losses.total.item() == pytest.approx(expected["total"], rel=1e-5)

    losses.total.backward()
    gradients = {name: p.grad for name, p in ssl.student.named_parameters()}
    for name, norm in expected["grad_l2"].items():
        if not name.endswith("attn.qkv.bias"):
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    stored = [key for key in golden if key.startswith("grad.")]
    assert stored
    for key in stored:
        name = key.removeprefix("grad.").removesuffix(".slice")
        actual, wanted = (without_key_bias(name, t) for t in (sliced(name, gradients[name]), golden[key]))
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm(), key
    ssl.update_teacher(1.0)
    assert_close(ssl.dino_loss.center, golden["dino_center_after"], atol=1e-6, rtol=1e-5)
    assert_close(ssl.ibot_patch_loss.center, golden["ibot_center_after"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", list(TWO))
def test_two_steps_equal_the_release(case):
    golden, facts = golden_tensors(f"ssl_step_two_{case}"), TWO[case]
    ssl, cfg = golden_ssl(facts["variant"]), golden_config(facts["variant"])
    parts = dict(ssl.student.items())
    optimizer = build_optimizer(parts, cfg.optim)
    schedules = Schedules.from_config(cfg, global_batch=4)
    start = {
        f"{who}.{k}": v.clone() for who in ("student", "teacher") for k, v in getattr(ssl, who).state_dict().items()
    }
    for step, expected in enumerate(facts["steps"]):
        hyper = schedules.at(expected["iteration"])
        assert hyper == pytest.approx(
            Hyper(
                expected["lr"],
                expected["wd"],
                expected["momentum"],
                expected["teacher_temp"],
                expected["last_layer_lr"],
            ),
            rel=1e-12,
        )
        apply_hyper(optimizer, hyper)
        losses = ssl(golden_batch(step), hyper)
        losses.total.backward()
        centers = ssl.dino_loss.center.norm().item(), ssl.ibot_patch_loss.center.norm().item()
        outcome = guarded_step(optimizer, parts, facts["clip_grad"], loss=losses.total)
        optimizer.zero_grad(set_to_none=True)
        ssl.update_teacher(hyper.momentum, finite=outcome.finite)
        for name, value in expected["loss_dict"].items():
            assert losses.logged[name].item() == pytest.approx(value, rel=1e-5, abs=KOLEO_ROUNDING), name
        assert losses.total.item() == pytest.approx(expected["total"], rel=1e-5)
        for part, norm in expected["grad_norm_before_clip"].items():
            assert outcome.grad_norms[part].item() == pytest.approx(norm, rel=1e-4), part
        assert centers == pytest.approx((expected["dino_center_l2_lazy"], expected["ibot_center_l2_lazy"]), rel=1e-5)
        for who in ("student", "teacher"):
            for name, tensor in getattr(ssl, who).state_dict().items():
                check_parameter(name, tensor, start[f"{who}.{name}"], expected[who])
        stored = [key for key in golden if key.startswith(f"step{step}.")]
        assert stored
        for key in stored:
            _, who, name = key.removesuffix(".slice").split(".", 2)
            actual = sliced(name, getattr(ssl, who).state_dict()[name])
            actual, wanted = (without_key_bias(name, t) for t in (actual, golden[key]))
            assert_close(actual, wanted, atol=1e-5, rtol=0, msg=key)


def check_parameter(name: str, tensor: Tensor, start: Tensor, expected: dict) -> None:
    """Norm, sum and size of the change since the start; the joint projection's bias without its key third."""
    pieces = {name: (tensor, start)}
    if name.endswith("attn.qkv.bias"):
        thirds = zip("qkv", tensor.chunk(3), start.chunk(3), strict=True)
        pieces = {f"{name}[{letter}]": (now, then) for letter, now, then in thirds if letter != "k"}
    for key, (now, then) in pieces.items():
        norm, total, change = expected[key]
        assert now.norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-5), key
        assert now.sum().item() == pytest.approx(total, rel=1e-4, abs=1e-5 * now.numel() ** 0.5 + 1e-3), key
        assert (now - then).norm().item() == pytest.approx(change, rel=2e-3, abs=1e-7), key
