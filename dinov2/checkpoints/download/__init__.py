"""Weight files fetched once: cached, resumed, checked, and never found half-written. Standard library only.

`fetch` decides where a file lies and whether it is there, `transfer` gets it, and a lock of the operating system
(`dinov2.file_lock`), which dies with its process, makes a second process wait for the first one's file.
"""

from dinov2.checkpoints.download.fetch import cache_folder, cached_path, download

__all__ = ["cache_folder", "cached_path", "download"]
