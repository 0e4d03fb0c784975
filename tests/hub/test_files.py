"""Which file an argument of an entry means, and what a user sees while it is fetched."""

import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dinov2.errors import DinoError
from dinov2.hub.backbones import Weights, dinov2_vits14, file_behind
from dinov2.models.releases import release
from tests.golden.recipe import fill

ROW = release("dinov2_vits14")


class Terminal(io.StringIO):
    """Standard error of somebody who watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a server offers what lies in `tmp_path / "served"`."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *words: None)
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_weights_come_from_an_address_with_a_line_of_progress(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 28}
    state = fill(dinov2_vits14(pretrained=False, **small)).state_dict()
    torch.save(state, tmp_path / "served" / "mine.pth")
    monkeypatch.setattr("sys.stderr", Terminal())
    model = dinov2_vits14(weights=f"{address}/mine.pth", **small)
    assert torch.equal(model.cls_token, state["cls_token"])
    import sys

    line = sys.stderr.getvalue()
    assert line.startswith("\rmine-") and line.endswith("100 % of 0 MB\n")
    monkeypatch.setattr("sys.stderr", Terminal())
    dinov2_vits14(weights=f"{address}/mine.pth", **small)
    assert sys.stderr.getvalue() == "", "it is there already"


def test_nothing_is_shown_where_nobody_watches(address: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "served" / "any.pth").write_bytes(b"PK")
    file = file_behind(f"{address}/any.pth", Weights, ROW)
    assert file.fetch().read_bytes() == b"PK" and not file.is_released
    assert capsys.readouterr() == ("", "")


def test_a_member_or_its_name_is_the_release_and_is_not_fetched_before_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("dinov2.hub.backbones.download", lambda url, **rest: asked.append(url))
    for weights in (Weights.LVD142M, "LVD142M", "Lvd142m"):
        file = file_behind(weights, Weights, ROW)
        assert file.is_released and asked == []
        file.fetch()
        assert asked == [ROW.url]
        asked.clear()


def test_without_a_network_the_sentence_names_the_place_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def nowhere(*question: object, **options: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(DinoError, match="no such host, or no network") as failure:
        dinov2_vits14()
    assert f"put the file at {tmp_path / 'dinov2_vits14_pretrain.pth'} yourself" in str(failure.value)
