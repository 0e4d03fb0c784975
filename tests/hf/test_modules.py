"""What users replace, patch or hook within a model acts: every part is called as a module."""

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dinov2.hf as hf
from dinov2.hf.layers import ALL_ATTENTION_FUNCTIONS
from tests.hf.common_cases import EVERY_FAMILY
from tests.hf.model_cases import difference, images, our_model, settings, stock_and_ours


class Zero(nn.Module):
    """Takes the place of a module and gives zeros of the right shape."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.replaced = replaced

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.replaced(x)
        return output * 0


PARTS = [
    "embeddings.patch_embeddings.projection",
    "embeddings.patch_embeddings",
    "embeddings.dropout",
    "encoder.layer.1.norm1",
    "encoder.layer.1.attention.attention.query",
    "encoder.layer.1.attention.attention.key",
    "encoder.layer.1.attention.attention.value",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.1.attention.output.dropout",
    "encoder.layer.1.layer_scale1",
    "encoder.layer.1.drop_path",
    "encoder.layer.1.norm2",
    "encoder.layer.1.mlp",
    "encoder.layer.1.layer_scale2",
    "layernorm",
]
NETWORK_PARTS = {
    False: ["encoder.layer.1.mlp.fc1", "encoder.layer.1.mlp.activation", "encoder.layer.1.mlp.fc2"],
    True: ["encoder.layer.1.mlp.weights_in", "encoder.layer.1.mlp.weights_out"],
}
EVERY_PART = pytest.mark.parametrize(
    ("part", "swiglu"),
    [
        *((part, False) for part in PARTS),
        *((part, swiglu) for swiglu in NETWORK_PARTS for part in NETWORK_PARTS[swiglu]),
    ],
)


@EVERY_FAMILY
@EVERY_PART
@pytest.mark.parametrize("training", [False, True])
def test_a_replaced_part_acts(family: str, part: str, swiglu: bool, training: bool) -> None:
    model = our_model(family, "Model", use_swiglu_ffn=swiglu).train(training)
    with torch.no_grad():
        before = model(images())[0]
        model.set_submodule(part, Zero(model.get_submodule(part)))
        assert difference(model(images())[0], before) > 1e-4


@EVERY_FAMILY
@EVERY_PART
def test_hooks_see_every_part_in_both_directions(family: str, part: str, swiglu: bool) -> None:
    model = our_model(family, "Model", use_swiglu_ffn=swiglu)
    seen: list[str] = []
    module = model.get_submodule(part)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    with torch.no_grad():
        model(images())
    calls = 2 if part.endswith("drop_path") else 1  # one for each branch
    assert seen == ["before", "after"] * calls
    seen.clear()
    module.register_full_backward_hook(lambda *_: seen.append("gradient"))
    model(images().requires_grad_())[0].square().sum().backward()
    assert seen == ["before", "after"] * calls + ["gradient"] * calls


@EVERY_FAMILY
def test_a_backward_hook_alone_sees_the_projection(family: str) -> None:
    model = our_model(family, "Model")
    seen: list[torch.Size] = []
    projection = model.embeddings.patch_embeddings.projection
    projection.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0].shape))
    model(images().requires_grad_())[0].sum().backward()
    assert seen == [torch.Size([2, 32, 5, 7])]


@EVERY_FAMILY
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.Identity, nn.LayerNorm])
def test_a_class_whose_forward_is_patched_is_called(
    family: str, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(family, "Model")
    expected, original, calls = model(images())[0], kind.forward, []
    monkeypatch.setattr(kind, "forward", lambda self, x: (calls.append(self), original(self, x))[1])
    with torch.no_grad():
        assert difference(model(images())[0], expected) < 1e-5
    called = {id(module) for module in calls}
    assert called == {id(module) for module in model.modules() if type(module) is kind}
    assert called


@EVERY_FAMILY
@pytest.mark.parametrize("part", ["LayerScale", "DropPath", "MLP", "SelfAttention", "Embeddings", "Encoder"])
def test_one_of_our_classes_whose_forward_is_patched_is_called(
    family: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(family, "Model", drop_path_rate=0.1)
    kind, calls = getattr(hf, "Dinov2" + part if part == "Encoder" else family + part, None), []
    kind = kind or getattr(hf, "Dinov2" + part)
    original = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    with torch.no_grad():
        model(images())
    assert {id(module) for module in calls} == {id(module) for module in model.modules() if isinstance(module, kind)}


@EVERY_FAMILY
def test_hooks_for_all_modules_see_every_part(family: str) -> None:
    model, seen = our_model(family, "Model"), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(id(module)))
    with torch.no_grad():
        model(images())
    handle.remove()
    assert {name for name, module in model.named_modules() if id(module) not in seen} == {"encoder.layer"}


@EVERY_FAMILY
def test_a_parametrised_weight_acts(family: str) -> None:
    model = our_model(family, "Model")
    before = model(images())[0]
    layer = model.encoder.layer[1]
    for module, name in ((layer.mlp.fc1, "weight"), (layer.layer_scale1, "lambda1"), (layer.norm1, "weight")):
        parametrize.register_parametrization(module, name, nn.Identity())
        with torch.no_grad():
            assert difference(model(images())[0], before) < 1e-5
        parametrize.register_parametrization(module, name, nn.Tanh())
        with torch.no_grad():
            changed = model(images())[0]
        assert difference(changed, before) > 1e-5
        before = changed


@EVERY_FAMILY
@pytest.mark.parametrize("kind", ["Model", "ForImageClassification", "Backbone"])
def test_the_encoder_is_called_and_its_forward_may_be_replaced(family: str, kind: str) -> None:
    model = our_model(family, kind)
    encoder, seen = model.base_model.encoder, []
    encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.last_hidden_state.shape))
    before = model(images(), return_dict=False)[0]
    n_tokens = 36 + model.n_registers
    assert seen == [torch.Size([2, n_tokens, 32])]
    original = encoder.forward
    encoder.forward = lambda tokens, **options: original(tokens * 0, **options)
    after = model(images(), return_dict=False)[0]
    assert difference(after, before) > 1e-3


@EVERY_FAMILY
@pytest.mark.parametrize("output_attentions", [False, True])
def test_a_block_gives_tokens_to_hooks_and_to_direct_calls(family: str, output_attentions: bool) -> None:
    model = our_model(family, "Model")
    seen: list[Any] = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = model(images(), output_hidden_states=True, output_attentions=output_attentions)
    assert difference(tuple(seen), output.hidden_states[1:]) == 0
    tokens = output.hidden_states[0]
    assert difference(model.encoder.layer[0](tokens), output.hidden_states[1]) < 1e-5
    assert difference(model.encoder(tokens).last_hidden_state, output.hidden_states[-1]) < 1e-5
    # A hook that changes what a block gives out changes all that follows.
    model.encoder.layer[0].register_forward_hook(lambda _module, _inputs, tokens: tokens * 0)
    assert not model(images(), output_hidden_states=True).hidden_states[1].any()


@EVERY_FAMILY
def test_blocks_of_users_need_to_know_tokens_alone(family: str) -> None:
    model = our_model(family, "Model")
    model.encoder.layer[0] = nn.Identity()
    output = model(images(), output_hidden_states=True)
    assert difference(output.hidden_states[0], output.hidden_states[1]) == 0
    backbone = our_model(family, "Backbone", out_indices=[1, 2])
    backbone.encoder.layer[1] = nn.Identity()
    assert difference(*backbone(images()).feature_maps) == 0


@EVERY_FAMILY
def test_drop_path_of_timm_drops_whole_branches_in_training(family: str) -> None:
    timm = pytest.importorskip("timm.layers")
    model = our_model(family, "Model")
    expected = model(images(1))[0]
    for layer in model.encoder.layer:
        layer.drop_path = timm.DropPath(0.5).eval()
    assert difference(model(images(1))[0], expected) < 1e-5
    found = model.train()(images(1).expand(50, -1, -1, -1))[0]
    assert found.std(dim=0).max() > 1e-2
    for layer in model.encoder.layer:
        layer.drop_path = timm.DropPath(1.0)
    tokens = model.embeddings(images(1))
    assert difference(model(images(1))[0], model.layernorm(tokens)) < 1e-5


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((4, 4), (0, 0), (1, 1)), (4, 2, (1, 1)), ((8, 8), (3, 3), (1, 1)), ((3, 5), "valid", (2, 2))],
)
def test_the_projection_may_have_another_stride_padding_and_dilation(
    family: str, stride: Any, padding: Any, dilation: Any
) -> None:
    model, backbone = our_model(family, "Model"), our_model(family, "Backbone")
    for one in (model, backbone):
        projection = one.embeddings.patch_embeddings.projection
        projection.stride, projection.padding, projection.dilation = stride, padding, dilation
    expected = F.conv2d(images(), projection.weight, projection.bias, stride, padding, dilation)
    patches = model.embeddings.patch_embeddings(images())
    assert difference(backbone.embeddings.patch_embeddings(images()), expected.flatten(2).transpose(1, 2)) < 1e-4
    assert patches.shape[1] == expected.shape[2] * expected.shape[3]
    assert model(images())[0].shape == (2, 1 + model.n_registers + patches.shape[1], 32)
    assert backbone(images()).feature_maps[0].shape == (2, 32, *expected.shape[2:])
    (model(images())[0] * torch.randn(32)).sum().backward()


@EVERY_FAMILY
def test_an_adapter_on_the_projection_and_a_wrapper_around_it_act(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = our_model(family, "Model")
    expected = model(images())[0]
    model.embeddings.patch_embeddings.projection = nn.Sequential(model.embeddings.patch_embeddings.projection)
    assert difference(model(images())[0], expected) < 1e-5
    config = peft.LoraConfig(r=2, target_modules=["projection"], init_lora_weights=False)
    adapted = peft.get_peft_model(our_model(family, "Model"), config).eval()
    assert difference(adapted(images())[0], expected) > 1e-3
    adapted(images())[0].sum().backward()
    assert all(one.grad is not None for name, one in adapted.named_parameters() if "lora" in name)
    assert difference(adapted.merge_and_unload()(images())[0], adapted(images())[0]) < 1e-4


@EVERY_FAMILY
def test_position_embeddings_are_asked_for_by_the_method_that_stock_has(family: str) -> None:
    model, seen = our_model(family, "Model"), []
    before = model(images())[0]

    def interpolate(_self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
        seen.append((tuple(embeddings.shape), height, width))
        return torch.zeros(1, embeddings.shape[1], 32)

    model.embeddings.interpolate_pos_encoding = types.MethodType(interpolate, model.embeddings)
    without = model(images())[0]
    assert seen == [((2, 36, 32), 40, 56)]
    assert difference(without, before) > 1e-3
    del model.embeddings.interpolate_pos_encoding
    model.embeddings.position_embeddings = None
    assert difference(model(images())[0], without) == 0


@EVERY_FAMILY
@pytest.mark.parametrize("size", [(56, 56), (32, 32), (40, 56)])
def test_position_embeddings_of_another_grid_are_read_off_the_tensor(family: str, size: tuple[int, int]) -> None:
    found = []
    for model in stock_and_ours(family, "Model"):
        generator = torch.Generator().manual_seed(1)
        model.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 50, 32, generator=generator))
        with torch.no_grad():
            found.append(model(images(2, *size))[0])
    assert difference(*found) < 1e-5
    model.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 52, 32))
    with pytest.raises(ValueError, match="has 51 patches, which is neither the grid 4 x 4 of the config nor a square"):
        model(images())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_position_embeddings_of_another_grid_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = our_model("Dinov2", "Model", return_dict=False)
    model.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 50, 32))
    traced = torch.jit.trace(model, [images(1, 32, 32)])
    with torch.no_grad():
        assert difference(traced(images(2, 40, 56)), model(images(2, 40, 56))) < 1e-4


@EVERY_FAMILY
def test_the_scale_of_the_scores_may_be_changed(family: str) -> None:
    theirs, ours = stock_and_ours(family, "Model")
    for model in (theirs, ours):
        for module in model.modules():
            if hasattr(module, "scaling"):
                module.scaling = 0.05
    for told in ({}, {"output_attentions": True}):
        assert difference(theirs(images()).last_hidden_state, ours(images(), **told).last_hidden_state) < 1e-5
    assert difference(ours(images())[0], our_model(family, "Model")(images())[0]) > 1e-4


def uniform(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Attention that weighs all tokens alike."""
    weights = torch.full((*query.shape[:3], key.shape[2]), 1 / key.shape[2])
    return (weights @ value).transpose(1, 2), weights


