"""The hub's ImageNet classifiers: the release's figures, keys and refusals."""

import hashlib
import inspect
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dinov2.errors import DinoError, WeightsError
from dinov2.hub import classifiers
from dinov2.hub.backbones import dinov2_vits14
from dinov2.hub.classifiers import LinearClassifier, Weights, dinov2_vits14_lc, dinov2_vits14_reg_lc
from tests.golden.loading import golden_json, golden_tensors
from tests.golden.recipe import fill, images

KEYS = golden_json("hub_lc.keys")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a network that nobody may ask."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    monkeypatch.delattr("dinov2.checkpoints.download._Transfer.run")
    return tmp_path


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("name", list(KEYS))
def test_an_entry_has_the_release_s_keys_and_shapes(name: str, layers: int) -> None:
    with torch.device("meta"):
        model = getattr(classifiers, name)(pretrained=False, layers=layers)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    expected = KEYS[name]["layers"][str(layers)]
    assert {key: shapes[key] for key in shapes if not key.startswith("backbone.")} == expected["head"]
    assert (len(shapes), sum(p.numel() for p in model.parameters())) == (expected["entries"], expected["parameters"])
    lines = "\n".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == expected["sha256"]
    assert [child for child, _ in model.named_children()] == ["backbone", "linear_head"]
    assert (model.layers, model.training) == (layers, True)


@pytest.mark.parametrize("size", [(224, 224), (98, 154)], ids=["224x224", "98x154"])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("entry", [dinov2_vits14_lc, dinov2_vits14_reg_lc], ids=["plain", "registers"])
def test_the_small_classifier_gives_the_release_s_logits(entry, layers: int, size: tuple[int, int]) -> None:
    golden, prefix = golden_tensors(f"hub_{entry.__name__}"), f"layers{layers}.{size[0]}x{size[1]}"
    model = fill(entry(pretrained=False, layers=layers)).eval()
    expected = golden[f"{prefix}.logits.slice"]
    with torch.inference_mode():
        logits = model(images(len(expected), *size))
    assert logits.shape == (len(expected), 1000)
    assert_close(logits[:, ::8], expected, atol=1e-4, rtol=0)
    assert torch.equal(logits.topk(5).indices, golden[f"{prefix}.top5"].long())


def test_four_layers_are_the_default() -> None:
    with torch.device("meta"):
        assert dinov2_vits14_lc(pretrained=False).layers == 4


@pytest.mark.parametrize("layers, file", [(1, "dinov2_vits14_linear_head.pth"), (4, "dinov2_vits14_linear4_head.pth")])
def test_backbone_and_head_are_loaded_from_their_own_files(cache: Path, layers: int, file: str) -> None:
    model = fill(dinov2_vits14_lc(pretrained=False, layers=layers))
    torch.save(model.backbone.state_dict(), cache / "dinov2_vits14_pretrain.pth")
    torch.save(model.linear_head.state_dict(), cache / file)
    loaded = dinov2_vits14_lc(layers=layers)
    assert loaded.training and loaded.linear_head.training
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), atol=0, rtol=0)
    assert torch.equal(dinov2_vits14_lc(layers=layers, weights="imagenet1k").linear_head.bias, model.linear_head.bias)


def test_a_head_of_one_s_own_goes_on_the_released_backbone(cache: Path, tmp_path: Path) -> None:
    torch.save(fill(dinov2_vits14(pretrained=False)).state_dict(), cache / "dinov2_vits14_pretrain.pth")
    head = {"weight": torch.randn(10, 1920), "bias": torch.zeros(10)}
    torch.save(head, tmp_path / "own.pth")
    model = dinov2_vits14_lc(weights=tmp_path / "own.pth").eval()
    assert model(images(1, 28, 28)).shape == (1, 10)
    with pytest.raises(WeightsError, match="4-layer head"):
        dinov2_vits14_lc(weights=tmp_path / "own.pth", layers=1)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize(
    "head, width",
    [
        (lambda n: torch.nn.Linear(n, 10), 10),
        (lambda n: torch.nn.Sequential(torch.nn.LayerNorm(n), torch.nn.Dropout(0.1), torch.nn.Linear(n, 3)), 3),
        (lambda n: torch.nn.Identity(), None),
    ],
    ids=["linear", "sequential", "identity"],
)
def test_any_module_takes_the_place_of_the_head_and_can_be_trained(head, width: int | None, layers: int) -> None:
    model = dinov2_vits14_lc(pretrained=False, layers=layers, img_size=28, depth=4)
    model.linear_head = head((1 + layers) * 384)
    logits = model(images(2, 28, 28))
    assert logits.shape == (2, width or (1 + layers) * 384)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.linear_head.parameters())
    again = LinearClassifier(model.backbone, model.linear_head, layers=layers)
    assert again.layers == layers and LinearClassifier(model.backbone, torch.nn.Identity()).layers == 4


@pytest.mark.parametrize("layers", [0, 2, "4", None])
def test_other_numbers_of_layers_are_an_assertion_error_as_in_the_release(layers: object) -> None:
    with pytest.raises(AssertionError, match="Unsupported number of layers: .* reads 1 or 4 layers") as failure:
        dinov2_vits14_lc(layers=layers, pretrained=False)
    assert isinstance(failure.value, DinoError)


@pytest.mark.parametrize("weights", ["LVD142M", None, "IMAGENET"])
def test_unknown_weights_are_an_assertion_error_as_in_the_release(weights: object) -> None:
    with pytest.raises(AssertionError, match="Unsupported weights: .* for dinov2_vits14_lc give 'IMAGENET1K'"):
        dinov2_vits14_lc(weights=weights, pretrained=False)


def test_further_arguments_reach_the_backbone() -> None:
    with torch.device("meta"):
        model = dinov2_vits14_lc(pretrained=False, img_size=28, drop_path_rate=0.1)
    assert model.backbone.pos_embed.shape == (1, 5, 384)
    with pytest.raises(ValueError, match="do not fit a model with img_size=28"):
        dinov2_vits14_lc(img_size=28)


@pytest.mark.parametrize("name", list(KEYS))
def test_every_entry_takes_the_release_s_arguments_by_keyword(name: str) -> None:
    parameters = inspect.signature(getattr(classifiers, name)).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("layers", 4),
        ("pretrained", True),
        ("weights", Weights.IMAGENET1K),
        ("kwargs", inspect.Parameter.empty),
    ]


def test_each_entry_builds_the_classifier_of_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(classifiers, "released_classifier", lambda name, **rest: built.append(name))
    for name in KEYS:
        getattr(classifiers, name)()
    assert built == list(KEYS)
