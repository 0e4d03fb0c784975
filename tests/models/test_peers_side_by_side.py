"""The same weights in this package, in `transformers` and in `timm`: equal tokens, in both directions.

Away from the native size each library resizes positions by a rule of its own; with that rule selected here, tokens are
equal there too.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.checkpoints.adapters import from_original, to_original
from dinov2.checkpoints.adapters.huggingface import huggingface_config
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.open import open_checkpoint
from dinov2.models.config import BackboneConfig
from dinov2.models.heads import linear_logits
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small
from tests.checkpoints.test_adapters import NAMES, released
from tests.golden.recipe import fill, images
from tests.models.tiny_backbones import RULES, all_tokens, huggingface_folder, tiny

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"num_register_tokens": 4},
    "swiglu": {"ffn_layer": "swiglufused"},
    "swiglu with registers": {"ffn_layer": "swiglufused", "num_register_tokens": 4},
}
NATIVE, OTHER = (98, 98), (70, 126)
# What the newest release of each library does at sizes that are not native.
THEIR_RULE = {
    ("transformers", False): {"interpolate_offset": 0.0, "interpolate_antialias": False},
    ("transformers", True): {"interpolate_offset": 0.0, "interpolate_antialias": True},
    ("timm", False): {"interpolate_offset": 0.0, "interpolate_antialias": True},
    ("timm", True): {"interpolate_offset": 0.0, "interpolate_antialias": True},
}


@pytest.fixture(autouse=True)
def _no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def stock_transformers(folder: Path, model: DinoVisionTransformer) -> nn.Module:
    peer, report = transformers.AutoModel.from_pretrained(huggingface_folder(folder, model), output_loading_info=True)
    assert not any(report.values()), report
    return peer.eval()


def empty_timm(model: DinoVisionTransformer, **changes: Any) -> nn.Module:
    """timm's class in the same size, with weights of its own."""
    table = BackboneConfig.from_model(model).table()
    gated = table["ffn_layer"] == "swiglufused"
    inner = model.blocks[0].mlp.w12 if gated else model.blocks[0].mlp.fc1
    options = {
        "img_size": tuple(table["img_size"]),
        "patch_size": table["patch_size"],
        "embed_dim": table["embed_dim"],
        "depth": table["depth"],
        "num_heads": table["num_heads"],
        "mlp_ratio": inner.out_features / table["embed_dim"],
        "mlp_layer": timm.layers.SwiGLUPacked if gated else timm.layers.Mlp,
        "act_layer": nn.SiLU if gated else nn.GELU,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "init_values": 1.0,
        "num_classes": 0,
        "reg_tokens": table["num_register_tokens"],
        "no_embed_class": bool(table["num_register_tokens"]),
        **changes,
    }
    return timm.models.vision_transformer.VisionTransformer(**options).eval()


def stock_timm(model: DinoVisionTransformer, **changes: Any) -> nn.Module:
    peer = empty_timm(model, **changes)
    peer.load_state_dict(from_original(model.state_dict(), "timm").state, strict=True)
    return peer


