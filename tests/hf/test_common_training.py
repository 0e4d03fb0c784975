"""What transformers checks of every model in training: gradients, checkpointing, labels, compilation, adapters."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.hf.common_cases import (
    EVERY_CLASS,
    EVERY_FAMILY,
    backward_loss,
    checkpoint_gradients,
    gradients,
    leaves,
    our_class,
    used_parameters,
)
from tests.hf.model_cases import CLASSES, difference, images, our_model

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # new names in the newest version

REENTRANT = pytest.mark.parametrize("use_reentrant", [None, True, False])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
COMPILED = pytest.mark.parametrize(
    ("kind", "backend"), [*((kind, "aot_eager") for kind in CLASSES), ("ForImageClassification", "inductor")]
)
NETWORKS = pytest.mark.parametrize("network", [{}, {"use_swiglu_ffn": True}], ids=["MLP", "SwiGLU"])


def checkpointing(model: Any) -> list[bool]:
    return [layer.gradient_checkpointing for layer in model.base_model.encoder.layer]


# Gradients.


@EVERY_CLASS
@NETWORKS
@IMPLEMENTATIONS
def test_every_used_parameter_gets_a_finite_gradient(
    family: str, kind: str, network: dict[str, Any], implementation: str
) -> None:
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = our_model(family, kind, **network, **drops).train()
    model.set_attn_implementation(implementation)
    found = gradients(model)
    assert used_parameters(model) <= set(found)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
    assert [name for name in used_parameters(model) if not found[name].any()] == []


@EVERY_FAMILY
def test_masks_give_the_mask_token_a_gradient(family: str) -> None:
    model = our_model(family, "Model").train()
    mask = torch.arange(70).view(2, 35) % 3 == 0
    model(images(), bool_masked_pos=mask).last_hidden_state.square().mean().backward()
    assert model.embeddings.mask_token.grad.any()


@EVERY_CLASS
def test_a_few_steps_make_the_loss_smaller(family: str, kind: str) -> None:
    model = our_model(family, kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = backward_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@EVERY_CLASS
def test_gradients_are_the_same_for_both_kernels(family: str, kind: str) -> None:
    model = our_model(family, kind).train()
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(gradients(model))
    assert difference(list(found[0].values()), list(found[1].values())) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has its own gradients on GPUs only")
@EVERY_FAMILY
def test_gradients_of_flex_attention_on_a_gpu_are_those_of_explicit_weights(family: str) -> None:
    model = our_model(family, "Model", hidden_size=64).to("cuda").train()
    x, found = images().to("cuda"), []
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(x).last_hidden_state.square().mean().backward()
        found.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-2


# Checkpointing of activations.


@EVERY_CLASS
@REENTRANT
@NETWORKS
def test_gradient_checkpointing_gives_the_same_gradients(
    family: str, kind: str, use_reentrant: bool | None, network: dict[str, Any]
) -> None:
    model = our_model(family, kind, **network).train()
    expected = gradients(model)
    options = {} if use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpoint_gradients(model, **options)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.base_model.encoder.layer[0].mlp.register_forward_hook(count)
    found = gradients(model)
    assert runs == 2, "the block was not computed again for the gradients"
    assert set(found) == set(expected)
    assert difference(list(found.values()), list(expected.values())) < 1e-6


@EVERY_CLASS
@REENTRANT
def test_gradient_checkpointing_keeps_states_and_maps(family: str, kind: str, use_reentrant: bool | None) -> None:
    model = our_model(family, kind).train()
    told = {"output_hidden_states": True, "output_attentions": True}
    expected = model(images(), **told)
    options = {} if use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpoint_gradients(model, **options)
    found = model(images(), **told)
    assert difference(leaves(found), leaves(expected)) < 1e-5


@EVERY_CLASS
def test_gradient_checkpointing_switches_on_and_off(family: str, kind: str) -> None:
    model = our_model(family, kind)
    assert model.supports_gradient_checkpointing
    assert not model.is_gradient_checkpointing
    checkpoint_gradients(model)
    assert model.is_gradient_checkpointing
    assert all(checkpointing(model))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(checkpointing(model))


@EVERY_CLASS
def test_the_older_config_key_switches_gradient_checkpointing_on(family: str, kind: str) -> None:
    config = our_model(family, kind).config
    config.gradient_checkpointing = True
    assert our_class(family, kind)(config).is_gradient_checkpointing


@EVERY_CLASS
def test_inputs_of_a_frozen_embedding_can_be_made_to_require_gradients(family: str, kind: str) -> None:
    model = our_model(family, kind).train().requires_grad_(False)
    assert not leaves(model(images()))[0].requires_grad
    model.enable_input_require_grads()
    assert leaves(model(images()))[0].requires_grad
    model.disable_input_require_grads()
    assert not leaves(model(images()))[0].requires_grad


# Labels; their types stand in test_defects_labels.py.


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("single_label_classification", 5, torch.tensor([1, 3])),
        ("regression", 1, torch.tensor([0.5, -1.0])),
        ("regression", 3, torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 0.25]])),
        ("multi_label_classification", 5, torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 1, 1]])),
        ("multi_label_classification", 5, torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 1]])),
    ],
)
def test_every_problem_type_has_its_loss_and_trains(
    family: str, problem_type: str, num_labels: int, labels: torch.Tensor
) -> None:
    model = our_model(family, "ForImageClassification", num_labels=num_labels, problem_type=problem_type).train()
    output = model(images(), labels=labels)
    if problem_type == "single_label_classification":
        expected = F.cross_entropy(output.logits, labels)
    elif problem_type == "regression":
        expected = (output.logits.flatten() - labels.flatten()).square().mean()
    else:
        expected = F.binary_cross_entropy(output.logits.sigmoid(), labels.float())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.classifier.parameters())


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([1, 3])),
        ("regression", torch.linspace(-1, 1, 10).view(2, 5)),
        ("multi_label_classification", torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 1, 1]])),
    ],
)
def test_the_loss_can_be_divided_by_the_items_of_several_batches(
    family: str, problem_type: str, labels: torch.Tensor
) -> None:
    model = our_model(family, "ForImageClassification", problem_type=problem_type)
    mean = model(images(), labels=labels).loss
    total = mean * labels.numel()
    for items in (3, torch.tensor(3)):
        torch.testing.assert_close(model(images(), labels=labels, num_items_in_batch=items).loss, total / 3)


# Compilation.


@pytest.mark.slow
@EVERY_FAMILY
@COMPILED
def test_a_compiled_model_trains_as_the_plain_one(family: str, kind: str, backend: str) -> None:
    model = our_model(family, kind).train()
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = {name.removeprefix("_orig_mod."): value for name, value in gradients(compiled).items()}
    assert set(found) == set(expected)
    assert difference(list(found.values()), list(expected.values())) < 1e-5


# Adapters.


@EVERY_CLASS
@REENTRANT
def test_adapters_train_with_gradient_checkpointing_on_and_off(
    family: str, kind: str, use_reentrant: bool | None
) -> None:
    peft = pytest.importorskip("peft")
    model = our_model(family, kind).train()
    options = {} if use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpoint_gradients(model, **options)
    settings = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    found = gradients(adapted)
    adapted.base_model.gradient_checkpointing_disable()
    assert not any(checkpointing(model))
    expected = gradients(adapted)
    assert len(expected) == 2 * 2 * 2
    assert all("lora_" in name for name in expected)
    assert difference(list(found.values()), list(expected.values())) < 1e-6
