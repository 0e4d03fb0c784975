import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.analysis.patch_maps import PatchView, mutual_nearest, patch_norms, similarity_map
from dinov2.analysis.pca import fit_foreground_pca, fit_image_pca
from dinov2.errors import DataError
from dinov2.report import patch_page
from dinov2.report.patch_page import (
    PAGE_LIMIT,
    PageImage,
    PageMatches,
    PageModel,
    quantised_features,
    write_patch_page,
)

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


def view(height=4, width=6, dim=16, seed=0, *, heads=2, registers=1):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(height, width, dim, generator=generator)
    attention = torch.rand(1 + registers, heads, height, width, generator=generator) / 50
    return PatchView(patches, patch_norms(patches), attention, (0.1, 0.2, 0.7))


def image(seed=0, name="", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return PageImage(name or f"image {seed}.jpg", Image.fromarray(pixels), (view(seed=seed, **options),))


def model(images, *, name="tiny", fit=fit_image_pca, m=0):
    return PageModel(
        name, "patch 8, last block", fit([one.views[m].patches for one in images]), 4.2, num_register_tokens=1
    )


def content(path):
    """The values on the page, and its text."""
    page = Path(path).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    return data, page


def values(text, dtype, *shape):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=dtype).reshape(shape).copy())


@pytest.fixture
def images():
    return [image(0), image(1), image(2)]


def test_the_page_needs_nothing_beside_itself(tmp_path, images):
    _, page = content(write_patch_page(tmp_path / "p.html", models=[model(images)], images=images).path)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|<link[^>]*stylesheet|<script src", page)
    assert "default-src 'none'" in page
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


def test_similarities_on_the_page_are_those_of_the_features(tmp_path, images):
    written = write_patch_page(tmp_path / "p.html", models=[model(images)], images=images)
    data, _ = content(written.path)
    features = [values(one["panes"][0]["features"], np.int8, 4, 6, 16) for one in data["images"]]
    exact = similarity_map(images[2].views[0].patches, images[0].views[0].patches[1, 3])
    stored = similarity_map(features[2], features[0][1, 3])
    assert (stored - exact).abs().max() <= written.largest_error < 0.02
    assert written.dims == (16,)


def test_maps_on_the_page_are_those_of_the_views(tmp_path, images):
    basis = model(images)
    pane = content(write_patch_page(tmp_path / "p.html", models=[basis], images=images).path)[0]["images"][1]["panes"][
        0
    ]
    one = images[1].views[0]
    norms = pane["norm_low"] + values(pane["norms"], np.uint8, 4, 6) / 255 * (pane["norm_high"] - pane["norm_low"])
    assert torch.allclose(norms.float(), one.norms, atol=0.02)
    assert pane["high_share"] == pytest.approx(float((one.norms > 4.2).float().mean()))
    colours = values(pane["pca"], np.uint8, 4, 6, 4)
    assert torch.allclose(colours[..., :3] / 255, basis.basis.to_rgb(one.patches), atol=0.003)
    assert [head["label"] for head in pane["heads"]] == [0, 1, -1]
    head = values(pane["heads"][1]["values"], np.uint8, 4, 6) / 255 * pane["heads"][1]["high"]
    below = one.attention[0, 1] < pane["heads"][1]["high"]
    assert torch.allclose(head[below].float(), one.attention[0, 1][below], atol=1e-4)


def test_background_is_marked_and_not_coloured(tmp_path):
    maps = [torch.zeros(6, 6, 4) + 0.01 * torch.randn(6, 6, 4) for _ in range(2)]
    for map_ in maps:
        map_[2:4, 2:4] += 3
    images = [
        PageImage(f"{i}", Image.new("RGB", (30, 30)), (PatchView(map_, patch_norms(map_)),))
        for i, map_ in enumerate(maps)
    ]
    written = write_patch_page(tmp_path / "p.html", models=[model(images, fit=fit_foreground_pca)], images=images)
    mask = values(content(written.path)[0]["images"][0]["panes"][0]["pca"], np.uint8, 6, 6, 4)[..., 3] > 0
    assert int(mask.sum()) == 4 and bool(mask[2:4, 2:4].all())


