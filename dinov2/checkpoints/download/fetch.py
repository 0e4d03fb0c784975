"""Where downloads are kept, and one process at a time that fetches what is not there yet."""

import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dinov2.checkpoints.download.transfer import Transfer, sha256_of, size_of, what_is_kept
from dinov2.errors import DinoError, WeightsError
from dinov2.file_lock import held
from dinov2.models.releases import BASE_URL

__all__ = ["cache_folder", "cached_path", "download"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def cache_folder() -> Path:
    """`$DINOV2_CACHE`, else the folder in which `torch.hub` keeps checkpoints, and may have put these files already."""
    if chosen := os.environ.get("DINOV2_CACHE"):
        return Path(chosen).expanduser()
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_path(url: str, *, folder: str | os.PathLike[str] | None = None) -> Path:
    """Where `download` keeps a file. Released files have their own name, as `torch.hub` stores them.

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
        with held(target.with_name(f"{target.name}.lock")) as alone:
            if not _is_there(target, sha256):  # another process may have fetched it while this one waited
                Transfer(url, target, progress, timeout, shared=not alone).run(sha256)
    except OSError as error:
        raise _disk_error(error, target) from error
    return target


def _is_there(target: Path, sha256: str | None) -> bool:
    return target.is_file() and size_of(target) > 0 and (sha256 is None or sha256_of(target) == sha256.lower())


def _disk_error(error: OSError, target: Path) -> DinoError:
    if error.errno in _DISK_FULL:
        kept = what_is_kept(target.with_name(f"{target.name}.partial"))
        return DinoError(
            f"the disk of {target.parent} is full, {target.name} does not fit; free some space and try again{kept}, or "
            "choose another folder in the environment variable DINOV2_CACHE"
        )
    return DinoError(
        f"{target} cannot be written ({error.strerror or error}); choose another folder in the environment variable "
        "DINOV2_CACHE"
    )
