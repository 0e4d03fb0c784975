"""One HTML page of nearest images and near-duplicates, complete in itself: pictures are inlined, nothing is fetched.

File names and class names are not ours, so every text is escaped on its way into the page.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from dinov2.report.theme import framed, written

__all__ = ["SHOT_STYLE", "THUMBNAIL_SIDE", "Shot", "ShotRow", "neighbour_page", "shot_section", "thumbnail"]

THUMBNAIL_SIDE = 176
"""Longer side of a thumbnail in pixels: sharp on a screen of twice the density."""


@dataclass(frozen=True)
class Shot:
    """One picture with its caption."""

    jpeg: bytes | None
    """None where the image is gone."""
    name: str
    note: str = ""
    """Below the name: similarity, class."""
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
    """The page as text. `duplicates` is None where nobody looked for them; `facts` are (name, value) for its head."""
    sections = []
    if neighbours:
        lead = "On the left the query, then the images whose features are most similar, with their cosine similarity."
        if any(shot.kind in ("right", "wrong") for row in neighbours for shot in row.shots):
            lead += " Green is the same class, red another."
        sections.append(shot_section("neighbours", "Nearest images", lead, neighbours))
    if duplicates is not None:
        sections.append(shot_section("duplicates", "Near-duplicates", duplicates_lead, duplicates))
    return framed(
        title,
        eyebrow="Neighbours in feature space",
        heading=title,
        facts=facts,
        main="\n".join(sections),
        footer=f"{written()} This file is complete in itself.",
        style=SHOT_STYLE,
    )


def shot_section(anchor: str, heading: str, lead: str, rows: Sequence[ShotRow]) -> str:
    """Rows of pictures below a heading and a sentence."""
    body = "".join(
        f'<div class="card shots">{"".join(map(_figure, row.shots))}'
        f"{f'<p class=note>{escape(row.remark)}</p>' if row.remark else ''}</div>"
        for row in rows
    )
    return f'<section id="{anchor}"><h2>{escape(heading)}</h2><p class="lead">{escape(lead)}</p>{body}</section>'


def _figure(shot: Shot) -> str:
    if shot.jpeg is None:
        picture = '<div class="gone">not found</div>'
    else:
        data = base64.b64encode(shot.jpeg).decode("ascii")
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(shot.name)}" loading="lazy">'
    note = f"<b>{escape(shot.note)}</b>" if shot.note else ""
    return (
        f'<figure class="{shot.kind}" title="{escape(shot.title or shot.name)}">{picture}'
        f"<figcaption>{note}<span>{escape(shot.name)}</span></figcaption></figure>"
    )


SHOT_STYLE = """
section:first-child h2 { margin-top: 1rem; }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); gap: .7rem .6rem;
  align-items: start; margin-bottom: 1rem; }
.shots img, .shots .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px;
  border: 3px solid transparent; background: var(--grid); }
.shots .gone { display: grid; place-items: center; color: var(--muted); font-size: .75rem; }
.shots .query img, .shots .query .gone { border-color: var(--c1); }
.shots .right img { border-color: var(--good); }
.shots .wrong img { border-color: var(--bad); }
.shots figcaption { display: flex; flex-direction: column; margin-top: .25rem; font-size: .75rem; line-height: 1.3; }
.shots figcaption b { font-weight: 600; font-variant-numeric: tabular-nums; }
.shots figcaption span { color: var(--muted); overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 2;
  -webkit-box-orient: vertical; overflow: hidden; }
.shots .note { grid-column: 1 / -1; margin: 0; }
"""
"""Style of `shot_section`, to be added to the theme."""
