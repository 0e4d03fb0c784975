"""Whatever a server does: the folder holds the whole file or none, and what has arrived is not fetched twice."""

import hashlib
import json
import socket
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request

import pytest

from dinov2.checkpoints import download as transfer
from dinov2.checkpoints.download import download
from dinov2.errors import DinoError, WeightsError
from tests.checkpoints.download.server import CONTENT, OTHER, Server, assert_whole, interrupted, names


def test_a_file_is_fetched_once_and_reported_on(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = download(server.url(), folder=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "weights.pth"
    assert_whole(path)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert download(server.url(), folder=tmp_path) == path
    assert len(server.requests) == 1


def test_a_checksum_is_compared_in_any_case(server: Server, tmp_path: Path) -> None:
    assert_whole(download(server.url(), folder=tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest().upper()))


@pytest.mark.parametrize("faults", [["drop40"], ["drop40", "drop10", "drop20"], ["drop0"], ["stall", "stall"]])
def test_a_broken_connection_is_continued_where_it_ended(server: Server, tmp_path: Path, faults: list[str]) -> None:
    server.faults = list(faults)
    assert_whole(download(server.url(), folder=tmp_path, timeout=0.3))
    assert len(server.requests) == len(faults) + 1
    if faults != ["drop0"]:
        assert server.requests[-1]["Range"].startswith("bytes=") and server.requests[-1]["If-Range"] == '"one"'


@pytest.mark.parametrize("fault", ["silent", "hang up", "503", "429", "chunked cut", "wrong part"])
def test_a_failure_that_passes_is_tried_again(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults = ["drop30", fault] if fault == "wrong part" else [fault]
    assert_whole(download(server.url(), folder=tmp_path, timeout=0.3))


def test_what_an_earlier_call_left_is_continued(server: Server, tmp_path: Path) -> None:
    server.faults = ["drop50", *["hang up"] * 10]
    with pytest.raises(DinoError, match=r"the connection ended after|Remote end closed") as failure:
        download(server.url(), folder=tmp_path)
    assert "(the 0.5 MB that have arrived are kept and continued)" in str(failure.value)
    assert names(tmp_path) == ["weights.pth.partial", "weights.pth.partial.json"]
    server.faults = []
    assert_whole(download(server.url(), folder=tmp_path))
    assert server.requests[-1]["Range"] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("fault", ["", "ignores If-Range"])
def test_a_file_that_changed_in_between_is_fetched_anew(server: Server, tmp_path: Path, fault: str) -> None:
    interrupted(server, tmp_path)
    server.content, server.etag, server.faults = OTHER, '"two"', [fault]
    assert_whole(download(server.url(), folder=tmp_path), OTHER)


def test_a_date_stands_in_for_a_missing_or_weak_etag(server: Server, tmp_path: Path) -> None:
    server.etag, server.date = 'W/"weak"', "Sat, 01 Jan 2022 00:00:00 GMT"
    interrupted(server, tmp_path)
    assert_whole(download(server.url(), folder=tmp_path))
    assert server.requests[-1]["If-Range"] == server.date


def test_without_etag_and_date_a_part_is_not_trusted(server: Server, tmp_path: Path) -> None:
    server.etag = None
    interrupted(server, tmp_path)
    server.content = OTHER
    assert_whole(download(server.url(), folder=tmp_path), OTHER)
    assert "Range" not in server.requests[-1]


def test_a_server_without_ranges_is_asked_from_the_start(server: Server, tmp_path: Path) -> None:
    server.ranges, server.faults = False, ["drop40", "drop60"]
    assert_whole(download(server.url(), folder=tmp_path))


def test_a_server_that_never_gets_further_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges, server.faults = False, ["drop40"] * 100
    with pytest.raises(DinoError, match="the connection ended after"):
        download(server.url(), folder=tmp_path)
    assert len(server.requests) == 5
    assert "weights.pth" not in names(tmp_path)


@pytest.mark.parametrize(
    "left", [b"", CONTENT[:1000], CONTENT + b"more", CONTENT], ids=["nothing", "part", "too long", "whole"]
)
@pytest.mark.parametrize("notes", [None, "{", '{"url": "http://other", "validator": "\\"one\\"", "total": 1048576}'])
def test_leftovers_of_any_kind_do_no_harm(server: Server, tmp_path: Path, left: bytes, notes: str | None) -> None:
    (tmp_path / "weights.pth.partial").write_bytes(left[::-1])
    if notes:
        (tmp_path / "weights.pth.partial.json").write_text(notes)
    assert_whole(download(server.url(), folder=tmp_path))


def test_a_part_that_is_already_whole_only_gets_its_name(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    (tmp_path / "weights.pth.partial").write_bytes(CONTENT)
    asked = len(server.requests)
    assert_whole(download(server.url(), folder=tmp_path))
    assert len(server.requests) == asked


def test_redirects_are_followed_also_when_resuming(server: Server, tmp_path: Path) -> None:
    server.faults = ["redirect", "drop40", "redirect"]
    assert_whole(download(server.url(), folder=tmp_path))
    assert "Range" in server.requests[-1]


def test_a_stream_in_chunks_is_taken_when_it_ends_properly(server: Server, tmp_path: Path) -> None:
    server.faults = ["chunked"]
    assert_whole(download(server.url(), folder=tmp_path))


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("404", "it answered 404 Not Found; check the address"),
        ("403", "it answered 403 Forbidden"),
        ("page", "answers with a web page instead of a weight file"),
        ("page as bytes", "answers with a web page instead of a weight file"),
        ("empty", "is an empty file"),
        ("no length", "does not say how long weights.pth is"),
    ],
)
def test_what_is_no_weight_file_is_refused_and_not_kept(
    server: Server, tmp_path: Path, fault: str, sentence: str
) -> None:
    server.faults = [fault]
    with pytest.raises(WeightsError, match=sentence):
        download(server.url(), folder=tmp_path)
    assert names(tmp_path) == []


def test_a_circle_of_redirects_is_an_error(server: Server, tmp_path: Path) -> None:
    server.faults = ["circle"] * 50
    with pytest.raises(DinoError, match="round in circles"):
        download(server.url(), folder=tmp_path)
    assert names(tmp_path) == []


def test_a_redirect_from_https_to_http_is_not_followed() -> None:
    redirects, headers = transfer._SafeRedirects(), Message()
    safe = Request("https://host/file.pth")
    assert redirects.redirect_request(safe, None, 302, "Found", headers, "https://other/file.pth") is not None
    with pytest.raises(HTTPError):
        redirects.redirect_request(safe, None, 302, "Found", headers, "http://other/file.pth")


def test_a_login_page_does_not_cost_the_part_that_is_there(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    server.faults = ["page"]
    with pytest.raises(WeightsError, match="web page"):
        download(server.url(), folder=tmp_path)
    assert (tmp_path / "weights.pth.partial").stat().st_size == len(CONTENT) // 2
    assert_whole(download(server.url(), folder=tmp_path))


def test_another_checksum_is_refused_and_the_file_removed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="damaged or another file, and was removed"):
        download(server.url(), folder=tmp_path, sha256="0" * 64)
    assert names(tmp_path) == []


def test_a_cached_file_with_another_checksum_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(OTHER)
    assert_whole(download(server.url(), folder=tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest()))


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("http://127.0.0.1:9/weights.pth", r"\(Connection refused\)"),
        ("http://no-such-host.invalid/weights.pth", "no such host, or no network"),
    ],
)
def test_no_network_is_one_sentence_with_the_place_for_the_file(
    server: Server, tmp_path: Path, url: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, *rest: object, real: object = socket.getaddrinfo, **options: object) -> object:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(DinoError, match=sentence) as failure:
        download(url, folder=tmp_path)
    assert not isinstance(failure.value, WeightsError), "not the fault of what the user gave"
    assert f"put the file at {tmp_path / 'weights.pth'} yourself" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/file.pth", "weights.pth", "http://[::1/x", "http://", "https:///x"]
)
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(WeightsError, match="is no http or https address; give a path"):
        download(url, folder=tmp_path)
    assert names(tmp_path) == []


def test_the_notes_beside_a_part_say_what_it_is_a_part_of(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    notes = json.loads((tmp_path / "weights.pth.partial.json").read_text())
    assert notes == {"url": server.url(), "validator": '"one"', "total": len(CONTENT)}
