from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dinov2.analysis.pca import fit_foreground_pca, fit_image_pca, fit_pca, load_pca, match_colours, save_pca
from dinov2.errors import DataError


def cloud(n=400):
    """Points spread 4, 2, 1 and 0.1 along rotated axes, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    coordinates = torch.randn(n, 4, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.1])
    return (coordinates @ axes.T + 100).float(), axes.T.float()


def test_components_are_the_axes_of_a_stretched_cloud():
    points, axes = cloud()
    basis = fit_pca(points)
    assert_close((basis.components @ axes[:3].T).abs(), torch.eye(3), atol=0.1, rtol=0)
    assert_close(basis.components @ basis.components.T, torch.eye(3), atol=1e-5, rtol=0)
    assert_close(basis.explained, torch.tensor([16, 4, 1]) / 21.01, atol=0.05, rtol=0)


def test_projections_equal_those_of_a_singular_value_decomposition():
    points, _ = cloud()
    basis = fit_pca(points)
    centred = points.double() - points.double().mean(dim=0)
    _, _, v = torch.linalg.svd(centred, full_matrices=False)
    assert_close(basis.project(points).abs(), (centred @ v[:3].T).abs().float(), atol=1e-3, rtol=0)


def test_the_sign_does_not_depend_on_the_order_of_rows():
    points, _ = cloud()
    assert_close(fit_pca(points).components, fit_pca(points.flip(0)).components, atol=1e-5, rtol=0)
    basis = fit_pca(points)
    assert bool((basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True)) > 0).all())


def test_colours_span_the_unit_range_and_outliers_are_clipped():
    points, _ = cloud()
    colours = fit_pca(points).to_rgb(torch.cat([points, points[:1] * 1000]))
    assert colours.shape == (401, 3)
    assert colours.min() == 0 and colours.max() == 1
    assert 0.3 < colours[:400].mean() < 0.7


def test_a_map_keeps_its_grid():
    points, _ = cloud()
    assert fit_pca(points).to_rgb(points.view(4, 10, 10, 4)).shape == (4, 10, 10, 3)


def test_equal_features_have_equal_colours_in_every_picture():
    points, _ = cloud()
    basis = fit_pca(points)
    assert torch.equal(basis.to_rgb(points[5:6]), basis.to_rgb(points)[5:6])


def test_identical_features_give_one_finite_colour():
    colours = fit_pca(torch.ones(8, 4)).to_rgb(torch.ones(8, 4))
    assert bool(colours.isfinite().all())


def test_two_dimensional_features_still_give_three_channels():
    assert fit_pca(torch.rand(9, 2)).to_rgb(torch.rand(9, 2)).shape == (9, 3)


def test_a_basis_survives_its_file(tmp_path):
    points, _ = cloud()
    basis = fit_pca(points)
    save_pca(tmp_path / "basis.safetensors", basis)
    assert torch.equal(load_pca(tmp_path / "basis.safetensors").to_rgb(points), basis.to_rgb(points))


def test_a_file_that_holds_no_basis_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(DataError, match="holds no PCA basis"):
        load_pca(tmp_path / "x")


@pytest.mark.parametrize(
    ("features", "message"), [(torch.rand(1, 4), "at least two rows"), (torch.full((3, 4), torch.nan), "diverged")]
)
def test_features_without_components_are_refused(features, message):
    with pytest.raises(DataError, match=message):
        fit_pca(features)


def test_a_later_basis_is_matched_to_an_earlier_one():
    points, _ = cloud()
    basis = fit_pca(points)
    # The same cloud, mirrored and with its axes weighted so that the two strongest swap their rank.
    shares = torch.tensor([0.2, 1.0, -1.0])
    changed = (basis.project(points) * shares) @ basis.components + basis.mean
    fitted = fit_pca(changed)
    matched = match_colours(fitted, changed, basis.project(points))
    expected = basis.project(points) * shares.abs()
    # Signs of the features themselves flip along the third axis, which the matched basis undoes.
    assert_close(matched.project(changed), expected - expected.mean(dim=0), atol=1e-2, rtol=0)
    assert_close(matched.to_rgb(changed), basis.to_rgb(points), atol=2e-2, rtol=0)


def scenes(n=3, seed=0):
    """Maps of an object in the middle whose parts differ, before a plain background that touches the border."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for i in range(n):
        map_ = 0.05 * torch.randn(8, 10 + i, 6, generator=generator)
        map_[2:6, 3:7, 0] += 5.0  # object
        map_[2:6, 3:5, 1] += 2.0  # its left part
        maps.append(map_)
    return maps


def test_one_basis_over_images_is_that_of_all_their_patches():
    maps = scenes()
    together = fit_pca(torch.cat([map_.flatten(0, 1) for map_ in maps]))
    assert_close(fit_image_pca(maps).components, together.components)


def test_a_basis_needs_an_image():
    with pytest.raises(DataError, match="at least one image"):
        fit_image_pca([])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_foreground_is_what_does_not_touch_the_border_whatever_the_sign(sign):
    maps = [sign * map_ for map_ in scenes()]
    basis = fit_foreground_pca(maps)
    for map_ in maps:
        expected = torch.zeros(map_.shape[:2], dtype=torch.bool)
        expected[2:6, 3:7] = True
        assert torch.equal(basis.foreground_mask(map_), expected)


def test_colours_of_a_foreground_are_spent_on_its_parts():
    maps = scenes()
    basis = fit_foreground_pca(maps)
    assert abs(basis.components[0, 1]) > 0.99  # not the direction from background to object, which is 0
    assert fit_image_pca(maps).components[0].abs().argmax() == 0


def test_without_a_split_everything_is_foreground():
    assert bool(fit_image_pca(scenes()).foreground_mask(scenes()[0]).all())


def test_a_foreground_that_cannot_be_told_is_refused():
    with pytest.raises(DataError, match="no foreground can be told"):
        fit_foreground_pca([torch.ones(4, 4, 6)])


def test_a_basis_with_its_foreground_and_origin_survives_its_file(tmp_path):
    maps = scenes()
    basis = replace(fit_foreground_pca(maps), fitted_on="a model, last block")
    save_pca(tmp_path / "basis.safetensors", basis)
    again = load_pca(tmp_path / "basis.safetensors")
    assert again.fitted_on == "a model, last block"
    assert torch.equal(again.foreground_mask(maps[0]), basis.foreground_mask(maps[0]))
    assert torch.equal(again.to_rgb(maps[0]), basis.to_rgb(maps[0]))


def test_a_basis_of_half_precision_features_is_nearly_the_same():
    maps = scenes()
    halves = fit_image_pca([map_.half() for map_ in maps])
    assert_close(halves.components, fit_image_pca(maps).components, atol=1e-2, rtol=0)
