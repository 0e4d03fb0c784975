"""Weight files fetched once: cached, resumed, checked, and never found half-written. Standard library only.

Bytes go to `<name>.partial`, which becomes `<name>` in one rename when all of them are there. What is left of an
interrupted download is continued by a Range request, if the server confirms by its ETag or date that the file is still
the same one. A lock of the operating system makes a second process wait for the first one's file.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from dinov2.errors import DinoError, WeightsError
from dinov2.file_lock import lock_file
from dinov2.models.releases import BASE_URL
from dinov2.whole_files import read_json

__all__ = ["cache_folder", "cached_path", "download"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_BLOCK = 1 << 20
_ATTEMPTS = 5
_PAUSE = 0.5
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED}


def cache_folder() -> Path:
    """`$DINOV2_CACHE`, else the folder in which `torch.hub` keeps checkpoints, and may have put these files already."""
    if chosen := os.environ.get("DINOV2_CACHE"):
        return Path(chosen).expanduser()
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_path(url: str, *, folder: str | os.PathLike[str] | None = None) -> Path:
    """Place of a downloaded file. Released files have their own name, as `torch.hub` stores them.

    Others get a mark of their address in the cache, because two addresses may end in the same name.
    """
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", unquote(urlsplit(url).path.rpartition("/")[2])) or "download"
    if folder is not None:
        return Path(folder).expanduser() / name
    if not url.startswith(f"{BASE_URL}/"):
        stem, dot, suffix = name.rpartition(".")
        mark = hashlib.sha256(url.encode()).hexdigest()[:10]
        name = f"{stem}-{mark}.{suffix}" if dot else f"{name}-{mark}"
    return cache_folder() / name


def download(
    url: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = 30.0,
) -> Path:
    """The path of the file behind an http(s) address, fetched unless it is there already.

    Args:
        url: the address.
        folder: where to keep the file under its own name; None is the cache.
        sha256: what the file must hash to; a file that does not is removed.
        progress: called with (bytes there, bytes in all).
        timeout: seconds without a single byte after which the connection counts as lost and is made again.

    Raises:
        WeightsError: there is no such file, a web page came instead of it, or it is not what `sha256` says.
        DinoError: no network, a server that keeps failing, or a disk that is full or refuses. What has arrived is kept,
            and the next call goes on from there.
    """
    if not re.match(r"https?://[^/?#\[\]\s]+(/|$)", url):
        raise WeightsError(f"{url} is no http or https address; give a path for a file on this machine")
    target = cached_path(url, folder=folder)
    if _is_there(target, sha256):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(target.with_name(f"{target.name}.lock")) as alone:
            if not _is_there(target, sha256):  # another process may have fetched it while this one waited
                _Transfer(url, target, progress, timeout, shared=not alone).run(sha256)
    except OSError as error:
        raise _disk_error(error, target) from error
    return target


def _is_there(target: Path, sha256: str | None) -> bool:
    return target.is_file() and _size_of(target) > 0 and (sha256 is None or _sha256_of(target) == sha256.lower())


def _disk_error(error: OSError, target: Path) -> DinoError:
    if error.errno in _DISK_FULL:
        kept = _what_is_kept(target.with_name(f"{target.name}.partial"))
        return DinoError(
            f"the disk of {target.parent} is full, {target.name} does not fit; free some space and try again{kept}, or "
            "choose another folder in the environment variable DINOV2_CACHE"
        )
    return DinoError(
        f"{target} cannot be written ({error.strerror or error}); choose another folder in the environment variable "
        "DINOV2_CACHE"
    )


class _Broken(Exception):
    """A connection failed in a way that may pass; the text says how."""

    def __init__(self, reason: object) -> None:
        super().__init__(_words(reason))
        self.no_way = isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) in _NO_WAY


class _Version(NamedTuple):
    """Identity of the file that the bytes of a partial download belong to."""

    url: str
    validator: str | None
    """A strong ETag, or a date, by which the server recognises its file."""
    total: int | None


class _Transfer:
    """A download of `url` to `target`; `progress` and `timeout` as in `download`.

    Only one process at a time may work on a target, unless it is `shared`: then each has a part of its own.
    """

    def __init__(
        self, url: str, target: Path, progress: Callable[[int, int], None] | None, timeout: float, *, shared: bool
    ) -> None:
        self.url = url
        self.host = urlsplit(url).netloc
        self.target = target
        mark = f".{os.getpid()}" if shared else ""  # without a lock nothing may be shared with other processes
        self.partial = target.with_name(f"{target.name}{mark}.partial")
        self.notes = target.with_name(f"{self.partial.name}.json")
        self.progress = progress
        self.timeout = timeout
        self.version = _Version(url, None, None)

    def run(self, sha256: str | None) -> None:
        """Leaves the whole file at `target`. Raises as `download` does, and `OSError` when the disk refuses."""
        best, failures, ever_answered = self._resume(), 0, False
        while True:
            try:
                self._fetch()
                break
            except _Broken as error:
                size = _size_of(self.partial)
                ever_answered = ever_answered or not error.no_way
                # Only bytes beyond all earlier attempts count, or a server that cannot resume would be asked for ever.
                failures = 1 if size > best else failures + 1
                best = max(best, size)
                if failures >= _ATTEMPTS or not ever_answered:
                    raise DinoError(self._failure(str(error))) from error
                time.sleep(_PAUSE * 2 ** (failures - 1))
        self._check(sha256)
        os.replace(self.partial, self.target)
        self.notes.unlink(missing_ok=True)

    def _resume(self) -> int:
        """Size of what an earlier download left, if it can be continued; what cannot is removed."""
        try:
            version = _Version(**read_json(self.notes, dict))
        except (OSError, ValueError, TypeError):
            version = self.version
        if version.url == self.url and version.validator and _size_of(self.partial) <= (version.total or 0):
            self.version = version
        else:
            self._start_over()
        return _size_of(self.partial)

    def _start_over(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.version = _Version(self.url, None, None)

    def _fetch(self) -> None:
        """One connection; returns when the partial file is complete."""
        start = _size_of(self.partial)
        if start and start == self.version.total:
            return
        headers = {"User-Agent": "dinov2-anywhere", "Accept-Encoding": "identity"}
        if start and self.version.validator:
            headers |= {"Range": f"bytes={start}-", "If-Range": self.version.validator}
        with self._open(headers) as answer:
            if answer.status != 206:
                first = self._read(answer)
                self._refuse_a_page(answer, first)
                self._start_over()
                self.version = self._version_of(answer)
                self.notes.write_text(json.dumps(self.version._asdict()), encoding="utf-8")
                self._receive(answer, first, 0)
            elif self._continues(answer, start):
                self._receive(answer, self._read(answer), start)
            else:
                self._start_over()
                raise _Broken("it sent another part of the file than the one asked for")

    def _open(self, headers: dict[str, str]) -> Any:
        opener = urllib.request.build_opener(_SafeRedirects)  # here, for it reads proxies from the environment
        try:
            return opener.open(urllib.request.Request(self.url, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refusal(error) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise DinoError(
                    f"the certificate of {self.host} cannot be verified ({error.reason.verify_message}); set "
                    f"SSL_CERT_FILE to your network's certificates, or put the file at {self.target} yourself"
                ) from error
            raise _Broken(error.reason) from error
        except (http.client.InvalidURL, ValueError) as error:
            raise WeightsError(f"{self.url} is no usable address ({error}); check it") from error
        except (http.client.HTTPException, OSError) as error:
            raise _Broken(error) from error

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        if error.code == 416:  # the file has become shorter than what is here
            self._start_over()
            return _Broken("it does not have the rest of the file")
        if error.code in _TRY_AGAIN:
            return _Broken(f"it answered {error.code} {error.reason}")
        if 300 <= error.code < 400:
            return DinoError(f"{self.url} leads round in circles or to an unsafe address; check the address")
        return WeightsError(f"{self.url} cannot be had: it answered {error.code} {error.reason}; check the address")

    def _continues(self, answer: Any, start: int) -> bool:
        """Whether a part is the missing end of the very file whose beginning is here."""
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
        etag, known = answer.headers.get("ETag"), self.version.validator or ""
        same = not known.startswith('"') or etag in (None, known)
        return same and match is not None and (int(match[1]), int(match[2])) == (start, self.version.total)

    def _version_of(self, answer: Any) -> _Version:
        length = answer.headers.get("Content-Length", "")
        if not length.isdigit():
            if answer.chunked:  # ends visibly, but cannot be continued
                return _Version(self.url, None, None)
            raise WeightsError(
                f"{self.host} does not say how long {self.target.name} is, so that a broken download could not be told "
                f"from a whole one; fetch {self.url} by other means and give its path"
            )
        etag = answer.headers.get("ETag", "")
        return _Version(self.url, etag if etag.startswith('"') else answer.headers.get("Last-Modified"), int(length))

    def _receive(self, answer: Any, block: bytes, done: int) -> None:
        total = self.version.total
        missing = (total or 0) - done
        if shutil.disk_usage(self.target.parent).free < missing:
            raise OSError(errno.ENOSPC, "the rest of the file does not fit")
        with open(self.partial, "ab", buffering=0) as file:
            while block:
                _write(file, block)
                done += len(block)
                if self.progress is not None:
                    self.progress(done, total or done)
                block = b"" if done == total else self._read(answer)
            try:
                os.fsync(file.fileno())
            except OSError:
                self._start_over()  # nobody knows which of the bytes are on the disk
                raise
        if total is not None and done != total:
            raise _Broken(f"the connection ended after {done} of {total} bytes")

    def _read(self, answer: Any) -> bytes:
        try:
            block: bytes = answer.read1(_BLOCK)
        except (http.client.HTTPException, OSError) as error:
            raise _Broken(error) from error
        return block

    def _refuse_a_page(self, answer: Any, block: bytes) -> None:
        start = block.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
        is_page = answer.headers.get_content_type() in ("text/html", "application/xhtml+xml")
        if is_page or start.startswith((b"<!doctype html", b"<html")):
            raise WeightsError(
                f"{self.url} answers with a web page instead of a weight file; check the address, and whether it or "
                "your network wants a login"
            )

    def _check(self, sha256: str | None) -> None:
        if _size_of(self.partial) == 0:
            self._start_over()
            raise WeightsError(f"{self.url} is an empty file; check the address")
        if sha256 is not None and (found := _sha256_of(self.partial)) != sha256.lower():
            self._start_over()
            raise WeightsError(
                f"{self.url} hashes to {found[:16]}... and not to {sha256[:16].lower()}... (SHA-256): it is damaged or "
                "another file, and was removed; try again, or check the address"
            )

    def _failure(self, reason: str) -> str:
        kept = _what_is_kept(self.partial)
        return (
            f"{self.target.name} cannot be downloaded from {self.host} ({reason}); check the network and try again"
            f"{kept}, or put the file at {self.target} yourself"
        )


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are followed, but never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _size_of(path: Path) -> int:
    """Bytes of a file; 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def _sha256_of(path: Path) -> str:
    """Hash of a file, in lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(file: Any, block: bytes) -> None:
    left = memoryview(block)
    while left:  # an unbuffered file may take less than it is given
        left = left[file.write(left) :]


def _words(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "it stopped sending"
    if isinstance(reason, socket.gaierror):
        return "no such host, or no network"
    if isinstance(reason, http.client.IncompleteRead):
        return "the connection ended early"
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)


def _what_is_kept(partial: Path) -> str:
    """Words about a part that the next call continues; none when there is none."""
    size = _size_of(partial)
    return f" (the {size / 1e6:.1f} MB that have arrived are kept and continued)" if size else ""