@EVERY_FAMILY
@pytest.mark.parametrize("name", ["uniform", "sdpa"])
def test_a_registered_attention_function_acts_also_where_weights_are_returned(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(family, "Model")
    plain = model(images())[0]
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, name, uniform)
    model.set_attn_implementation(name)
    found = model(images(), output_attentions=True)
    assert difference(found.last_hidden_state, plain) > 1e-4
    assert difference(found.last_hidden_state, model(images()).last_hidden_state) == 0
    assert all((one == one[0, 0, 0, 0]).all() for one in found.attentions)


@EVERY_FAMILY
def test_a_loss_function_of_the_user_is_called_as_in_transformers(family: str) -> None:
    model = our_model(family, "ForImageClassification")
    model.loss_function = lambda labels, logits, config, **kwargs: logits.sum() * 0 + labels.sum() + config.num_labels
    assert model(images(), labels=torch.tensor([1, 3])).loss.item() == 9


def test_registers_of_which_there_are_none_have_a_gradient() -> None:
    model = our_model("Dinov2WithRegisters", "Model", num_register_tokens=0).train()
    model(images())[0].sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_backbone_says_how_many_registers_it_has() -> None:
    assert our_model("Dinov2WithRegisters", "Backbone", num_register_tokens=3).num_register_tokens == 3


def test_a_number_of_registers_in_the_config_of_the_plain_family_means_nothing() -> None:
    model = our_model("Dinov2", "Model", num_register_tokens=4)
    assert model(images())[0].shape[1] == 36
    assert not hasattr(model.embeddings, "register_tokens")


@EVERY_FAMILY
@pytest.mark.parametrize("kind", ["Model", "ForImageClassification", "Backbone"])
def test_a_config_object_of_transformers_works_in_our_classes(family: str, kind: str, tmp_path: Any) -> None:
    config = getattr(transformers, family + "Config")(**settings(family))
    model = getattr(hf, family + kind)(config).eval()
    assert model.config is config
    x = images()
    with torch.no_grad():
        expected = model(x, return_dict=False)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, config=config)
        assert difference(again(x, return_dict=False), expected) < 1e-6
        again = getattr(hf, family + kind).from_pretrained(tmp_path, config=model.config)
        assert difference(again(x, return_dict=False), expected) < 1e-6
