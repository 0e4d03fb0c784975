"""One HTML page on which a click compares a patch with all patches of all images; it opens offline and loads nothing.

The page is at most `PAGE_LIMIT` bytes: features are shortened until they fit (`dinov2.report.viz_data`), pictures too.
It says what that cost, the largest error of a similarity, measured on this very page's features.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dinov2.errors import DataError
from dinov2.report.map_pictures import palette_colours
from dinov2.report.theme import framed, written
from dinov2.report.viz_data import PageImage, PageMatches, PageModel, head_maps, packed_panes
from dinov2.report.viz_theme import VIZ_LEAD, VIZ_MAIN, VIZ_SCRIPT, VIZ_STYLE, VIZ_TOOLS
from dinov2.whole_files import replacing

__all__ = [
    "MOST_IMAGES",
    "PAGE_LIMIT",
    "WrittenPage",
    "write_viz_page",
]

PAGE_LIMIT = 16_000_000
"""Bytes of the file, at most."""
MOST_IMAGES = 12
"""Images on one page, at most; of more some at even distances are taken."""

_PICTURE_BYTES = 200_000  # one JPEG
_MOST_LINES = 40
_VIEWS = {"similarity": "Similarity", "pca": "PCA", "attention": "Attention", "norm": "Norms", "image": "Image"}


@dataclass(frozen=True)
class WrittenPage:
    """The file, and what is on it."""

    path: Path
    n_bytes: int
    n_images: int
    dims: tuple[int, ...]
    """Numbers kept of each patch, by model."""
    largest_error: float
    """Of a cosine similarity on the page, against float32 features."""


def write_viz_page(
    path: Path | str,
    *,
    models: Sequence[PageModel],
    images: Sequence[PageImage],
    start: tuple[float, float] = (0.5, 0.5),
    matches: Sequence[PageMatches] = (),
    notes: Sequence[str] = (),
) -> WrittenPage:
    """Write the page of at most `MOST_IMAGES` images.

    `start` is the place (x, y as shares of width and height) in the first image whose patch is chosen at first. Raises
    `DataError` when there is no image, or one has so many patches that a page of it would not fit.
    """
    if not images or len(images) > MOST_IMAGES:
        raise DataError(f"a page shows 1 to {MOST_IMAGES} images, got {len(images)}; choose some of them")
    packed, dims, errors = zip(*[packed_panes(m, models, images) for m in range(len(models))], strict=True)
    data = {
        "start": [0, *start],
        "palette": palette_colours().tolist(),
        "models": [{"name": model.name, "norms": _norm_range(m, images)} for m, model in enumerate(models)],
        "images": [
            {"name": image.name, "panes": [packed[m][i] for m in range(len(models))]} for i, image in enumerate(images)
        ],
    }
    footer = _footer(models, images, dims, max(errors), notes)
    page = _rendered(data, models, images, matches, footer).encode("utf-8", "backslashreplace")
    target = Path(path)
    with replacing(target) as unfinished:
        unfinished.write_bytes(page)
    return WrittenPage(target, len(page), len(images), dims, max(errors))


def _norm_range(m: int, images: Sequence[PageImage]) -> list[float]:
    norms = torch.cat([image.views[m].norms.flatten() for image in images])
    return [round(float(norms.min()), 5), round(float(norms.max()), 5)]


def _rendered(
    data: dict[str, Any],
    models: Sequence[PageModel],
    images: Sequence[PageImage],
    matches: Sequence[PageMatches],
    footer: str,
) -> str:
    attention = any(view.attention is not None for image in images for view in image.views)
    views = [(key, name) for key, name in _VIEWS.items() if key != "attention" or attention]
    facts = [("images", str(len(images)))]
    for model in models:
        facts.append((model.name if len(models) > 1 else "features", model.about))
    names = head_maps(images[0].views[0], models[0])
    heads = "".join(f'<option value="{h}">{escape(name)}</option>' for h, (_, name, _) in enumerate(names))
    heading = " and ".join(model.name for model in models)
    tools = VIZ_TOOLS.substitute(
        views="".join(
            f'<label><input type="radio" name="view" id="view-{key}" value="{key}"'
            f"{' checked' if key == 'similarity' else ''}><span>{name}</span></label>"
            for key, name in views
        ),
        heads=f'<option value="-1">mean of all</option>{heads}',
    )
    main = VIZ_MAIN.substitute(
        tall="26rem" if len(images) <= 2 else "20rem",
        shots="".join(_shot(i, image, models) for i, image in enumerate(images)),
        sections=_heads_section(images, models) + _matches_section(images, models, matches),
    )
    # A file name could end the element that the text stands in.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return framed(
        f"{heading}: patch features",
        eyebrow="What the patches mean",
        heading=heading,
        facts=facts,
        lead=VIZ_LEAD,
        bar=tools,
        main=main,
        footer=footer,
        style=VIZ_STYLE,
        end=f'<script type="application/json" id="data">{text}</script>\n<script>{VIZ_SCRIPT}</script>',
    )


def _shot(i: int, image: PageImage, models: Sequence[PageModel]) -> str:
    panes = []
    for m, model in enumerate(models):
        note = f'<output id="note-{i}-{m}"></output>'
        label = f"<p><span>{escape(model.name)}</span> {note}</p>" if len(models) > 1 else ""
        source = f'id="image-{i}" src="{_jpeg(image.picture)}"' if m == 0 else f'data-of="{i}"'
        spoken = escape(f"{image.name} by {model.name}: choose a patch with the arrow keys", quote=True)
        panes.append(
            f'<div class="pane">{label}<div class="stage" id="stage-{i}-{m}" tabindex="0" role="application" '
            f'aria-label="{spoken}" style="{_shape(image)}"><img {source} alt="{escape(image.name)}" draggable="false">'
            '<canvas></canvas><b class="over"></b><b class="near"></b><b class="mark"></b></div></div>'
        )
    wide = len(models) * image.picture.width / image.picture.height  # figures of a row are equally tall
    return (
        f'<figure class="card" style="--wide: {wide:.3f}"><div class="panes">{"".join(panes)}</div>'
        f'<figcaption><span title="{escape(image.name)}">{escape(image.name)}</span>{"" if label else note}'
        "</figcaption></figure>"
    )


def _heads_section(images: Sequence[PageImage], models: Sequence[PageModel]) -> str:
    """Every head of every image as a small picture."""
    groups = []
    for i, image in enumerate(images):
        for m, (model, view) in enumerate(zip(models, image.views, strict=True)):
            cells = [
                f'<figure><div class="stage" style="{_shape(image)}"><img data-of="{i}" alt="">'
                f'<canvas data-head="{i} {m} {h}"></canvas></div><figcaption>{name}</figcaption></figure>'
                for h, (_, name, _) in enumerate(head_maps(view, model))
            ]
            if cells and view.shares is not None:
                of = f" by {escape(model.name)}" if len(models) > 1 else ""
                to = ("itself", "the registers", "the patches")
                shares = ", ".join(
                    f"{100 * share:.1f} % to {name}"
                    for name, share in zip(to, view.shares, strict=True)
                    if name != "the registers" or model.num_register_tokens
                )
                title = f'<h3>{escape(image.name)}{of} <span class="note">{shares}</span></h3>'
                groups.append(f'<div class="card heads">{title}{"".join(cells)}</div>')
    if not groups:
        return ""
    return (
        '<h2>Attention, head by head</h2><p class="lead">Where the class token looks, and where the registers do '
        "(averaged over heads). Each map has its own scale, up to its 99.5th percentile. The shares are those of the "
        f'class token, averaged over heads.</p><div class="stack">{"".join(groups)}</div>'
    )


def _matches_section(images: Sequence[PageImage], models: Sequence[PageModel], matches: Sequence[PageMatches]) -> str:
    """Pairs of images with a line between patches that are each other's most similar one."""
    cards = []
    for pair in matches:
        first, second = images[pair.first], images[pair.second]
        # The pictures share one height; the second starts behind the first and a gap of 2 % of the width.
        ratios = [image.picture.width / image.picture.height for image in (first, second)]
        inner = [98 * ratio / sum(ratios) for ratio in ratios]
        height = inner[0] / ratios[0]
        grids = [images[i].views[pair.model].grid for i in (pair.first, pair.second)]
        lines = []
        ends = zip(pair.matches.first[:_MOST_LINES].tolist(), pair.matches.second[:_MOST_LINES].tolist(), strict=True)
        for (row, column), (row_2, column_2) in ends:
            x, y = (column + 0.5) / grids[0][1] * inner[0], (row + 0.5) / grids[0][0] * height
            x2 = inner[0] + 2 + (column_2 + 0.5) / grids[1][1] * inner[1]
            y2 = (row_2 + 0.5) / grids[1][0] * height
            hue = round(360 * (row / grids[0][0] + 0.35 * column / grids[0][1])) % 360
            at = f'x1="{x:.2f}" y1="{y:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
            dots = "".join(f'<circle cx="{a:.2f}" cy="{b:.2f}" r=".7"/>' for a, b in ((x, y), (x2, y2)))
            lines.append(
                f'<g stroke="hsl({hue} 90% 58%)" fill="hsl({hue} 90% 58%)"><line {at} stroke="#000" '
                f'stroke-width=".5" opacity=".55"/><line {at} stroke-width=".26"/>{dots}</g>'
            )
        of = f" by {escape(models[pair.model].name)}" if len(models) > 1 else ""
        title = f"{escape(first.name)} and {escape(second.name)}{of}"
        cards.append(
            f'<div class="card"><h3>{title} <span class="note">{len(pair.matches.similarity)} pairs, '
            f'{len(lines)} drawn</span></h3><div class="pair" style="margin-top:.6rem;grid-template-columns:'
            f'{inner[0]:.3f}fr {inner[1]:.3f}fr"><img data-of="{pair.first}" alt="{escape(first.name)}">'
            f'<img data-of="{pair.second}" alt="{escape(second.name)}"><svg viewBox="0 0 100 {height:.3f}" '
            f'preserveAspectRatio="none" aria-hidden="true">{"".join(lines)}</svg></div></div>'
        )
    if not cards:
        return ""
    return (
        '<h2>Matches</h2><p class="lead">Patches of two images each of which is the other\'s most similar one; the '
        f'{_MOST_LINES} most similar pairs are drawn.</p><div class="stack">{"".join(cards)}</div>'
    )


