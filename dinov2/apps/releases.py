"""The table of released files, and whether their addresses answer."""

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields
from typing import NamedTuple

from dinov2.errors import ConfigError, DinoError
from dinov2.models.releases import KINDS, RELEASES, Release

__all__ = ["Answer", "as_documents", "check_releases", "list_releases"]

_AT_ONCE = 8
_TIMEOUT = 15.0


class Answer(NamedTuple):
    """Answer of the server on one file."""

    release: Release
    size: int | None
    """Bytes of the file; None where the server does not say, or did not answer."""
    fault: str | None
    """Reason why the file cannot be downloaded; None when it can."""


def list_releases(kind: str | None = None) -> tuple[Release, ...]:
    """All rows, or those of one kind. Raises `ConfigError` for a kind that there is not."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"there is no kind of release called {kind!r}; choose one of {', '.join(KINDS)}")
    return tuple(row for row in RELEASES if kind in (None, row.kind))


def check_releases(
    rows: Sequence[Release],
    *,
    time_limit: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Answer, ...]:
    """Asks for the head of every file, several at once, and says what each address answered.

    Files that have not answered after `time_limit` seconds count as faulty. Raises `DinoError` when no server could be
    reached at all.
    """
    pool, ends = ThreadPoolExecutor(_AT_ONCE), time.monotonic() + time_limit
    answers = [pool.submit(_ask, row) for row in rows]
    pending = set(answers)
    while pending and time.monotonic() < ends:
        _, pending = wait(pending, timeout=min(0.2, max(ends - time.monotonic(), 0)))
        if progress is not None:
            progress(len(answers) - len(pending), len(answers))
    pool.shutdown(wait=False, cancel_futures=True)
    found = [
        (Answer(row, None, f"no answer within {time_limit:g} s"), False) if answer in pending else answer.result()
        for row, answer in zip(rows, answers, strict=True)
    ]
    if found and not any(reached for _, reached in found):
        raise DinoError(
            f"none of the {len(found)} addresses can be reached ({found[0][0].fault}); check the network and try again"
        )
    return tuple(answer for answer, _ in found)


def as_documents(rows: Sequence[Release], answers: Sequence[Answer] | None = None) -> list[dict[str, object]]:
    """The rows as plain values for JSON, with `size` and `fault` of each when they were checked."""
    checked = {answer.release.name: answer for answer in answers or ()}
    documents = []
    for row in rows:
        document = {field.name: getattr(row, field.name) for field in fields(row)} | {"hub_name": row.hub_name}
        document["accuracy"] = [fact._asdict() for fact in row.accuracy]
        if row.name in checked:
            document |= {"size": checked[row.name].size, "fault": checked[row.name].fault}
        documents.append(document)
    return documents


def _ask(row: Release) -> tuple[Answer, bool]:
    """The answer for one file, and whether a server was reached."""
    request = urllib.request.Request(row.url, method="HEAD", headers={"User-Agent": "dinov2-anywhere"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            length = answer.headers.get("Content-Length", "")
            if answer.headers.get_content_type() == "text/html":
                return Answer(row, None, "a web page and no file"), True
            return Answer(row, int(length) if length.isdigit() else None, None), True
    except urllib.error.HTTPError as error:
        error.close()
        return Answer(row, None, f"{error.code} {error.reason}"), True
    except urllib.error.URLError as error:
        return Answer(row, None, str(getattr(error.reason, "strerror", None) or error.reason)), False
    except OSError as error:
        return Answer(row, None, str(error.strerror or error) or "no answer"), False
