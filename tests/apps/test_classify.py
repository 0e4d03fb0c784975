"""Classes of images: against the release's logits, against the same done by hand, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.apps.classify import classify, find_classified_images, write_classification
from dinov2.checkpoints.download import cached_path
from dinov2.cli.classify import _CsvOutput
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES
from dinov2.errors import ConfigError, DataError, DinoError, UnknownRelease, WeightsError
from dinov2.models.heads import LinearHead
from dinov2.models.releases import RELEASES
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small
from dinov2.pretrained import load
from tests.golden import recipe
from tests.golden.loading import assert_stats, golden_tensors
from tests.runs import pictures

PIXELS = 32


@pytest.fixture
def backbone(here: Path) -> Path:
    """A weight file of a backbone that is 64 wide, for images of 32 pixels."""
    model = DinoVisionTransformer(img_size=PIXELS, patch_size=8, embed_dim=64, depth=5, num_heads=1, block_chunks=0)
    torch.save(recipe.fill(model).state_dict(), here / "backbone.pth")
    return here / "backbone.pth"


def head_file(path: Path, *, layers: int = 1, classes: int = 10, embed_dim: int = 64) -> Path:
    torch.save(recipe.fill(LinearHead(embed_dim, layers=layers, num_classes=classes)).state_dict(), path)
    return path


def by_hand(backbone: Path, head: Path, image: Path, *, layers: int) -> Tensor:
    """Probabilities [C], with nothing of this package but the transformer."""
    model = DinoVisionTransformer(img_size=PIXELS, patch_size=8, embed_dim=64, depth=5, num_heads=1, block_chunks=0)
    model.load_state_dict(torch.load(backbone, weights_only=True))
    pixels = torch.from_numpy(np.asarray(Image.open(image)).copy()).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    tokens = model.eval().prepare_tokens_with_masks((pixels - mean[:, None, None]) / std[:, None, None])
    outputs = []
    for block in model.blocks:
        tokens = block(tokens)
        outputs.append(model.norm(tokens))
    read = [output[:, 0] for output in outputs[-layers:]] + [outputs[-1][:, 1:].mean(dim=1)]
    weights = torch.load(head, weights_only=True)
    return (torch.cat(read, dim=1) @ weights["weight"].T + weights["bias"]).softmax(dim=1)[0].detach()


@pytest.mark.parametrize("layers", [1, 4])
def test_the_likeliest_classes_are_those_worked_out_by_hand(here: Path, backbone: Path, layers: int) -> None:
    photos = pictures(here / "photos", n=5, size=PIXELS)
    head = head_file(here / "head.pth", layers=layers)
    result = classify([photos], model=backbone, head=head, top=3, batch_size=2, precision="fp32")
    assert [Path(prediction.path).name for prediction in result.predictions] == [f"{i:03}.png" for i in range(5)]
    assert result.failures == []
    for prediction in result.predictions:
        expected = by_hand(backbone, head, Path(prediction.path), layers=layers).topk(3)
        assert [guess.number for guess in prediction.top] == expected.indices.tolist()
        found = torch.tensor([guess.probability for guess in prediction.top])
        torch.testing.assert_close(found, expected.values, rtol=1e-5, atol=1e-6)
    assert result.made_with["head"]["layers"] == layers
    assert result.made_with["transform"]["crop"] == PIXELS


class Classifier(nn.Module):
    """The children under whose names the recipe fills a classifier."""

    def __init__(self, registers: int, layers: int) -> None:
        super().__init__()
        rule = {"interpolate_offset": 0.0, "interpolate_antialias": True} if registers else {}
        self.backbone = vit_small(14, registers, img_size=518, init_values=1.0, block_chunks=0, **rule)
        self.linear_head = LinearHead(384, layers=layers)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("registers", [0, 4])
def test_a_released_name_takes_the_two_published_files_and_gives_the_releases_logits(
    here: Path, monkeypatch: pytest.MonkeyPatch, registers: int, layers: int
) -> None:
    monkeypatch.setenv("DINOV2_CACHE", str(here / "cache"))
    name = f"dinov2_vits14{'_reg' if registers else ''}"
    classifier = recipe.fill(Classifier(registers, layers))
    rows = {row.name: row for row in RELEASES}
    row = next(row for row in RELEASES if row.hub_name == f"{name}_lc" and row.layers == layers)
    for url, module in ((rows[name].url, classifier.backbone), (row.url, classifier.linear_head)):
        cached_path(url).parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), cached_path(url))

    photo = pictures(here / "photos", n=1, size=224)
    seen: list[int] = []
    result = classify(
        [photo], model=f"{name}_lc", layers=layers, precision="fp32", each=lambda prediction: seen.append(1)
    )
    (prediction,) = result.predictions
    assert seen == [1]
    assert result.made_with["head"] == {"layers": layers, "classes": 1000}
    assert all(guess[:3] == (guess.number, *IMAGENET_CLASSES[guess.number]) for guess in prediction.top)

    model = load(row.name, precision="fp32")
    golden = golden_tensors(f"hub_{name}_lc")
    for size, batch in (((224, 224), 2), ((98, 154), 1)):
        key = f"layers{layers}.{size[0]}x{size[1]}"
        logits = model.classify(recipe.images(batch, *size))
        torch.testing.assert_close(logits[:, ::8], golden[f"{key}.logits.slice"], rtol=1e-4, atol=1e-4)
        assert_stats(logits, golden[f"{key}.logits.stats"])
        assert torch.equal(logits.topk(5).indices, golden[f"{key}.top5"].long())


def test_a_head_of_a_thousand_classes_is_named_by_imagenet_and_others_by_number_or_their_own_list(
    here: Path, backbone: Path
) -> None:
    photo = pictures(here / "photos", n=1, size=PIXELS)
    thousand = classify([photo], model=backbone, head=head_file(here / "t.pth", classes=1000)).predictions[0].top[0]
    assert (thousand.wnid, thousand.name) == IMAGENET_CLASSES[thousand.number]
    ten = head_file(here / "ten.pth")
    numbered = classify([photo], model=backbone, head=ten).predictions[0].top[0]
    assert (numbered.wnid, numbered.name) == ("", f"class {numbered.number}")
    (here / "names.txt").write_text("".join(f"Käfer {i}\n" for i in range(10)), encoding="utf-8")
    named = classify([photo], model=backbone, head=ten, classes=here / "names.txt", top=50).predictions[0].top
    assert [guess.name for guess in named] == [f"Käfer {guess.number}" for guess in named]
    assert len(named) == 10 and sum(guess.probability for guess in named) == pytest.approx(1, abs=1e-5)


def test_an_unreadable_image_is_listed_in_its_place_and_stops_nothing(here: Path, backbone: Path) -> None:
    photos = pictures(here / "photos", n=5, size=PIXELS)
    for name in ("001.png", "003.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:40])
    (photos / "004.png").write_bytes(b"<html>")
    result = classify([photos], model=backbone, head=head_file(here / "h.pth"), batch_size=2)
    assert [bool(prediction.top) for prediction in result.predictions] == [True, False, True, False, False]
    assert [Path(prediction.path).name for prediction in result.failures] == ["001.png", "003.png", "004.png"]
    assert all("cannot be read as an image" in str(prediction.error) for prediction in result.failures)


def test_numbers_that_are_not_finite_are_no_prediction(here: Path, backbone: Path) -> None:
    head = head_file(here / "h.pth")
    state = torch.load(head, weights_only=True)
    torch.save({**state, "bias": torch.full_like(state["bias"], torch.nan)}, head)
    result = classify([pictures(here / "photos", n=1, size=PIXELS)], model=backbone, head=head)
    assert "gives NaN or infinite logits for 1 of 1 images; try --precision fp32" in str(result.failures[0].error)


def test_files_folders_and_patterns_are_taken_in_order_and_each_image_once(here: Path) -> None:
    pictures(here / "a", n=2)
    pictures(here / "b" / "deep", n=2)
    (here / "b" / "deep" / "notes.txt").write_text("no image")
    (here / "[x].png").write_bytes(b"")
    found = find_classified_images([here / "b" / "deep" / "001.png", "a", "b/**/*", "*x*.png", "[x].png"])
    first = str(here / "b" / "deep" / "001.png")
    assert found == [first, "a/000.png", "a/001.png", "b/deep/000.png", "[x].png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("photo.jpg", "there is no image or folder photo.jpg"),
        ("empty", "no image was found in|the folder empty holds no image"),
        ("empty/*.png", r"no image matches empty/\*.png"),
    ],
)
def test_a_source_without_images_is_refused_before_a_model_is_looked_for(here: Path, source: str, message: str) -> None:
    (here / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        classify([source], model="nothing of the kind")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": ("h.pth", 384, 1)}, WeightsError, r"reads 768 features, but .* 64 .*1-layer head of a ViT-S"),
        ({"head": ("h.pth", 64, 4), "layers": 1}, WeightsError, "it is a 4-layer head: ask for layers=4"),
        ({"head": "missing.pth"}, WeightsError, "there is no weight file .*missing.pth"),
        ({"head": "backbone.pth"}, WeightsError, "it looks like a backbone"),
        ({}, WeightsError, r"backbone\.pth holds a backbone without a classifier; give one with --head FILE"),
        ({"model": "dinov2_vits14"}, WeightsError, "write dinov2_vits14_lc, or give --head"),
        ({"model": "dinov2_vits15_lc"}, UnknownRelease, "nearest is 'dinov2_vits14_lc'"),
        ({"head": ("h.pth", 64, 1), "classes": "names.txt"}, ConfigError, "names 2 classes, but the head has 10"),
        ({"head": ("h.pth", 64, 1), "classes": "nowhere"}, ConfigError, "class names nowhere cannot be read"),
        ({"head": ("h.pth", 64, 1), "classes": "photos/000.png"}, ConfigError, "it is no text in UTF-8"),
        ({"top": 0}, ConfigError, "number of classes to show is 0"),
        ({"layers": 3}, ConfigError, "1 or 4 layers, not 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(here: Path, backbone: Path, options, error, message) -> None:
    pictures(here / "photos", n=1, size=PIXELS)
    (here / "names.txt").write_text("cat\ndog\n\n")
    if isinstance(options.get("head"), tuple):
        file, embed_dim, layers = options["head"]
        options = {**options, "head": head_file(here / file, embed_dim=embed_dim, layers=layers)}
    with pytest.raises(error, match=message):
        classify(["photos"], **{"model": backbone, **options})


def test_a_head_on_more_layers_than_the_backbone_has_is_refused(here: Path) -> None:
    model = DinoVisionTransformer(img_size=PIXELS, patch_size=8, embed_dim=64, depth=3, num_heads=1, block_chunks=0)
    torch.save(model.state_dict(), here / "b.pth")
    photos = pictures(here / "photos", n=1, size=PIXELS)
    with pytest.raises(WeightsError, match=r"reads 4 layers, but b\.pth has 3; give a 1-layer head"):
        classify([photos], model="b.pth", head=head_file(here / "h.pth", layers=4))


def test_csv_and_json_hold_the_same(here: Path, backbone: Path) -> None:
    photos = pictures(here / "photos", n=2, size=PIXELS)
    (photos / "001.png").write_bytes(b"broken")
    with _CsvOutput("out.csv") as each:
        result = classify([photos], model=backbone, head=head_file(here / "h.pth", classes=1000), top=2, each=each)
    write_classification(result, here / "new" / "out.json")
    content = json.loads((here / "new" / "out.json").read_text(encoding="utf-8"))
    first, second = content["images"]
    assert set(content) == {"model", "head", "transform", "precision", "images"}
    assert [guess["name"] for guess in first["top"]] == [guess.name for guess in result.predictions[0].top]
    assert len(content["head"]["sha256"]) == len(content["model"]["sha256"]) == 64
    lines = (here / "out.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "path,rank,class,wnid,name,probability,error"
    assert [line.split(",")[1:4] for line in lines[1:3]] == [
        [str(rank), str(guess["class"]), guess["wnid"]] for rank, guess in enumerate(first["top"], start=1)
    ]
    assert lines[3].startswith(f"{second['path']},,,,,,") and "cannot be read" in lines[3]


def test_a_full_disk_leaves_the_older_file(here: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = classify([pictures(here / "p", n=1, size=PIXELS)], model=backbone, head=head_file(here / "h.pth"))
    (here / "out.json").write_text("older")

    def full(self: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DinoError, match=r"out\.json could not be written \(No space left on device\)"):
        write_classification(result, here / "out.json")
    assert (here / "out.json").read_text() == "older"
    assert not list(here.glob("*.tmp"))
