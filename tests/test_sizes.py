"""A module is a chapter of about 300 lines, a folder holds what belongs together; past the limits they are split."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_LINES = 500
MOST_MODULES = 24
MOST_ARGUMENTS = 8

# Signatures that the release or transformers fixed.
GIVEN_SIGNATURES = {"hf/configuration.py", "layers/block.py", "models/vision_transformer.py"}
# Public names that mean the same thing in every module that has them, or that the release and transformers fixed.
ONE_MEANING = {"main", "add_to", "get_args_parser", "Config", "Weights", "LinearClassifier"}


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


def module_trees() -> dict[str, ast.Module]:
    package = REPOSITORY / "dinov2"
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def test_long_lists_of_arguments_are_given_by_keyword() -> None:
    long = []
    for module, tree in module_trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and module not in GIVEN_SIGNATURES:
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                if len([name for name in names if name not in ("self", "cls")]) > MOST_ARGUMENTS:
                    long.append(f"{module}: {node.name}")
    assert long == [], "pass one typed value, or give them by keyword"


def test_a_public_name_has_one_meaning() -> None:
    homes = defaultdict(list)
    for module, tree in module_trees().items():
        public: list[str] = []
        defined: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                defined.add(node.targets[0].id)
                if node.targets[0].id == "__all__":
                    public = ast.literal_eval(node.value)
        for name in set(public) & defined - ONE_MEANING:
            homes[name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
