"""Imports go down or stay inside their folder; heavy and optional packages stay where they belong.

The tables here are the architecture: a change that needs another line in them is a change of design, made on purpose.
Everything is read from the syntax trees, so that a module is judged without its dependencies being installed.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.floors import MAY_IMPORT

REPOSITORY = Path(__file__).resolve().parents[1]

# The only modules that talk to other processes.
TALK_TO_PROCESSES = {"dinov2/distributed.py", "dinov2/engine/parallel.py", "dinov2/engine/checkpoint.py"}

CORE = {"torch", "torchvision", "numpy", "PIL", "omegaconf", "safetensors", "packaging", "rich"}

# Import name -> the extra of pyproject.toml that brings it. Imported inside functions only.
OPTIONAL = {
    "transformers": "hf",
    "accelerate": "hf",
    "huggingface_hub": "hub",
    "pyarrow": "parquet",
    "faiss": "index",
    "sklearn": "logistic",
    "cuml": "cuml",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "jinja2": "report",
    "tifffile": "tiff",
    "tensorboard": "track",
    "torch.utils.tensorboard": "track",
    "timm": "timm",
}

# Rooms whose classes extend an optional package's: it may stand at the head of their modules, and importing the room
# without it says what to install (tests/hf/test_auto.py).
BUILT_ON = {"hf": {"transformers"}}

# Rooms that torch.hub users load with torch alone installed -> what they may import inside functions besides.
TORCH_ALONE: dict[str, set[str]] = {
    "errors": set(),
    "file_lock": set(),
    "whole_files": set(),
    "layers": set(),
    "models": set(),
    "checkpoints": {"safetensors", "huggingface_hub"},
    "hub": set(),
    "hubconf": set(),
}

# Rooms that answer before torch is loaded: `import dinov2` and `dinov2 --help`.
NO_TORCH_AT_IMPORT = {"__init__", "__main__", "errors", "_moved", "cli"}


@dataclass(frozen=True)
class Import:
    """One import: the dotted module, and whether the statement runs only when a function is called."""

    module: str
    line: int
    lazy: bool


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """All imports of a module, those in functions and under TYPE_CHECKING included."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it out from `dinov2`"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, lazy)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)

    yield from visit(tree, False)


def room_of(path: str) -> str:
    """`dinov2/data/loaders.py` -> `data`, `dinov2/errors.py` -> `errors`, `dinov2/__init__.py` -> `__init__`."""
    parts = Path(path).with_suffix("").parts
    return parts[0] if len(parts) == 1 else parts[1]


def climbing_imports(path: str, tree: ast.Module) -> list[str]:
    """Imports of this package that go up or sideways."""
    room = room_of(path)
    if room not in MAY_IMPORT:
        return [f"{path}: the room {room!r} has no floor; give it a row in MAY_IMPORT"]
    faults = []
    for found in imports_of(tree):
        package, _, rest = found.module.partition(".")
        if package != "dinov2" or rest == "__version__":  # the version is a constant, loaded before any room
            continue
        target = rest.partition(".")[0] or "__init__"
        if target != room and target not in MAY_IMPORT[room]:
            faults.append(f"{path}:{found.line}: {room} may not import {target}")
    return faults


def talk_to_processes(path: str, tree: ast.Module) -> list[str]:
    """Uses of `torch.distributed` outside its places."""
    if path in TALK_TO_PROCESSES:
        return []
    lines = {found.line for found in imports_of(tree) if f"{found.module}.".startswith("torch.distributed.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            lines.add(node.lineno)
    return [f"{path}:{line}: torch.distributed belongs to {sorted(TALK_TO_PROCESSES)}" for line in sorted(lines)]


def third_party_name(module: str) -> str | None:
    """The package that an import needs: a key of CORE or OPTIONAL or an unknown one; None for Python's and our own."""
    for name in OPTIONAL:
        if f"{module}.".startswith(f"{name}."):
            return name
    name = module.partition(".")[0]
    return None if name in sys.stdlib_module_names or name in ("dinov2", "hubconf") else name


def misplaced_packages(path: str, tree: ast.Module) -> list[str]:
    """Third-party imports that are undeclared, optional but not lazy, or too heavy for their room."""
    room = room_of(path)
    faults = []
    for found in imports_of(tree):
        name = third_party_name(found.module)
        if name is None:
            continue
        where = f"{path}:{found.line}"
        if name not in CORE and name not in OPTIONAL:
            faults.append(f"{where}: {name} is no dependency of pyproject.toml")
        elif name in OPTIONAL and not found.lazy and name not in BUILT_ON.get(room, set()):
            faults.append(f"{where}: {name} is optional (extra {OPTIONAL[name]!r}); import it inside the function")
        if room in TORCH_ALONE and name != "torch" and not (found.lazy and name in TORCH_ALONE[room]):
            faults.append(f"{where}: {room} needs torch alone, not {name}")
        if room in NO_TORCH_AT_IMPORT and name != "rich" and not found.lazy:
            faults.append(f"{where}: {room} answers before {name} is loaded; import it inside the function")
    return faults


def modules() -> list[str]:
    found = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "dinov2").rglob("*.py"))
    return found + [name for name in ("hubconf.py",) if (REPOSITORY / name).exists()]


