"""Print the size of the package: modules, lines, public names, and what makes code hard to change.

    python scripts/size.py [--json] [PACKAGE_FOLDER]

Counts come from the syntax trees alone; nothing is imported. A module with a single importer is one whose names only
one other module of the package asks for. Templates, CSS and JavaScript are counted apart from Python.
"""

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

__all__ = ["measure"]

_LONG_FUNCTION = 60
_ASSETS = {".css", ".html", ".js", ".jinja", ".j2"}


def measure(package: Path) -> dict[str, int]:
    """Counts over all modules of a package, by what is counted."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assets = [path for path in package.rglob("*") if path.suffix in _ASSETS]
    return {
        "modules": len(sources),
        "lines of Python": sum(len(source.splitlines()) for source in sources.values()),
        "lines of templates, CSS and JavaScript": sum(len(p.read_text("utf-8").splitlines()) for p in assets),
        "public names": sum(len(_public_names(tree)) for tree in trees.values()),
        "uses of Any": sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes),
        "modules with a single importer": _with_one_importer(package, trees),
        f"functions over {_LONG_FUNCTION} lines": sum(
            (node.end_lineno or node.lineno) - node.lineno + 1 > _LONG_FUNCTION for node in functions
        ),
    }


def _public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def _with_one_importer(package: Path, trees: dict[Path, ast.Module]) -> int:
    names = {_module_name(package, path): path for path in trees}
    importers: dict[str, set[Path]] = defaultdict(set)
    for path, tree in trees.items():
        for imported in _imports(tree):
            # `from a.b import c` may mean the module a.b.c or a name of a.b.
            known = imported if imported in names else imported.rpartition(".")[0]
            if known in names and names[known] != path:
                importers[known].add(path)
    return sum(len(importers[name]) == 1 for name, path in names.items() if path.name != "__init__.py")


def _module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def main() -> None:
    """Print the counts as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", nargs="?", type=Path, default=Path(__file__).resolve().parents[1] / "dinov2")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    counts = measure(arguments.package)
    if arguments.json:
        print(json.dumps(counts))
        return
    for what, count in counts.items():
        print(f"{what:40s} {count:7,d}")


if __name__ == "__main__":
    main()