def _footer(
    models: Sequence[PageModel],
    images: Sequence[PageImage],
    dims: Sequence[int],
    error: float,
    notes: Sequence[str],
) -> str:
    lines = []
    for m, model in enumerate(models):
        width = images[0].views[m].patches.shape[-1]
        kept = "all" if dims[m] == width else f"the {dims[m]} strongest directions of all"
        lines.append(
            f"{model.name} ({model.about}): similarities use {kept} {width} numbers of a patch as int8. "
            f"PCA: the three strongest directions, {100 * float(model.basis.explained[:3].sum()):.0f} % of the "
            f"variance{' of the foreground' if model.basis.foreground else ''}. Norms are those {model.norm_kind}; "
            f"high is above {model.norm_threshold:.4g}."
        )
    lines.append(
        f"The largest error of a similarity on this page is {error:.1g}. The file is complete in itself, loads "
        f"nothing, and is at most {PAGE_LIMIT // 1_000_000} MB. {written()}"
    )
    return "".join(f"<p>{escape(line)}</p>" for line in [*lines, *notes])


def _shape(image: PageImage) -> str:
    return f"aspect-ratio:{image.picture.width}/{image.picture.height}"


def _jpeg(picture: Image.Image) -> str:
    """A data URI of at most `_PICTURE_BYTES` before base64: pictures that do not compress are shown smaller."""
    while True:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88, optimize=True)
        if buffer.tell() <= _PICTURE_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
        picture = picture.resize((max(1, picture.width * 4 // 5), max(1, picture.height * 4 // 5)))