def test_models_without_attention_have_no_view_of_it(tmp_path, images):
    bare = [PageImage(one.name, one.picture, (PatchView(one.views[0].patches, one.views[0].norms),)) for one in images]
    page = content(write_patch_page(tmp_path / "p.html", models=[model(bare)], images=bare).path)[1]
    assert 'value="attention"' not in page and "head by head" not in page


def test_two_models_stand_side_by_side_and_share_the_picture(tmp_path):
    images = [
        PageImage(one.name, one.picture, (*one.views, view(3, 5, 8, seed=9 + i)))
        for i, one in enumerate([image(0), image(1)])
    ]
    models = [model(images, name="first"), model(images, name="second", m=1)]
    data, page = content(write_patch_page(tmp_path / "p.html", models=models, images=images).path)
    assert [(pane["rows"], pane["cols"]) for pane in data["images"][0]["panes"]] == [(4, 6), (3, 5)]
    assert page.count('src="data:image/jpeg') == 2
    assert 'id="stage-1-1"' in page and "first and second" in page


def test_matches_become_lines_between_the_centres_of_patches(tmp_path, images):
    matches = mutual_nearest(images[0].views[0].patches, images[1].views[0].patches)
    pair = PageMatches(0, 1, 0, matches)
    page = content(write_patch_page(tmp_path / "p.html", models=[model(images)], images=images, matches=[pair]).path)[1]
    assert page.count('stroke-width=".26"') == min(len(matches.first), 40) > 0
    assert f"{len(matches.first)} pairs" in page
    row, column = matches.first[0].tolist()
    x, y = (column + 0.5) / 6 * 49, (row + 0.5) / 4 * 49 * 40 / 60
    assert f'x1="{x:.2f}" y1="{y:.2f}"' in page


def test_names_never_become_markup(tmp_path):
    images = [image(0, name="</script><b>&.jpg")]
    page = content(write_patch_page(tmp_path / "p.html", models=[model(images, name="<i>")], images=images).path)[1]
    assert "<b>&" not in page and "<i>" not in re.sub(r'<i id="scale-bar"></i>', "", page)
    assert html.escape("</script><b>&.jpg") in page


def test_features_are_shortened_until_they_fit_and_the_page_says_what_that_cost(tmp_path, monkeypatch, images):
    monkeypatch.setattr(patch_page, "_PATCH_BYTES", 4 * 6 * 3 * (16 + 8 + 4))
    wide = [PageImage(one.name, one.picture, (view(dim=64, seed=i),)) for i, one in enumerate(images)]
    written = write_patch_page(tmp_path / "p.html", models=[model(wide)], images=wide)
    data, page = content(written.path)
    assert written.dims == (20,)
    assert len(base64.b64decode(data["images"][0]["panes"][0]["features"])) == 4 * 6 * 20
    assert f"{written.largest_error:.1g}" in page and "the 20 strongest directions of all 64 numbers" in page


def test_what_does_not_fit_at_all_is_refused(tmp_path, monkeypatch, images):
    monkeypatch.setattr(patch_page, "_PATCH_BYTES", 1000)
    with pytest.raises(DataError, match="72 patches are too many for one page"):
        write_patch_page(tmp_path / "p.html", models=[model(images)], images=images)
    with pytest.raises(DataError, match="1 to 12 images, got 13"):
        write_patch_page(tmp_path / "p.html", models=[model(images)], images=images * 4 + images[:1])
    assert list(tmp_path.iterdir()) == []


def test_shortening_features_of_few_directions_costs_nothing():
    patches = torch.randn(6, 7, 4) @ torch.randn(4, 64)
    (short,), error = quantised_features([patches], 4)
    assert short.shape == (6, 7, 4) and short.dtype == torch.int8
    assert error < 0.02


