"""Pages that show releases say what the table of releases says."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from dinov2.models.releases import RELEASES

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script that writes the pages."""
    spec = importlib.util.spec_from_file_location("generate_docs", REPOSITORY / "scripts" / "generate_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_releases_is_up_to_date(generator: ModuleType) -> None:
    written = (REPOSITORY / "docs" / "releases.md").read_text(encoding="utf-8")
    assert written == generator.releases_page(), "stale: run `python scripts/generate_docs.py`"


@pytest.mark.parametrize("page", ["MODEL_CARD.md", "README.md"])
def test_tables_in_hand_written_pages_are_up_to_date(generator: ModuleType, page: str) -> None:
    written = (REPOSITORY / page).read_text(encoding="utf-8")
    assert written == generator.with_tables(written), "stale: run `python scripts/generate_docs.py`"


@pytest.mark.parametrize("page", ["README.md", "docs/releases.md"])
def test_every_file_is_linked_once(page: str) -> None:
    linked = re.findall(r"\]\((https://[^)]+\.pth)\)", (REPOSITORY / page).read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(row.url for row in RELEASES)


def test_the_readme_tells_both_figures_of_linear_evaluation_where_the_release_has_two(generator: ModuleType) -> None:
    rows = [line.strip("| ").split(" | ") for line in generator.heads_table().splitlines()[2:]]
    assert [row[-1] for row in rows[:4]] == ["81.1", "84.5", "86.3", "86.5"]
    assert [row[-1] for row in rows[4:]] == [
        "80.9 or **80.8**",
        "84.6 or **84.4**",
        "86.7 or **86.5**",
        "87.1 or **87.0**",
    ]


def test_the_figures_of_dense_heads_stand_below_their_data_set(generator: ModuleType) -> None:
    row = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", generator.dense_table().splitlines()[-1])
    assert row == ("| ViT-g/14 | 0.344 / 0.298 / 0.279 | 2.62 / 2.35 / 2.11 | 49.0 / 53.0 / 60.2 | 83.0 / 86.2 |")


def test_a_table_is_written_between_its_marks_only(generator: ModuleType) -> None:
    page = "before\n<!-- table: depth -->\nold\n<!-- end of table -->\nafter\n"
    filled = generator.with_tables(page)
    assert filled.startswith("before\n<!-- table: depth -->\n\n| backbone |")
    assert filled.endswith("|\n\n<!-- end of table -->\nafter\n")
    assert "old" not in filled and generator.with_tables(filled) == filled
    with pytest.raises(KeyError):
        generator.with_tables(page.replace("depth", "nothing"))


def test_the_model_card_tells_what_the_authors_report() -> None:
    card = (REPOSITORY / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| ViT-g/14 | 83.5 | 86.5 | 78.4 | 81.6 | 52.3 | 0.298 | 0.362 | 53.0 |" in card
    assert "| ViT-S/14 with registers | 79.1 | 80.9 | 71.0 | 67.6 | 39.5 | - | - | - |" in card
    for fact in ("LVD-142M", "22,000 GPU hours", "7 t of CO2", "Apache-2.0", "no multiple of 14"):
        assert fact in " ".join(card.split())
