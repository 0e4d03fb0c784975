"""Where downloads are kept."""

from pathlib import Path

import pytest
import torch

from dinov2.checkpoints.download import cache_folder, cached_path, download
from dinov2.models.releases import RELEASES


def test_the_cache_is_where_the_variable_says_else_torch_hub_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DINOV2_CACHE")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert cache_folder() == tmp_path / "hub" / "checkpoints"


def test_released_files_have_torch_hub_s_name_and_others_one_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    assert cached_path(RELEASES[0].url) == tmp_path / "dinov2_vits14_pretrain.pth"
    assert len({cached_path(row.url) for row in RELEASES}) == len(RELEASES)
    one, two = cached_path("https://a.example/model.pth"), cached_path("https://b.example/model.pth")
    assert one != two and one.suffix == two.suffix == ".pth" and one.parent == tmp_path
    assert cached_path("https://a.example/a%2Fb%3A?x=1", folder=tmp_path).name == "a_b_"


def test_a_file_that_torch_hub_has_fetched_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DINOV2_CACHE")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    there = tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth"
    there.parent.mkdir()
    there.write_bytes(b"PK")
    assert download(RELEASES[0].url) == there
