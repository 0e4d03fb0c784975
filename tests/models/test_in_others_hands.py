"""What users put into a backbone, hook into it or patch takes effect, as with the release's modules."""

import copy
import math
import os
import types

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

from dinov2.layers import Attention, Block, MemEffAttention, NestedTensorBlock, PatchEmbed, SwiGLUFFN
from dinov2.layers.patch_embed import make_2tuple
from dinov2.layers.swiglu_ffn import SwiGLU
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_nano


def tiny(**options) -> DinoVisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "block_chunks": 0}
    return DinoVisionTransformer(**{**sizes, "init_values": 0.1, **options}).eval()


def images(batch: int = 2, side: int = 56, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Module):
    """A wrapper that shows the attributes of what it wraps, and changes the result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.inner(x)


class LoRA(nn.Module):
    """A low-rank adapter around a linear layer or a convolution."""

    def __init__(self, inner: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner
        self.down = copy.deepcopy(inner)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.scale * self.down(x)


def with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold parameters of their own."""
    return {name: m for name, m in model.named_modules() if list(m.parameters(recurse=False))}


def calls(model: nn.Module, run) -> dict[str, int]:
    counts = dict.fromkeys(with_parameters(model), 0)
    handles = []
    for name, module in with_parameters(model).items():

        def count(*_, name=name):
            counts[name] += 1

        handles.append(module.register_forward_hook(count))
    run()
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("options", [{}, {"block_chunks": 2}, {"ffn_layer": "swiglufused", "num_register_tokens": 2}])
@pytest.mark.parametrize("mode", ["inference", "gradients", "training", "list"])
def test_hooks_fire_on_every_module_with_parameters(options, mode):
    model = tiny(drop_path_rate=0.3, **options)

    def run():
        if mode == "inference":
            with torch.inference_mode():
                model(images())
        elif mode == "list":
            model.train()([images(), images(4, 28)])
        else:
            model.train(mode == "training")(images())

    counts = calls(model, run)
    assert len(counts) > 10
    expected = dict.fromkeys(counts, 1)
    if mode == "list":  # every size is cut into patches by itself
        expected["patch_embed.proj"] = 2
    assert counts == expected


@pytest.mark.parametrize("name", "patch_embed.proj blocks.0.attn.qkv blocks.1.attn.proj blocks.0.mlp.fc1".split())
@pytest.mark.parametrize("wrapper", [Scaled, LoRA])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_wrapped_layer_changes_the_output_and_is_trained(name, wrapper, gradients):
    model = tiny()
    with torch.set_grad_enabled(gradients):
        before = model(images())
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, wrapper(model.get_submodule(name)))
        after = model(images())
    assert not torch.allclose(before, after, atol=1e-4)
    if gradients and wrapper is LoRA:
        (after * torch.randn_like(after)).sum().backward()
        assert model.get_submodule(name).scale.grad.abs() > 0


@pytest.mark.parametrize("channels", [1, 4])
def test_the_first_layer_may_be_replaced_for_other_channels(channels):
    model = tiny()
    model.patch_embed.proj = nn.Conv2d(channels, 32, 14, 14)
    assert model(images(channels=channels)).shape == (2, 32)
    with pytest.raises(ValueError, match=f"built for in_chans={channels}"):
        model(images(channels=2))
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj)
    assert model(images(channels=channels)).shape == (2, 32)


def test_a_patched_interpolation_of_positions_is_used():
    model = tiny()
    before = model.prepare_tokens_with_masks(images())
    model.interpolate_pos_encoding = lambda x, w, h: 5 * torch.ones(1, x.shape[1], x.shape[2])
    assert_close(model.prepare_tokens_with_masks(images()), before - model.pos_embed + 5)


def test_positions_of_another_grid_may_be_put_in_place():
    model = tiny()
    model.pos_embed = nn.Parameter(torch.randn(1, 1 + 6 * 6, 32))
    at_native_size = model.interpolate_pos_encoding(torch.zeros(1, 37, 32), 84, 84)
    assert_close(at_native_size, model.pos_embed)
    assert model(images()).shape == (2, 32)


