"""The projection head gives the figures of the public release and reads both spellings of its weights."""

import copy

import pytest
import torch
from torch.testing import assert_close

from dinov2.layers import DINOHead
from tests.golden.loading import golden_json, golden_tensors
from tests.golden.recipe import fill, values

CASES = golden_json("dino_head")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", list(CASES))
def test_outputs_and_gradients_equal_the_release(case, mode):
    golden, facts = golden_tensors(f"dino_head_{case}"), CASES[case]
    head = fill(DINOHead(**facts["constructor"])).train(mode == "train")
    prefix = "eval." if mode == "eval" and facts["constructor"].get("use_bn") else ""
    x = torch.from_numpy(values("dino_head.input", (12, 64))).requires_grad_()
    bottleneck = copy.deepcopy(head).bottleneck(x)
    output = head(x)
    assert_close(output, golden[f"{prefix}output"], atol=2e-5, rtol=0)
    if f"{prefix}bottleneck" in golden:
        assert_close(bottleneck, golden[f"{prefix}bottleneck"], atol=2e-5, rtol=0)
    (output * torch.from_numpy(values("dino_head.direction", tuple(output.shape)))).sum().backward()
    gradients = {"input": x.grad, **{name: p.grad for name, p in head.named_parameters()}}
    checked = 0
    for name, gradient in gradients.items():
        if (key := f"{prefix}grad.{name}") in golden:
            assert (gradient - golden[key]).norm() <= 1e-4 * golden[key].norm(), name
            checked += 1
    assert checked >= 2
    assert {key: list(value.shape) for key, value in head.state_dict().items()} == facts["keys"]
    if not prefix:
        for name, norm in facts["grad_l2"].items():
            if name in gradients:
                assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name


def test_weights_named_by_the_parametrisation_of_torch_load():
    head, other = (
        fill(DINOHead(64, 32, hidden_dim=48, bottleneck_dim=16)),
        DINOHead(64, 32, hidden_dim=48, bottleneck_dim=16),
    )
    state = head.state_dict()
    state["last_layer.parametrizations.weight.original0"] = state.pop("last_layer.weight_g")
    state["last_layer.parametrizations.weight.original1"] = state.pop("last_layer.weight_v")
    other.load_state_dict(state)
    assert_close(other(torch.ones(2, 64)), head(torch.ones(2, 64)))


def test_a_fresh_head_scores_cosines():
    scores = DINOHead(64, 32, hidden_dim=48, bottleneck_dim=16)(torch.randn(50, 64))
    assert scores.abs().max() <= 1.0
