"""A server that drops, stalls, redirects and lies, and what a test looks at afterwards."""

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dinov2.checkpoints.download import download
from dinov2.errors import DinoError

__all__ = ["CONTENT", "OTHER", "Server", "assert_whole", "interrupted", "names"]

CONTENT = bytes(range(256)) * 4096  # 1 MiB
OTHER = CONTENT[::-1]


class Server(ThreadingHTTPServer):
    """What it serves, and how badly; `requests` are the headers it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.date: str | None = None
        self.ranges = True
        self.faults: list[str] = []  # one for each request, then none
        self.requests: list[dict[str, str]] = []
        self.pause = 0.0

    def url(self, path: str = "weights.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients of these tests hang up


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        fault = server.faults.pop(0) if server.faults else ""
        self.close_connection = True
        if fault == "silent":
            time.sleep(1.5)
            return
        if fault == "hang up":
            return
        if fault.isdigit():
            return self.answer(int(fault), b"no")
        if fault == "page":
            return self.answer(200, b"<!DOCTYPE html><p>log in", {"Content-Type": "text/html; charset=utf-8"})
        if fault == "page as bytes":
            return self.answer(200, b"\n<HTML><p>log in", {"Content-Type": "application/octet-stream"})
        if fault == "empty":
            return self.answer(200, b"")
        if fault == "circle":
            return self.answer(302, b"", {"Location": self.path})
        if fault == "redirect":
            return self.answer(302, b"", {"Location": "/elsewhere.pth"})
        if fault == "no length":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.content)
            return None
        if fault.startswith("chunked"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            half = len(server.content) // 2
            for part in (server.content[:half], server.content[half:])[: 1 if fault == "chunked cut" else 2]:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"" if fault == "chunked cut" else b"0\r\n\r\n")
            return None
        return self.file(fault)

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, fault: str) -> None:
        content, start = self.server.content, 0
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if wanted and self.server.ranges and (fault == "ignores If-Range" or condition in self.validators()):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if fault == "416":
                return self.answer(416, b"")
            self.send_response(206)
            at = 0 if fault == "wrong part" else start
            self.send_header("Content-Range", f"bytes {at}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        if self.server.date:
            self.send_header("Last-Modified", self.server.date)
        self.end_headers()
        rest = content[start:]
        if fault.startswith("drop"):
            rest = rest[: int(fault.removeprefix("drop")) * len(content) // 100]
        for at in range(0, len(rest), 1 << 16):
            if self.server.pause:
                time.sleep(self.server.pause)
            self.wfile.write(rest[at : at + (1 << 16)])
            if fault == "stall" and at:
                self.wfile.flush()
                time.sleep(1.5)
                return None
        return None

    def validators(self) -> list[str | None]:
        return [value for value in (self.server.etag, self.server.date) if value]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def assert_whole(path: Path, content: bytes = CONTENT) -> None:
    assert path.read_bytes() == content
    assert names(path.parent) == [path.name], "nothing is left beside the file"


def interrupted(server: Server, folder: Path) -> None:
    """Leaves half of the file in `folder`."""
    server.faults = ["drop50", *["hang up"] * 10]
    with pytest.raises(DinoError):
        download(server.url(), folder=folder)
    server.faults = []
