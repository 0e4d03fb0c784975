import pytest
import torch
from torch.testing import assert_close

from dinov2.errors import DataError
from dinov2.features.pca import fit_pca, load_pca, match_colours, save_pca


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
