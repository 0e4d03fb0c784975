"""A module is a chapter of about 300 lines, a folder holds what belongs together; past the limits they are split."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_LINES = 500
MOST_MODULES = 24


def python_files() -> list[str]:
    places = ("dinov2", "tests", "scripts", "benchmarks")
    return sorted(p.relative_to(REPOSITORY).as_posix() for place in places for p in (REPOSITORY / place).rglob("*.py"))


def package_folders() -> list[str]:
    return sorted({Path(path).parent.as_posix() for path in python_files() if path.startswith("dinov2/")})


@pytest.mark.parametrize("path", python_files())
def test_a_module_is_a_chapter(path: str) -> None:
    n_lines = len((REPOSITORY / path).read_text(encoding="utf-8").splitlines())
    assert n_lines <= MOST_LINES, f"{path} has {n_lines} lines; which part of it is a chapter of its own?"


@pytest.mark.parametrize("folder", package_folders())
def test_a_folder_can_be_overlooked(folder: str) -> None:
    names = [path.name for path in (REPOSITORY / folder).glob("*.py") if path.name != "__init__.py"]
    assert len(names) <= MOST_MODULES, f"{folder} holds {len(names)} modules; which of them belong together?"


@pytest.mark.parametrize("path", [path for path in python_files() if path.startswith("dinov2/")])
def test_no_module_is_a_drawer(path: str) -> None:
    assert Path(path).stem not in {"utils", "util", "helpers", "misc"}, (
        f"{path}: a helper lives beside its only user, or on the ground floor under its own name"
    )
