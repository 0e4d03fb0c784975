"""What a model sees in images, drawn."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from dinov2.analysis.pca import fit_image_pca, load_pca
from dinov2.apps.viz import view_patches, viz
from dinov2.checkpoints.files import save_teacher
from dinov2.errors import ConfigError, DataError, MissingDependency
from dinov2.models.config import BackboneConfig
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import load
from dinov2.report import render
from tests.golden.recipe import fill


def weights(path, **changes):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 1, "block_chunks": 0}
    torch.save(fill(DinoVisionTransformer(**{**options, **changes})).state_dict(), path)
    return path


def photo(path, *, seed=0, size=(60, 40)):
    """Coarse coloured noise: neighbouring patches are alike, images differ."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def model(here):
    return weights(here / "tiny.pth")


@pytest.fixture
def photos(here):
    return [photo(here / "one.png", seed=1), photo(here / "two.png", seed=2, size=(48, 64))]


def seen(folder):
    return json.loads((folder / "viz.json").read_text())


def test_two_images_give_every_kind_of_picture_a_basis_and_a_page(here, model, photos):
    report = viz(photos, model=model, output=here / "out", size=40, precision="fp32")
    names = {path.name for path in (here / "out").iterdir()}
    kinds = ("pca", "attention", "attention_heads", "similarity", "norm")
    assert names == {
        *(f"{stem}_{kind}.png" for stem in ("one", "two") for kind in kinds),
        "one_matches_two.png",
        "basis.safetensors",
        "viz.json",
        "index.html",
    }
    assert {path.name for path in report.files} == {name for name in names if name.endswith(".png")}
    for path in report.files:
        with Image.open(path) as picture:
            picture.load()
    assert report.page.n_images == 2 and report.page.n_bytes == (here / "out" / "index.html").stat().st_size


def test_the_aspect_ratio_is_kept_and_sides_are_multiples_of_the_patch(here, model, photos):
    viz(photos, model=model, output=here / "out", size=40, what=["pca"])
    images = seen(here / "out")["images"]
    assert [(image["size"], image["views"][0]["grid"]) for image in images] == [([40, 60], [5, 8]), ([64, 48], [7, 5])]


def test_without_a_size_the_shorter_side_has_32_patches(here, model):
    viz([photo(here / "one.png")], model=model, output=here / "out", what=["norm"], page=False)
    assert seen(here / "out")["images"][0]["views"][0]["grid"] == [32, 48]


@pytest.mark.parametrize("block", [-1, 0])
def test_a_view_is_that_of_the_model_itself(here, photos, block):
    loaded = load(weights(here / "reg.pth", num_register_tokens=2), precision="fp32")
    with Image.open(photos[0]) as picture:
        view = view_patches(loaded, picture.convert("RGB"), size=40, block=block, point=(0.99, 0.0))
        transform = loaded.transform.with_(crop_size=40, fit="aspect", patch_size=8)
        tokens = loaded.encode(transform(picture.convert("RGB"))[None], layers=[block])
    assert_close(view.patches, tokens.layers[block].patches[0], atol=1e-5, rtol=1e-5)
    assert view.attention.shape == (1 + 2 + 1, 1, 5, 8)
    assert sum(view.shares) == pytest.approx(1, abs=1e-5)
    assert view.attention[0].mean(dim=0).sum() == pytest.approx(view.shares[2], abs=1e-5)


def test_norms_are_those_before_the_final_norm_and_their_share_is_counted(here, model, photos):
    report = viz(photos, model=model, output=here / "out", size=40, what=["norm"], page=False, precision="fp32")
    loaded = load(model, precision="fp32")
    norms = []
    for path in photos:
        with Image.open(path) as picture:
            pixels = loaded.transform.with_(crop_size=40, fit="aspect")(picture.convert("RGB"))[None]
        with torch.no_grad():
            norms.append(loaded.backbone.forward_features(pixels)["x_prenorm"][0, 1:].norm(dim=-1))
    threshold = 2 * torch.cat(norms).median()
    assert report.norm_thresholds == [pytest.approx(float(threshold), rel=1e-5)]
    assert report.high_norm_shares == [pytest.approx(float((torch.cat(norms) > threshold).float().mean()))]
    above = viz(photos, model=model, output=here / "out", size=40, what=["norm"], page=False, norm_threshold=0.0)
    assert above.high_norm_shares == [1.0]


