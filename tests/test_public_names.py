"""Each module says what it offers, and importing it does nothing else."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# A module's logger is nobody's door.
NOT_A_DOOR = {"logger"}


def public_modules() -> list[str]:
    paths = sorted((REPOSITORY / "dinov2").rglob("*.py"))
    dotted = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in dotted]


def source_of(module: str) -> Path:
    path = REPOSITORY.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def top_level(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, those inside `if` and `try` included."""
    for statement in statements:
        yield statement
        if isinstance(statement, ast.If):
            yield from top_level([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            handlers = [inner for handler in statement.handlers for inner in handler.body]
            yield from top_level([*statement.body, *handlers, *statement.orelse, *statement.finalbody])


def names_bound_by(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement defines; what it imports is not among them."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign():
            targets = [node for target in statement.targets for node in ast.walk(target)]
            return [node.id for node in targets if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def brought_up(tree: ast.Module) -> set[str]:
    """Names that a package imports from this project's modules, and may offer as its own."""
    imports = [statement for statement in top_level(tree.body) if isinstance(statement, ast.ImportFrom)]
    own = [statement for statement in imports if (statement.module or "").partition(".")[0] == "dinov2"]
    return {alias.asname or alias.name for statement in own for alias in statement.names}


def declared(tree: ast.Module) -> list[str] | None:
    """The literal `__all__`, or None."""
    for statement in tree.body:
        names = names_bound_by(statement)
        if names == ["__all__"] and isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            value = ast.literal_eval(statement.value)
            return [str(name) for name in value]
    return None


def defined(tree: ast.Module) -> set[str]:
    """Public names that a module defines."""
    names = {name for statement in top_level(tree.body) for name in names_bound_by(statement)}
    return {name for name in names if not name.startswith("_")} - NOT_A_DOOR


def faults_of(tree: ast.Module, *, is_package: bool) -> list[str]:
    """What is wrong with a module's door."""
    names = declared(tree)
    if names is None:
        return ["it has no literal __all__"]
    offered = {name for name in names if not name.startswith("__")}  # `__version__` is public by its own right
    doors = defined(tree)
    may_offer = doors | brought_up(tree) if is_package else doors
    faults = [f"__all__ names {name!r}, which the module does not define" for name in sorted(offered - may_offer)]
    faults += [f"{name!r} is public and missing from __all__" for name in sorted(doors - offered)]
    if len(names) != len(set(names)):
        faults.append("__all__ names something twice")
    if not ast.get_docstring(tree):
        faults.append("the module has no docstring")
    for statement in top_level(tree.body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and statement.name in offered:
            overload = any(ast.unparse(decorator).endswith("overload") for decorator in statement.decorator_list)
            if not overload and not ast.get_docstring(statement):
                faults.append(f"{statement.name!r} has no docstring")
    return faults


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize("module", public_modules())
def test_all_declares_exactly_what_the_module_defines_and_each_name_is_described(module: str) -> None:
    source = source_of(module)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assert faults_of(tree, is_package=source.name == "__init__.py") == []


@pytest.mark.parametrize("module", [name for name in public_modules() if not name.endswith("__main__")])
def test_every_declared_name_is_there_after_import(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    heavy = "{'torch', 'torchvision', 'numpy', 'PIL', 'omegaconf', 'safetensors'}"
    result = run_python(f"import sys, dinov2; print(sorted({heavy} & set(sys.modules)))", "-W", "error")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


def test_importing_any_module_says_nothing_and_changes_no_thread_count() -> None:
    names = [name for name in public_modules() if not name.endswith("__main__")]
    result = run_python(
        "import importlib, random, torch\n"
        "import rich.console\n"  # draws from `random` when it is imported; ours must not
        "def state(): return torch.get_num_threads(), torch.initial_seed(), random.getstate()\n"
        "before = state()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert state() == before, 'an import changed threads or random numbers'\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# The guard itself: what it must refuse, and what it must let pass.


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ('"""D."""\ndef f():\n    """F."""', "no literal __all__"),
        ('"""D."""\n__all__ = ["f"]\ndef f(): pass', "'f' has no docstring"),
        ('"""D."""\n__all__ = ["f"]\nfrom os import getcwd as f', "does not define"),
        ('"""D."""\n__all__ = []\nLIMIT = 3', "'LIMIT' is public"),
        ('"""D."""\n__all__ = []\nlow, high = 0, 1', "'high' is public"),
        ('"""D."""\n__all__ = []\nif True:\n    class Hidden:\n        """H."""', "'Hidden' is public"),
        ("__all__ = []", "no docstring"),
    ],
)
def test_a_door_that_lies_is_refused(code: str, fault: str) -> None:
    assert any(fault in found for found in faults_of(ast.parse(code), is_package=False))


def test_a_package_offers_what_it_brings_up() -> None:
    code = '"""D."""\nfrom os import path\nfrom dinov2.layers.mlp import A, B\n__all__ = ["A"]\n_table = logger = 1'
    assert faults_of(ast.parse(code), is_package=True) == []
    assert faults_of(ast.parse(code), is_package=False) != []
    assert faults_of(ast.parse(code.replace('["A"]', '["path"]')), is_package=True) != []
