"""The hub's backbones: the release's figures, arguments and refusals."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dinov2.errors import DinoError, WeightsError
from dinov2.hub import backbones
from dinov2.hub.backbones import Weights, dinov2_vitb14, dinov2_vits14, dinov2_vits14_reg, released_backbone
from dinov2.models.releases import RELEASES
from tests.golden.loading import golden_json, golden_tensors
from tests.golden.recipe import fill, images

NAMES = [row.name for row in RELEASES if row.kind == "backbone"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a network that nobody may ask."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    monkeypatch.delattr("dinov2.checkpoints.download._Transfer.run")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_has_the_keys_and_shapes_of_the_released_file(name: str) -> None:
    with torch.device("meta"):
        model = getattr(backbones, name)(pretrained=False)
    golden = golden_json(f"backbone_{name.removeprefix('dinov2_')}.keys")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden
    assert model.training, "as constructed"
    row = next(row for row in RELEASES if row.name == name)
    rule = (row.interpolate_offset, row.interpolate_antialias)
    assert (model.interpolate_offset, model.interpolate_antialias) == rule
    assert rule == ((0.0, True) if name.endswith("_reg") else (0.1, False))
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters


@pytest.mark.parametrize("entry", [dinov2_vits14, dinov2_vits14_reg], ids=["plain", "registers"])
def test_the_small_model_gives_the_release_s_figures(entry, cache: Path) -> None:
    golden = golden_tensors(f"hub_{entry.__name__}")
    model = fill(entry(pretrained=False)).eval()
    with torch.inference_mode():
        assert_close(model(images(2, 224, 224)), golden["224x224.output"], atol=1e-4, rtol=0)
        assert_close(model(images(1, 98, 154)), golden["98x154.output"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_base_model_gives_the_release_s_figures() -> None:
    golden = golden_tensors("hub_dinov2_vitb14")
    model = fill(dinov2_vitb14(pretrained=False)).eval()
    with torch.inference_mode():
        assert_close(model(images(1, 98, 154)), golden["98x154.output"], atol=1e-4, rtol=0)


def test_pretrained_weights_are_loaded_from_the_cached_file(cache: Path) -> None:
    weights = fill(dinov2_vits14(pretrained=False)).state_dict()
    torch.save(weights, cache / "dinov2_vits14_pretrain.pth")
    before = torch.random.get_rng_state()
    model = dinov2_vits14()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert_close(dict(model.state_dict()), dict(weights), atol=0, rtol=0)
    for same in (Weights.LVD142M, "LVD142M", "lvd142m", cache / "dinov2_vits14_pretrain.pth"):
        assert torch.equal(dinov2_vits14(weights=same).cls_token, weights["cls_token"])


def test_options_that_keep_the_shapes_go_with_pretrained_weights(cache: Path) -> None:
    torch.save(fill(dinov2_vits14(pretrained=False)).state_dict(), cache / "dinov2_vits14_pretrain.pth")
    model = dinov2_vits14(drop_path_rate=0.1, block_chunks=4, interpolate_offset=0.0)
    assert (model.chunked_blocks, model.interpolate_offset) == (True, 0.0)


@pytest.mark.parametrize(
    "options, key",
    [
        ({"img_size": 224}, r"img_size=224: pos_embed would be \[1, 257, 384\] and is \[1, 1370, 384\]"),
        ({"in_chans": 4}, r"in_chans=4: patch_embed.proj.weight would be \[384, 4, 14, 14\]"),
        ({"num_register_tokens": 4}, "register_tokens would be .* and is absent"),
        ({"init_values": None}, "ls1.gamma would be absent"),
    ],
)
def test_options_that_the_weights_do_not_fit_are_refused_before_a_download(
    cache: Path, options: dict[str, object], key: str
) -> None:
    with pytest.raises(ValueError, match=f"do not fit a model with .*{key}.*or ask for pretrained=False"):
        dinov2_vits14(**options)
    assert list(cache.iterdir()) == []


def test_a_rectangular_grid_is_not_called_a_square(tmp_path: Path) -> None:
    torch.save(dinov2_vits14(pretrained=False, img_size=(56, 84)).state_dict(), tmp_path / "own.pth")
    with pytest.raises(
        ValueError, match=r"24 patches, and img_size=518 makes 1369; give img_size=\(HEIGHT, WIDTH\) of"
    ):
        dinov2_vits14(weights=tmp_path / "own.pth")
    assert dinov2_vits14(weights=tmp_path / "own.pth", img_size=(56, 84)).patch_embed.patches_resolution == (4, 6)


def test_a_file_with_another_grid_is_not_resized_unasked(cache: Path, tmp_path: Path) -> None:
    state = dinov2_vits14(pretrained=False, img_size=224).state_dict()
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(ValueError, match="256 patches, and img_size=518 makes 1369; give img_size=224"):
        dinov2_vits14(weights=str(tmp_path / "own.pth"))
    model = dinov2_vits14(weights=tmp_path / "own.pth", img_size=224)
    assert torch.equal(model.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("weights", ["LVD", "", None, 3, "IMAGENET1K"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_unknown_weights_are_an_assertion_error_as_in_the_release(weights: object, pretrained: bool) -> None:
    with pytest.raises(AssertionError, match="Unsupported weights: .*'LVD142M', or the path") as failure:
        dinov2_vits14(pretrained=pretrained, weights=weights)
    assert isinstance(failure.value, DinoError)


def test_a_file_of_another_model_is_refused(cache: Path) -> None:
    torch.save(fill(dinov2_vits14_reg(pretrained=False)).state_dict(), cache / "dinov2_vits14_pretrain.pth")
    with pytest.raises(WeightsError, match="register_tokens"):
        dinov2_vits14()


@pytest.mark.parametrize("content", [b"<html>login</html>", b"PK\x03\x04cut off", b""])
def test_a_damaged_file_is_one_sentence(cache: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "damaged.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged\.pth"):
        dinov2_vits14(weights=tmp_path / "damaged.pth")


def test_a_caller_s_own_layers_with_buffers_are_constructed_for_real(cache: Path) -> None:
    class Scaled(torch.nn.GELU):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((), 0.5), persistent=False)

    torch.save(dinov2_vits14(pretrained=False).state_dict(), cache / "dinov2_vits14_pretrain.pth")
    model = dinov2_vits14(act_layer=Scaled)
    assert {buffer.item() for buffer in model.buffers()} == {0.5}


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_takes_the_release_s_arguments_by_keyword(name: str) -> None:
    parameters = inspect.signature(getattr(backbones, name)).parameters
    assert [(p.name, p.kind, p.default) for p in parameters.values()] == [
        ("pretrained", inspect.Parameter.KEYWORD_ONLY, True),
        ("weights", inspect.Parameter.KEYWORD_ONLY, Weights.LVD142M),
        ("kwargs", inspect.Parameter.VAR_KEYWORD, inspect.Parameter.empty),
    ]


def test_each_entry_builds_the_row_of_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(backbones, "released_backbone", lambda name, **rest: built.append(name))
    for name in NAMES:
        getattr(backbones, name)()
    assert built == NAMES


def test_pickled_code_is_refused_without_being_run(cache: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was-run",)

    torch.save({"cls_token": Code()}, cache / "dinov2_vits14_pretrain.pth")
    with pytest.raises(WeightsError, match="loading them could run code"), warnings.catch_warnings():
        released_backbone("dinov2_vits14")
    assert not (tmp_path / "was-run").exists()