def test_pictures_that_do_not_compress_are_made_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_page, "_PICTURE_BYTES", 3_000)
    one = image(0)
    large = PageImage("noise", one.picture.resize((600, 400), Image.Resampling.NEAREST), one.views)
    page = content(write_patch_page(tmp_path / "p.html", models=[model([large])], images=[large]).path)[1]
    encoded = re.search(r"data:image/jpeg;base64,([^\"]+)", page)[1]
    assert len(base64.b64decode(encoded)) <= 3_000


def test_the_parts_together_stay_below_the_limit():
    assert (patch_page.MOST_IMAGES * patch_page._PICTURE_BYTES + patch_page._PATCH_BYTES) * 4 / 3 + 500_000 < PAGE_LIMIT


def in_browser(path, script):
    """What `script`, run at the end of the page in a headless browser, returns."""
    page = path.read_text(encoding="utf-8")
    end = page.rindex("</body>")
    call = f"document.body.dataset.result = JSON.stringify((() => {{ {script} }})());"
    tried = path.with_name("tried.html")
    tried.write_text(f"{page[:end]}<script>{call}</script>{page[end:]}", encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom", tried.as_uri()]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    ended = subprocess.run([BROWSER, profile, *words], capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'data-result="([^"]*)"', ended.stdout)[1]))


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium to open the page in")
def test_a_click_compares_its_patch_with_every_image_and_arrow_keys_move_it(tmp_path, images):
    written = write_patch_page(tmp_path / "p.html", models=[model(images)], images=images)
    result = in_browser(
        written.path,
        """
        const stage = document.getElementById("stage-1-0"), box = stage.getBoundingClientRect();
        const before = panes[2].canvas.toDataURL();
        stage.dispatchEvent(new MouseEvent("click", { bubbles: true,
          clientX: box.left + box.width * 3.5 / 6, clientY: box.top + box.height * 2.5 / 4 }));
        const clicked = { maps: panes.map(pane => Array.from(pane.similar)),
          said: document.getElementById("said").textContent,
          changed: before !== panes[2].canvas.toDataURL(), mark: stage.querySelector(".mark").style.left };
        stage.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
        return { ...clicked, moved: Array.from(panes[2].similar) };
        """,
    )
    query = images[1].views[0].patches
    for found, one in zip(result["maps"], images, strict=True):
        exact = similarity_map(one.views[0].patches, query[2, 3]).flatten()
        assert torch.tensor(found) == pytest.approx(exact.numpy(), abs=0.02)
    moved = similarity_map(images[2].views[0].patches, query[2, 2]).flatten()
    assert torch.tensor(result["moved"]) == pytest.approx(moved.numpy(), abs=0.02)
    assert result["changed"] and result["mark"] == "50%"
    assert result["said"].startswith("Patch in row 3, column 4 of image 1.jpg. Most similar elsewhere: image 0.jpg 0.")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium to open the page in")
def test_every_view_of_the_page_draws_and_no_error_is_thrown(tmp_path, images):
    two = [PageImage(one.name, one.picture, (*one.views, view(3, 5, 8, seed=7))) for one in images]
    models = [model(two, name="first"), model(two, name="second", m=1)]
    written = write_patch_page(tmp_path / "p.html", models=models, images=two)
    result = in_browser(
        written.path,
        """
        const found = {};
        for (const name of ["pca", "attention", "norm", "image", "similarity"]) {
          document.getElementById("view-" + name).click();
          found[name] = panes.map(pane => pane.canvas.style.display + pane.canvas.toDataURL().length);
        }
        return { found, loaded: [...document.images].every(img => img.naturalWidth > 0), size: panes[1].canvas.width,
          heads: document.querySelectorAll("canvas[data-head]").length };
        """,
    )
    assert all(entry.startswith("none") for entry in result["found"]["image"])
    for name in ("pca", "attention", "norm", "similarity"):
        assert all(entry.startswith("block") for entry in result["found"][name])
    assert result["loaded"] and result["size"] == 5 and result["heads"] == 3 * 2 * 3
