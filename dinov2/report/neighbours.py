"""The page of nearest images and near-duplicates, and the rows of pictures that other pages share with it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dinov2.report.render import render

__all__ = ["THUMBNAIL_SIDE", "Shot", "ShotRow", "neighbour_page", "thumbnail"]

THUMBNAIL_SIDE = 176
"""Longer side of a thumbnail in pixels: sharp on a screen of twice the density."""


@dataclass(frozen=True)
class Shot:
    """One picture with its caption."""

    picture: bytes | None
    """JPEG or PNG; None where the image is gone."""
    name: str
    note: str = ""
    """Below the picture, before the name: similarity, class."""
    title: str = ""
    """The whole path, shown when pointed at."""
    kind: str = ""
    """`query`, `right`, `wrong` or nothing."""


@dataclass(frozen=True)
class ShotRow:
    """Pictures that belong together: a query before its neighbours, or a group of near-duplicates."""

    shots: tuple[Shot, ...]
    remark: str = ""
    """Of what is not shown."""


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an RGB image."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def neighbour_page(
    title: str,
    *,
    facts: Sequence[tuple[str, str]],
    neighbours: Sequence[ShotRow] = (),
    duplicates: Sequence[ShotRow] | None = None,
    duplicates_lead: str = "",
) -> str:
    """The page as text. `duplicates` is None where none were searched for; `facts` are (name, value) for its head."""
    return render(
        "neighbours.html.jinja",
        heading=title,
        facts=facts,
        neighbours=neighbours,
        classes=any(shot.kind in ("right", "wrong") for row in neighbours for shot in row.shots),
        duplicates=duplicates,
        duplicates_lead=duplicates_lead,
    )