def tree_of(path: str) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"), filename=path)


@pytest.mark.parametrize("path", modules())
def test_a_module_imports_only_from_lower_floors(path: str) -> None:
    assert climbing_imports(path, tree_of(path)) == []


@pytest.mark.parametrize("path", modules())
def test_only_three_modules_talk_to_other_processes(path: str) -> None:
    assert talk_to_processes(path, tree_of(path)) == []


@pytest.mark.parametrize("path", modules())
def test_packages_are_imported_only_where_they_may_be(path: str) -> None:
    assert misplaced_packages(path, tree_of(path)) == []


def test_no_two_rooms_import_each_other() -> None:
    rooms = set(MAY_IMPORT) - {"cli", "__init__", "__main__"}
    assert [(a, b) for a in rooms for b in rooms if a != b and b in MAY_IMPORT[a] and a in MAY_IMPORT[b]] == []


# The guard itself: what it must refuse, and what it must let pass.


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("dinov2/layers/mlp.py", "from dinov2.errors import ConfigError"),
        ("dinov2/layers/mlp.py", "import dinov2.models"),
        ("dinov2/loss/koleo.py", "from dinov2.data import loaders"),
        ("dinov2/data/loaders.py", "from dinov2.layers import Mlp"),
        ("dinov2/models/config.py", "from dinov2 import configs"),
        ("dinov2/eval/knn.py", "def f():\n    from dinov2.train import train"),
        ("dinov2/train/train.py", "import typing\nif typing.TYPE_CHECKING:\n    from dinov2.eval import knn"),
        ("dinov2/apps/train.py", "from dinov2.cli import main"),
        ("dinov2/apps/train.py", "import dinov2"),
        ("dinov2/drawer.py", "import os"),
    ],
)
def test_an_import_that_climbs_is_refused(path: str, code: str) -> None:
    assert climbing_imports(path, ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import fully_shard",
        "import torch\ndef f():\n    return torch.distributed.is_initialized()",
    ],
)
def test_talking_to_processes_elsewhere_is_refused(code: str) -> None:
    assert talk_to_processes("dinov2/loss/koleo.py", ast.parse(code))
    assert not talk_to_processes("dinov2/distributed.py", ast.parse(code))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("dinov2/report/render.py", "import jinja2"),
        ("dinov2/report/render.py", "try:\n    import jinja2\nexcept ImportError:\n    jinja2 = None"),
        ("dinov2/engine/metrics.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("dinov2/data/loaders.py", "def f():\n    import cv2"),
        ("dinov2/layers/mlp.py", "import numpy as np"),
        ("dinov2/checkpoints/open.py", "from safetensors.torch import load_file"),
        ("dinov2/layers/mlp.py", "def f():\n    import numpy"),
        ("dinov2/cli/__init__.py", "import torch"),
    ],
)
def test_a_misplaced_package_is_refused(path: str, code: str) -> None:
    assert misplaced_packages(path, ast.parse(code))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("dinov2/loss/koleo.py", "import torch\nfrom dinov2.distributed import all_reduce_sum"),
        (
            "dinov2/eval/knn/evaluate.py",
            "import numpy as np\nfrom dinov2.encode import stream\nfrom dinov2 import data",
        ),
        ("dinov2/checkpoints/open.py", "import torch\ndef f():\n    from safetensors.torch import load_file"),
        ("dinov2/eval/result.py", "from dinov2 import __version__"),
        ("dinov2/report/render.py", "def f():\n    from jinja2 import Environment"),
        ("dinov2/cli/__init__.py", "import argparse\ndef f():\n    from dinov2.apps import train"),
        ("dinov2/run/train/train.py", "from dinov2.apps.train import train\nfrom dinov2.run.submit import submit"),
    ],
)
def test_an_import_that_goes_down_passes(path: str, code: str) -> None:
    tree = ast.parse(code)
    assert climbing_imports(path, tree) + talk_to_processes(path, tree) + misplaced_packages(path, tree) == []
