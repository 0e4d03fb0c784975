"""The page of neighbours: complete in itself, and nobody's file name becomes markup."""

import re
from html.parser import HTMLParser
from io import BytesIO

from PIL import Image

from dinov2.report.neighbours import THUMBNAIL_SIDE, Shot, ShotRow, neighbour_page, thumbnail


class Seen(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def picture() -> bytes:
    return thumbnail(Image.new("RGB", (400, 100), "red"))


def test_thumbnails_are_small_and_keep_their_shape():
    assert Image.open(BytesIO(picture())).size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE // 4)
    assert Image.open(BytesIO(thumbnail(Image.new("RGB", (20, 10))))).size == (20, 10)


def test_the_page_fetches_nothing_and_shows_every_picture():
    shots = (Shot(picture(), "a.jpg", "query", "photos/a.jpg", "query"), Shot(None, "b.jpg", "0.912"))
    rows, groups = [ShotRow(shots)], [ShotRow(shots, "and 3 more")]
    page = neighbour_page("f", facts=[("images", "2")], neighbours=rows, duplicates=groups)
    seen = Seen(page)
    images = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert len(images) == 2 and all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in images)
    assert not re.findall(r"https?://|url\(|<script", page)
    assert page.count("not found") == 2 and "and 3 more" in page and "0.912" in page


def test_names_are_text_and_nothing_else():
    evil = "</style><script>alert(1)</script>\"'.jpg"
    row = ShotRow((Shot(picture(), evil, evil, evil),), evil)
    page = neighbour_page(evil, facts=[(evil, evil)], neighbours=[row], duplicates=[row], duplicates_lead=evil)
    assert "<script" not in page and "alert(1)" in page
    assert {tag for tag, _ in Seen(page).tags} <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "div", "p", "h1", "h2", "ul", "li", "b",
        "main", "section", "figure", "img", "figcaption", "span", "footer",
    }  # fmt: skip


def test_colours_are_explained_where_there_are_any():
    row = ShotRow((Shot(picture(), "a", kind="right"),))
    assert "Green is the same class" in neighbour_page("f", facts=[], neighbours=[row])
    assert "Green" not in neighbour_page("f", facts=[], neighbours=[ShotRow((Shot(picture(), "a"),))])
