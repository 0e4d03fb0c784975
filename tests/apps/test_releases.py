"""The table of releases, and a check of its addresses against a server of our own."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dinov2.apps import releases as module
from dinov2.apps.releases import as_documents, check_releases, list_releases
from dinov2.errors import ConfigError, DinoError
from dinov2.models.releases import BASE_URL, RELEASES


class Handler(BaseHTTPRequestHandler):
    """Knows all files but those in `faults`; counts what it was asked."""

    faults: dict[str, int | str] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        fault = self.faults.get(self.path.rpartition("/")[2], 200)
        if fault == "slow":
            time.sleep(1.0)
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Type", "text/html" if fault == "page" else "application/octet-stream")
        self.send_header("Content-Length", "88283115")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    """A server to which every address of the table leads."""
    monkeypatch.setattr(Handler, "faults", {})
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ask = urllib.request.urlopen
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 16)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()

        def to_us(request: urllib.request.Request, timeout: float) -> object:
            assert request.full_url.startswith(BASE_URL) and request.get_method() == "HEAD"
            here = request.full_url.replace(BASE_URL, f"http://127.0.0.1:{running.server_port}")
            return ask(urllib.request.Request(here, method="HEAD"), timeout=timeout)

        monkeypatch.setattr(urllib.request, "urlopen", to_us)
        yield Handler
        running.shutdown()


def test_all_rows_or_those_of_a_kind_are_listed() -> None:
    assert list_releases() == RELEASES
    assert [row.name for row in list_releases("mask2former")] == ["dinov2_vitg14_ade20k_m2f"]
    with pytest.raises(ConfigError, match="no kind of release called 'head'; choose one of backbone, classifier"):
        list_releases("head")


def test_every_address_is_asked_once_and_answers_come_in_order(server: type[Handler]) -> None:
    seen: list[tuple[int, int]] = []
    answers = check_releases(RELEASES, progress=lambda done, total: seen.append((done, total)))
    assert [answer.release for answer in answers] == list(RELEASES)
    assert {(answer.size, answer.fault) for answer in answers} == {(88283115, None)}
    assert sorted(server.asked) == sorted(row.url.removeprefix(BASE_URL) for row in RELEASES)
    assert seen[-1] == (65, 65)


def test_addresses_that_do_not_answer_are_told_apart(server: type[Handler]) -> None:
    rows = list_releases("backbone")[:4]
    server.faults = {rows[0].filename: 404, rows[1].filename: "page", rows[2].filename: "slow"}
    answers = check_releases(rows, time_limit=0.4)
    assert [answer.fault for answer in answers] == [
        "404 Not Found",
        "a web page and no file",
        "no answer within 0.4 s",
        None,
    ]


def test_without_a_network_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(request: object, timeout: float) -> object:
        raise urllib.error.URLError(OSError(101, "Network is unreachable"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(DinoError, match=r"none of the 8 addresses can be reached \(Network is unreachable\); check"):
        check_releases(list_releases("backbone"))


def test_nothing_runs_on_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def slow(request: object, timeout: float) -> object:
        asked.append(request)
        time.sleep(0.5)
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", slow)
    with pytest.raises(DinoError, match="none of the 65 addresses"):
        check_releases(RELEASES, time_limit=0.2)
    assert len(asked) <= module._AT_ONCE


def test_documents_are_plain_values_with_the_answers(server: type[Handler]) -> None:
    rows = list_releases("classifier")
    plain = json.loads(json.dumps(as_documents(rows)))
    assert plain[0]["name"] == "dinov2_vits14_linear_head" and plain[0]["hub_name"] == "dinov2_vits14_lc"
    assert plain[0]["accuracy"][0]["value"] == 81.1 and "fault" not in plain[0]
    assert all(document["sha256"] is None for document in plain), "no checksum is known"
    checked = as_documents(rows, check_releases(rows))
    assert {(document["size"], document["fault"]) for document in checked} == {(88283115, None)}