def test_without_jinja2_a_page_is_refused_before_anything_is_drawn(here, model, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    render._environment.cache_clear()
    try:
        with pytest.raises(MissingDependency, match="an HTML page needs a package"):
            viz(photos, model=model, output=here / "out", size=16)
        assert not (here / "out").exists()
        viz(photos, model=model, output=here / "out", size=16, page=False)
    finally:
        render._environment.cache_clear()


def test_a_basis_is_fitted_once_over_all_images_and_reused_from_its_file(here, model, photos):
    kept = here / "colours" / "basis.safetensors"
    options = {"size": 40, "what": ["pca"], "basis": kept, "page": False, "precision": "fp32"}
    first = viz(photos, model=model, output=here / "a", **options)
    assert not first.basis_reused and first.basis == kept
    loaded = load(model, precision="fp32")
    maps = []
    for path in photos:
        with Image.open(path) as picture:
            maps.append(view_patches(loaded, picture.convert("RGB"), size=40).patches)
    assert_close(load_pca(kept).components, fit_image_pca(maps).components, atol=1e-4, rtol=1e-4)
    before = kept.read_bytes()
    again = viz(photos[:1], model=model, output=here / "b", **options)
    assert again.basis_reused and kept.read_bytes() == before and again.notes == []
    assert (here / "a" / "one_pca.png").read_bytes() == (here / "b" / "one_pca.png").read_bytes()


def test_a_basis_of_another_model_is_noted_and_one_of_another_width_refused(here, model, photos):
    viz(photos, model=model, output=here / "a", size=40, what=["pca"], page=False)
    basis = here / "a" / "basis.safetensors"
    other = weights(here / "other.pth", depth=2)
    report = viz(photos, model=other, output=here / "b", size=40, what=["pca"], page=False, basis=basis)
    assert "the basis was fitted on tiny.pth, last block" in report.notes[0]
    wide = weights(here / "wide.pth", embed_dim=128, num_heads=2)
    with pytest.raises(ConfigError, match="belongs to features of 64 numbers .* those of this model have 128"):
        viz(photos, model=wide, output=here / "c", size=40, basis=basis)


def test_the_point_chooses_the_patch_that_similarity_is_measured_to(here, model, photos):
    for name, point in (("a", (0, 0)), ("b", (59, 39))):
        viz(photos, model=model, output=here / name, size=40, what=["similarity"], point=point, page=False)
    assert (here / "a" / "two_similarity.png").read_bytes() != (here / "b" / "two_similarity.png").read_bytes()
    with Image.open(here / "a" / "one_similarity.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle = pixels.shape[1] // 2
    right = pixels[14:, middle + 7 :]  # the map stands on the right, behind a margin of 14 pixels
    assert right[20, 20].sum() > right[100, 200].sum()  # the chosen patch is the lightest place


def test_a_folder_becomes_moving_pictures_with_one_basis(here, model):
    (here / "clip").mkdir()
    for i in range(11):
        photo(here / "clip" / f"{i}.png", seed=i % 3)
    viz([here / "clip"], model=model, output=here / "out", size=32, gif=True, what=["pca", "norm"], page=False)
    assert {path.name for path in (here / "out").iterdir()} == {
        "pca.gif",
        "norm.gif",
        "viz.json",
        "basis.safetensors",
    }
    with Image.open(here / "out" / "pca.gif") as picture:
        assert picture.n_frames == 11
    assert [image["name"] for image in seen(here / "out")["images"]] == [f"{i}.png" for i in range(11)]


def test_a_page_of_many_images_shows_some_at_even_distances_and_says_so(here, model):
    (here / "clip").mkdir()
    for i in range(14):
        photo(here / "clip" / f"{i:02}.png", seed=i)
    report = viz([here / "clip"], model=model, output=here / "out", size=16, what=["matches"])
    assert report.page.n_images == 12
    page = (here / "out" / "index.html").read_text()
    assert "12 of 14 images are shown" in page and "00.png and 0" in page


def test_two_models_stand_side_by_side(here, model, photos):
    other = weights(here / "other.pth", patch_size=16, num_register_tokens=1)
    report = viz(photos, model=model, compare=other, output=here / "out", size=48)
    assert [one["name"] for one in seen(here / "out")["models"]] == ["tiny.pth", "other.pth"]
    assert len(report.norm_thresholds) == 2 and (here / "out" / "one_matches_two_2.png").is_file()
    with Image.open(here / "out" / "one_pca.png") as both:
        viz(photos, model=model, output=here / "alone", size=48, what=["pca"], page=False)
        with Image.open(here / "alone" / "one_pca.png") as alone:
            assert both.width > 1.4 * alone.width


def test_a_model_compared_with_itself_is_named_twice_and_coloured_alike(here, model, photos):
    viz(photos, model=model, compare=model, output=here / "out", size=40, what=["pca"], page=False)
    names = [one["name"] for one in seen(here / "out")["models"]]
    assert len(set(names)) == 2
    with Image.open(here / "out" / "one_pca.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))[14:100].astype(int)
    width = (pixels.shape[1] - 14) // 3
    second, third = pixels[:, 14 + width : 2 * width], pixels[:, 14 + 2 * width : -14]
    assert second.std() > 10 and np.abs(second - third).max() <= 1


def test_the_foreground_split_is_kept_with_the_basis(here, model, photos):
    viz(photos, model=model, output=here / "out", size=40, what=["pca"], foreground=True, page=False)
    assert load_pca(here / "out" / "basis.safetensors").foreground is not None


def test_images_of_one_name_do_not_overwrite_each_other(here, model):
    for folder in ("a", "b"):
        (here / folder).mkdir()
        photo(here / folder / "x.png", seed=ord(folder))
    viz([here / "a", here / "b"], model=model, output=here / "out", size=16, what=["pca"], page=False)
    assert sorted(path.name for path in (here / "out").glob("*.png")) == ["x-2_pca.png", "x_pca.png"]


def test_unreadable_images_are_left_out_and_listed(here, model, photos):
    (here / "torn.png").write_bytes(b"no picture")
    report = viz([here / "torn.png", *photos], model=model, output=here / "out", size=16, what=["pca"], page=False)
    assert [path for path, _ in report.unreadable] == [str(here / "torn.png")]
    assert "1 of 3 images were left out" in report.notes[0]
    with pytest.raises(DataError, match=r"torn.png cannot be read as an image"):
        viz([here / "torn.png"], model=model, output=here / "none", size=16)
    assert not (here / "none").exists()


def test_grey_models_see_grey_and_others_are_refused(here, photos):
    grey = fill(DinoVisionTransformer(img_size=32, patch_size=8, in_chans=1, embed_dim=64, depth=1, num_heads=1))
    teacher = {f"backbone.{key}": value for key, value in grey.state_dict().items()}
    save_teacher(here / "grey.pth", teacher, BackboneConfig.from_model(grey, mean=[0.5], std=[0.2]))
    viz(photos, model=here / "grey.pth", output=here / "out", size=16, what=["pca"], page=False)
    with pytest.raises(ConfigError, match="takes images of 5 channels"):
        viz(photos, model=weights(here / "five.pth", in_chans=5), output=here / "out", size=16)


class Elsewhere(nn.Module):
    """A model of somebody else: patch features are mean colours, tokens [B, 1 + N, 3]."""

    patch_size = 8

    def forward(self, x):
        patches = nn.functional.avg_pool2d(x, 8).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)


class Flat(Elsewhere):
    def forward(self, x):
        return super().forward(x)[:, 0]


class Turned(Elsewhere):
    def forward(self, x):
        return nn.functional.avg_pool2d(x, 8).permute(0, 2, 3, 1)


def elsewhere():
    return Elsewhere()


def flat():
    return Flat()


def turned():
    return Turned()


def test_models_of_other_libraries_are_drawn_without_attention(here, photos):
    source = "tests.apps.test_viz:elsewhere"
    report = viz(photos, model=source, output=here / "out", size=32)
    assert "its attention is left out" in report.notes[0]
    assert not list((here / "out").glob("*attention*")) and (here / "out" / "one_pca.png").is_file()
    assert seen(here / "out")["models"][0]["norms"] == "after the final norm"
    with pytest.raises(ConfigError, match="queries and keys are not shown; leave attention out of --what"):
        viz(photos, model=source, output=here / "out", size=32, what=["attention"])


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"what": ["pcs"]}, "there are no pictures called 'pcs'; choose from pca, attention"),
        ({"block": 3}, "there is no block 3 in a model of 3 blocks"),
        ({"size": 4}, "images of 4 pixels hold no patch of tiny.pth, which is 8 wide"),
        ({"size": 0}, "images cannot be 0 pixels large"),
        ({"point": (60, 0)}, "lies outside of the image, which is 60 pixels wide and 40 high"),
        ({"basis": "tiny.pth"}, "tiny.pth holds no PCA basis"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_written(here, model, photos, options, sentence):
    with pytest.raises((ConfigError, DataError)) as refusal:
        viz(photos, model=model, output=here / "out", **{"size": 16, **options})
    assert sentence in str(refusal.value)
    assert not (here / "out").exists()


def test_matches_of_one_image_are_refused_when_asked_for(here, model, photos):
    with pytest.raises(ConfigError, match="matches need two images"):
        viz(photos[:1], model=model, output=here / "out", what=["matches"])
    viz(photos[:1], model=model, output=here / "out", size=16)
    assert not list((here / "out").glob("*matches*"))


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("flat", "gives no patch features, only one vector an image"),
        ("turned", r"gives features of shape \[6, 3, 4\] for a grid of 4 x 6 patches"),
    ],
)
def test_models_without_a_grid_of_patches_are_refused(here, photos, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        viz(photos[:1], model=f"tests.apps.test_viz:{name}", output=here / "out", size=32)


def test_a_strip_does_not_set_the_cost_and_what_fits_in_no_way_is_left_out(here, model, photos):
    Image.new("RGB", (3000, 1)).save(here / "strip.png")
    Image.new("RGB", (20000, 1)).save(here / "thread.png")
    report = viz([*photos, here / "strip.png", here / "thread.png"], model=model, output=here / "out", page=False)
    images = seen(here / "out")["images"]
    assert [image["name"] for image in images] == ["one.png", "two.png", "strip.png"]
    assert all(rows * columns <= 4096 for image in images for rows, columns in [image["views"][0]["grid"]])
    assert [reason for _, reason in report.unreadable] == [
        f"{here / 'thread.png'}: an image of 20000 x 1 pixels takes 9,050 tokens with the fit aspect, and "
        "4,096 are allowed; crop or shrink it, or raise --max-tokens (max_tokens)"
    ]
    viz(photos, model=model, output=here / "few", page=False, max_tokens=20, what=["norm"])
    assert all(
        rows * columns <= 20 for image in seen(here / "few")["images"] for rows, columns in [image["views"][0]["grid"]]
    )