def tokens_of(peer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return peer.forward_features(x) if hasattr(peer, "forward_features") else peer(x).last_hidden_state


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_in_transformers_gives_the_same_tokens(tmp_path, kind):
    model = tiny(**KINDS[kind])
    peer = stock_transformers(tmp_path / "m", model)
    assert_same(all_tokens(model, images(2, *NATIVE)), tokens_of(peer, images(2, *NATIVE)))
    theirs = tiny(**KINDS[kind], **THEIR_RULE["transformers", bool(model.num_register_tokens)])
    assert_same(all_tokens(theirs, images(1, *OTHER)), tokens_of(peer, images(1, *OTHER)))


@pytest.mark.parametrize("kind", KINDS)
def test_ours_in_timm_gives_the_same_tokens(kind):
    model = tiny(**KINDS[kind])
    assert_same(all_tokens(model, images(2, *NATIVE)), tokens_of(stock_timm(model), images(2, *NATIVE)))
    theirs = tiny(**KINDS[kind], **THEIR_RULE["timm", bool(model.num_register_tokens)])
    peer = stock_timm(model, dynamic_img_size=True)
    assert_same(all_tokens(theirs, images(1, *OTHER)), tokens_of(peer, images(1, *OTHER)))


def test_the_rules_of_models_without_registers_differ_away_from_the_native_size(tmp_path):
    """Else selecting the library's rule above would prove nothing."""
    model, x = tiny(), images(1, *OTHER)
    for peer in (stock_transformers(tmp_path / "m", model), stock_timm(model, dynamic_img_size=True)):
        assert (all_tokens(model, x) - tokens_of(peer, x)).abs().max() > 1e-3


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_weights_that_transformers_made_and_saved_give_the_same_tokens_here(tmp_path, registers, swiglu):
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=98, patch_size=14, use_swiglu_ffn=swiglu
    )
    torch.manual_seed(3)
    peer = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    peer.save_pretrained(tmp_path / "m")
    opened = open_checkpoint(tmp_path / "m")
    assert opened.layout == "hf" and opened.config.num_heads == 2  # which no tensor tells
    model = opened.config.build().eval()
    load_into(model, opened.state)
    assert_same(all_tokens(model, images(2, *NATIVE)), tokens_of(peer, images(2, *NATIVE)))
    # The same tensors from memory, under the names that the library uses there.
    again = opened.config.build().eval()
    load_into(again, peer.state_dict())
    assert torch.equal(all_tokens(again, images(1, *NATIVE)), all_tokens(model, images(1, *NATIVE)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_timm_made_give_the_same_tokens_here(kind):
    model = tiny(**KINDS[kind])
    torch.manual_seed(3)
    peer = empty_timm(model)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    report = load_into(model, peer.state_dict())
    assert "mask_token: zeros, the source has none" in report.notes
    assert_same(all_tokens(model, images(2, *NATIVE)), tokens_of(peer, images(2, *NATIVE)))


@pytest.mark.parametrize("registers", [0, 4])
def test_classifiers_give_the_same_logits_in_transformers(tmp_path, registers):
    model = tiny(num_register_tokens=registers)
    head = {"weight": torch.randn(7, 128) / 11, "bias": torch.randn(7)}
    folder = huggingface_folder(tmp_path / "m", model, head=head)
    peer = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    ours = head_from_state(open_checkpoint(folder).head, embed_dim=64)
    x = images(2, *NATIVE)
    with torch.no_grad():
        assert_same(linear_logits(model, ours, x), peer(x).logits)
    assert peer.config.id2label[3] == "class 3"


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_classes_of_every_released_size_hold_exactly_these_tensors(name):
    """Built without memory from the configuration that is written, and by timm's own name."""
    state = released(name)
    config = huggingface_config(BackboneConfig.from_state_dict(state))
    family = "Dinov2WithRegisters" if "_reg" in name else "Dinov2"
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[name[3]]
    with torch.device("meta"):
        stock = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config").from_dict(config))
        named = timm.create_model(f"vit_{size}_patch14{'_reg4' if '_reg' in name else ''}_dinov2", pretrained=False)
    assert shapes(to_original(stock.state_dict(), "hf").state) == shapes(state)
    assert shapes(from_original(state, "timm").state) == shapes(named.state_dict())
    assert shapes(to_original(named.state_dict(), "timm").state) == shapes(state)


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
def test_a_vit_small_with_the_released_grid_gives_the_same_tokens_everywhere(tmp_path, registers):
    model = fill(
        vit_small(
            patch_size=14, num_register_tokens=registers, img_size=518, init_values=1.0, block_chunks=0,
            **RULES[bool(registers)],
        )
    ).eval()  # fmt: skip
    in_timm = stock_timm(model, dynamic_img_size=True)
    for name, peer in (("transformers", stock_transformers(tmp_path / "m", model)), ("timm", in_timm)):
        assert_same(all_tokens(model, images(1, 518, 518)), tokens_of(peer, images(1, 518, 518)))
        rule = THEIR_RULE[name, bool(registers)]
        model.interpolate_offset = rule["interpolate_offset"]
        model.interpolate_antialias = rule["interpolate_antialias"]
        assert_same(all_tokens(model, images(1, 224, 280)), tokens_of(peer, images(1, 224, 280)))
