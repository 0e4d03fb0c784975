"""Resizing by matrices equals the framework's bicubic operator under both rules."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dinov2.layers.pos_embed import cubic_resize_matrix, resize_pos_embed


@pytest.mark.parametrize("native", [(16, 16), (37, 37), (5, 9)])
@pytest.mark.parametrize("grid", [(16, 16), (7, 7), (1, 3), (40, 23), (37, 37), (16, 9), (5, 16), (37, 9)])
@pytest.mark.parametrize("offset, antialias", [(0.1, False), (0.0, False), (0.0, True), (0.1, True)])
def test_two_matrices_equal_bicubic_interpolation(native, grid, offset, antialias):
    embedding = torch.randn(1, 1 + native[0] * native[1], 6)
    resized = resize_pos_embed(embedding, native, grid, offset=offset, antialias=antialias)
    if grid == native:
        assert resized is embedding
        return
    picture = embedding[:, 1:].unflatten(1, native).permute(0, 3, 1, 2)
    how = (
        {"scale_factor": ((grid[0] + offset) / native[0], (grid[1] + offset) / native[1])} if offset else {"size": grid}
    )
    expected = F.interpolate(picture, mode="bicubic", antialias=antialias, align_corners=False, **how)
    assert_close(resized[:, 1:], expected.flatten(2).transpose(1, 2), atol=2e-5, rtol=0)
    assert_close(resized[:, :1], embedding[:, :1], atol=0, rtol=0)


@pytest.mark.parametrize(
    "offset, antialias, expected",
    [
        (0.1, False, [[1.559358, 2.901067, 4.238923], [9.915390, 11.257102, 12.594954]]),
        (0.0, False, [[1.751158, 3.125000, 4.498844], [10.501160, 11.875000, 13.248845]]),
        (0.0, True, [[2.537039, 3.847107, 5.157176], [9.842823, 11.152892, 12.462962]]),
    ],
)
def test_the_worked_example_of_the_release(offset, antialias, expected):
    grid = torch.arange(16.0).reshape(4, 4)
    rows = cubic_resize_matrix(4, 2, offset=offset, antialias=antialias)
    columns = cubic_resize_matrix(4, 3, offset=offset, antialias=antialias)
    assert_close(rows @ grid @ columns.T, torch.tensor(expected), atol=1e-5, rtol=0)


def test_gradients_reach_the_embedding():
    embedding = torch.randn(1, 17, 2, dtype=torch.float64, requires_grad=True)
    resize_pos_embed(embedding, (4, 4), (2, 3)).sum().backward()
    assert embedding.grad.abs().sum() > 0
