"""Models of other libraries behind the adapter, against what those libraries say themselves."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2.data.eval_transform import EvalTransform
from dinov2.encode.external_models import _Timm, is_external_model, load_external_model
from dinov2.encode.tokens import backbone_tokens
from dinov2.errors import ConfigError, MissingDependency, WeightsError
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill, images

timm_or_skip = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
hf_or_skip = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    "source, answer",
    [
        ("timm:vit_tiny_patch16_224", True),
        ("hf:facebook/dinov2-small", True),
        ("my.module:build", True),
        ("dinov2_vits14", False),
        ("https://example.org/w.pth", False),
        (r"C:\weights\w.pth", False),
        ("C:weights", False),
        ("runs/mine", False),
        ("ImageNet:split=TRAIN", False),
    ],
)
def test_a_peer_is_known_by_its_prefix(source, answer):
    assert is_external_model(source) is answer


@timm_or_skip
@torch.no_grad()
def test_a_transformer_of_timm_gives_its_tokens_and_layers():
    peer = load_external_model("timm:test_vit4?random")
    x = images(2, 160, 96)
    tokens = peer.tokens(x, layers=[0, -1])
    model = peer.model
    sequence = model.forward_features(x)
    assert (peer.patch_size, peer.n_blocks, peer.training) == (16, len(model.blocks), False)
    assert torch.equal(tokens.cls, sequence[:, 0])
    assert torch.equal(tokens.patches.flatten(1, 2), sequence[:, model.num_prefix_tokens :])
    assert tokens.patches.shape[1:3] == (10, 6)
    maps = model.get_intermediate_layers(x, n=[0], reshape=True, norm=True)[0]
    assert torch.allclose(tokens.layers[0].patches.permute(0, 3, 1, 2), maps, atol=1e-6)
    assert torch.allclose(tokens.layers[-1].patches, tokens.patches, atol=1e-6)
    assert torch.equal(peer(x), tokens.cls)


@timm_or_skip
@torch.no_grad()
def test_a_convolutional_network_of_timm_has_maps_and_no_registers():
    peer = load_external_model("timm:test_resnet?random")
    x = images(2, 96, 128)
    tokens = peer.tokens(x)
    assert torch.equal(tokens.patches, peer.model.forward_features(x).permute(0, 2, 3, 1))
    assert torch.allclose(tokens.cls, peer.model(x))
    assert tokens.registers.shape[1] == 0
    with pytest.raises(ConfigError, match="does not show the blocks"):
        peer.tokens(x, layers=[0])


@timm_or_skip
@torch.no_grad()
def test_maps_with_channels_last_are_turned():
    import timm

    sizes = {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **sizes)
    peer = _Timm(model.eval(), patch_size=32, transform=EvalTransform(crop_size=64))
    x = images(2, 64, 64)
    tokens = peer.tokens(x)
    assert torch.equal(tokens.patches, model.forward_features(x)) and tokens.patches.shape == (2, 2, 2, 768)
    assert torch.equal(tokens.cls, model(x))


@timm_or_skip
def test_the_transform_of_a_timm_model_is_its_own():
    import timm

    transform = load_external_model("timm:vit_small_patch14_reg4_dinov2?random").transform
    published = timm.get_pretrained_cfg("vit_small_patch14_reg4_dinov2")
    assert (transform.crop_size, transform.resize_size) == (518, 518)
    assert transform.mean == tuple(published.mean) and transform.patch_size == 14


@timm_or_skip
def test_a_name_that_timm_does_not_know_and_an_unknown_option_are_refused():
    with pytest.raises(WeightsError, match="timm has no model 'vit_enormous'"):
        load_external_model("timm:vit_enormous?random")
    with pytest.raises(ConfigError, match="timm:test_vit4[?]pretrained is not understood"):
        load_external_model("timm:test_vit4?pretrained")


@hf_or_skip
@torch.no_grad()
def test_a_folder_of_transformers_gives_the_tokens_of_its_model(tmp_path: Path):
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, num_register_tokens=3
    )
    model = Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    peer = load_external_model(f"hf:{tmp_path}")
    x = images(2, 32, 48)
    tokens = peer.tokens(x, layers=[0, 1])
    output = model(pixel_values=x, output_hidden_states=True)
    assert torch.allclose(tokens.cls, output.last_hidden_state[:, 0], atol=1e-6)
    assert torch.allclose(tokens.registers, output.last_hidden_state[:, 1:4], atol=1e-6)
    assert torch.allclose(tokens.patches.flatten(1, 2), output.last_hidden_state[:, 4:], atol=1e-6)
    assert torch.allclose(tokens.layers[1].patches, tokens.patches, atol=1e-6)
    assert not torch.allclose(tokens.layers[0].patches, tokens.patches, atol=1e-2)
    assert (peer.transform.crop_size, peer.transform.resize_size) == (32, 36)
    assert peer.transform.mean[0] == pytest.approx(0.48145466)
    with pytest.raises(ConfigError, match="there is no block 2"):
        peer.tokens(x, layers=[2])


@hf_or_skip
def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="transformers cannot load"):
        load_external_model(f"hf:{tmp_path}")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "from dinov2.models.vision_transformer import DinoVisionTransformer\n"
        "def ours():\n"
        "    return DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)\n"
        "class Mean(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.mean(dim=(2, 3))\n"
        "def mean():\n    return Mean()\n"
        "def number():\n    return 3\n"
        "def broken():\n    return nn.Flatten(0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_models", None)


@torch.no_grad()
def test_a_function_of_yours_gives_a_model(module):
    peer = load_external_model("my_models:ours")
    fill(peer.model)
    x = images(2, 32, 16)
    assert torch.equal(peer.model(x), peer(x))
    mean = load_external_model("my_models:mean")
    assert torch.equal(mean(x), x.mean(dim=(2, 3)))
    assert mean.tokens(x).patches.shape == (2, 0, 0, 3)


@torch.no_grad()
def test_the_dictionary_of_forward_features_is_understood():
    from dinov2.data.eval_transform import EvalTransform
    from dinov2.encode.external_models import ExternalModel

    model = fill(DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)).eval()

    class Wrapper(nn.Module):
        def forward(self, x):
            return model.forward_features(x)

    x = images(2, 32, 16)
    tokens = ExternalModel(Wrapper(), patch_size=8, transform=EvalTransform()).tokens(x)
    assert torch.equal(tokens.patches, backbone_tokens(model, x).patches)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("nowhere_at_all:build", "cannot be imported"),
        ("my_models:wrong", "has no 'wrong'; it has"),
        ("my_models:number", "returned a int; it must return a torch.nn.Module"),
    ],
)
def test_a_function_that_gives_no_model_is_refused(module, source, reason):
    with pytest.raises(ConfigError, match=reason):
        load_external_model(source)


@torch.no_grad()
def test_a_model_with_another_kind_of_output_is_refused(module):
    with pytest.raises(ConfigError, match=r"returned shape \[1536\]"):
        load_external_model("my_models:broken")(images(1, 32, 16))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match="timm"):
        load_external_model("timm:vit_tiny_patch16_224")