def test_a_smaller_stride_gives_denser_patches():
    model = tiny()
    model.set_stride(7)
    features = model.forward_features(images())
    assert features["x_norm_patchtokens"].shape == (2, 49, 32)
    (layer,) = model.get_intermediate_layers(images(), 1, reshape=True)
    assert layer.shape == (2, 32, 7, 7)
    assert_close(layer.flatten(2).mT, features["x_norm_patchtokens"])
    # Every second patch is one of the coarse grid.
    coarse, dense = tiny().patch_embed(images()), model.patch_embed(images())
    assert_close(dense.unflatten(1, (7, 7))[:, ::2, ::2].flatten(1, 2), coarse, atol=1e-5, rtol=1e-5)
    model.set_stride(14)
    assert_close(model(images()), tiny()(images()))
    for stride in (0, 3, 28):
        with pytest.raises(ValueError, match="divisor of the patch size, one of 1, 2, 7, 14"):
            model.set_stride(stride)


def test_a_stride_set_on_the_projection_by_hand_is_heeded_with_positions_of_ones_own():
    model = tiny()
    model.patch_embed.proj.stride = (7, 7)

    def positions(self, x, w, h):
        n = math.isqrt(self.pos_embed.shape[1] - 1)
        grid = self.pos_embed[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
        size = (1 + (w - 14) // 7, 1 + (h - 14) // 7)
        grid = nn.functional.interpolate(grid, size=size, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    own = copy.deepcopy(model)
    own.interpolate_pos_encoding = types.MethodType(positions, own)
    for changed in (model, own):
        assert changed.forward_features(images())["x_norm_patchtokens"].shape[1] == 49


def test_a_hook_on_attention_dropout_sees_the_weights():
    model, seen = tiny(num_register_tokens=1), []
    before = model(images())
    handle = model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_close(model(images()), before, atol=1e-5, rtol=1e-5)
    (weights,) = seen
    assert weights.shape == (2, 2, 18, 18)
    assert_close(weights.sum(-1), torch.ones(2, 2, 18))
    handle.remove()
    model.blocks[-1].attn.attn_drop = nn.Threshold(0.06, 0.0)
    assert not torch.allclose(model(images()), before, atol=1e-5)


def test_a_drop_path_of_ones_own_takes_effect():
    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    model = tiny()
    for block in model.blocks:
        block.drop_path1 = block.drop_path2 = Zero()
    tokens = model.prepare_tokens_with_masks(images())
    for run in (model.eval(), model.train()):
        assert_close(run(images()), model.norm(tokens)[:, 0])
        assert_close(run([images()])[0], model.norm(tokens)[:, 0])


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_blocks_may_be_called_by_hand(chunks):
    model = tiny(block_chunks=chunks)
    x = model.prepare_tokens_with_masks(images())
    for block in model.blocks:
        x = block(x)
    assert_close(model.norm(x)[:, 0], model(images()))


def test_names_of_the_release_are_the_same_classes():
    model = vit_nano(img_size=56, patch_size=14, block_chunks=0)
    assert all(isinstance(block, NestedTensorBlock) for block in model.blocks)
    assert all(isinstance(block.attn, MemEffAttention) for block in model.blocks)
    assert model.blocks[0].attn.dim == 128
    model.blocks[0].attn.init_weights(init_attn_std=0.5)
    assert abs(model.blocks[0].attn.proj.weight.std().item() - 0.5) < 0.02
    assert SwiGLU is SwiGLUFFN
    assert make_2tuple(14) == make_2tuple((14, 14)) == (14, 14)
    assert PatchEmbed(28, 14, embed_dim=8).flops() == 4 * 8 * (3 * 14 * 14 + 1)
    lists = [images(), images(1, 28)]
    for one, other in zip(model.forward_features_list(lists, [None, None]), model.forward_features(lists), strict=True):
        assert_close(one["x_prenorm"], other["x_prenorm"])
    pair = DinoVisionTransformer(img_size=56, patch_size=(14, 14), embed_dim=32, depth=1, num_heads=2)
    assert pair.patch_size == 14 and pair(images(side=28)).shape == (2, 32)


def test_attention_takes_a_bias_or_looks_back_only():
    attention = Attention(32, 2, qkv_bias=True).eval()
    x = torch.randn(2, 5, 32)
    assert_close(attention(x, attn_bias=None), attention(x))
    causal = attention(x, is_causal=True)
    assert_close(causal[:, :3], attention(x[:, :3], is_causal=True), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(causal, attention(x))
    bias = torch.zeros(5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    assert_close(attention(x, attn_bias=bias), causal, atol=1e-6, rtol=1e-5)
    with pytest.raises(TypeError, match="attn_bias is a object; give a tensor"):
        attention(x, attn_bias=object())
    with pytest.raises(ValueError, match="give no attn_bias with a layout"):
        attention(x.flatten(0, 1), ((2, 5),), is_causal=True)


class OwnBlock(nn.Module):
    """A block with the release's constructor and no more than a tensor in its call."""

    def __init__(
        self, dim, num_heads, mlp_ratio, qkv_bias, proj_bias, ffn_bias, drop_path, norm_layer, act_layer, ffn_layer,
        init_values,
    ):  # fmt: skip
        super().__init__()
        self.norm = norm_layer(dim)

    def forward(self, x):
        return x + self.norm(x)


class OwnEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class OwnAttention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x):
        return self.mix(x.mean(dim=1, keepdim=True)).expand_as(x)


@pytest.mark.parametrize(
    "options",
    [
        {"block_fn": OwnBlock},
        {"embed_layer": OwnEmbed},
        {"block_fn": lambda **arguments: Block(attn_class=OwnAttention, **arguments), "drop_path_rate": 0.5},
    ],
    ids=["block", "embedding", "attention"],
)
@pytest.mark.parametrize("chunks", [0, 2])
def test_modules_of_ones_own_are_built_in(options, chunks):
    model = tiny(block_chunks=chunks, **options)
    alone = [model(images()), model(images(3, 28))]
    for one, other in zip(model([images(), images(3, 28)]), alone, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)
    model.train()([images(), images(3, 28)])[0].sum().backward()
    assert len(model.get_intermediate_layers(images(), 2)) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_wrapped_and_compiled_blocks_take_effect_with_equal_gradients(rate):
    def gradients(model: DinoVisionTransformer) -> list[Tensor]:
        torch.manual_seed(3)
        outputs = model.train()([images(4), images(4, 28)])
        sum(output.square().sum() for output in outputs).backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(tiny(drop_path_rate=rate))
    wrapped = tiny(drop_path_rate=rate)
    for index, block in enumerate(wrapped.blocks):
        wrapped.blocks[index] = checkpoint_wrapper(block)
    assert_close(gradients(wrapped), expected, atol=1e-6, rtol=1e-6)
    compiled, graphs = tiny(drop_path_rate=rate), []
    for block in compiled.blocks:
        block.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert_close(gradients(compiled), expected, atol=1e-5, rtol=1e-5)
    assert graphs


def test_a_backbone_trains_under_data_parallelism(monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for registers in (0, 2):
            model = nn.parallel.DistributedDataParallel(tiny(num_register_tokens=registers).train())
            for _ in range(3):
                model(images()).square().sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_a_pickle_and_a_scripted_state_keep_what_was_set(tmp_path):
    model = tiny()
    model.set_stride(7)
    torch.save(model, tmp_path / "whole.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert_close(other(images()), model(images()))


@pytest.mark.parametrize(
    "run, sentence",
    [
        (lambda m: m(torch.randn(3, 56, 56)), r"images have the shape \[3, 56, 56\]; give \[B, C, H, W\]"),
        (lambda m: m(torch.zeros(1, 3, 56, 56, dtype=torch.uint8)), "images are torch.uint8; give normalised"),
        (lambda m: m(images(), torch.zeros(2, 15, dtype=torch.bool)), r"the shape \[2, 15\]; give booleans \[B, N\]"),
        (lambda m: m(images(), torch.zeros(2, 16)), r"masks are torch.float32 .* \[2, 16\]"),
        (lambda m: m([images()], [torch.zeros(1, 16, dtype=torch.bool)]), r"give booleans \[B, N\] = \[2, 16\]"),
    ],
)
def test_wrong_inputs_are_named(run, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(tiny())


@pytest.mark.parametrize("strict", [True, False])
def test_positions_of_another_image_size_name_the_argument_to_give(strict):
    weights = tiny(img_size=70).state_dict()
    with pytest.raises(RuntimeError, match="positions of 25 patches, this model has 16: build it with img_size=70"):
        tiny().load_state_dict(weights, strict=strict)
    with pytest.raises(RuntimeError, match=r"img_size=\(height, width\)"):
        tiny().load_state_dict(tiny(img_size=(56, 70)).state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        tiny().load_state_dict(tiny(embed_dim=64).state_dict(), strict=strict)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_trace_with_gradients_on_passes_its_own_check():
    traced = torch.jit.trace(tiny(), images())
    assert_close(traced(images(1)), tiny()(images(1)), atol=1e-5, rtol=1e-5)
