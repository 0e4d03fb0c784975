"""What the public release's documentation imports and names: it resolves, or says what to use instead."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dinov2
from dinov2._moved import GONE, MOVED, REMOVED_IN, Instead, install

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = [(module, name) for module, names in MOVED.items() for name in names]
SUCCESSORS = [
    (module, name, new) for module, names in MOVED.items() for name, new in names.items() if isinstance(new, str)
]
REPLACED = [
    (module, name) for module, names in MOVED.items() for name, new in names.items() if isinstance(new, Instead)
]
ADVICE = [entry.advice for names in MOVED.values() for entry in names.values() if isinstance(entry, Instead)]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


# Configs.


def test_the_release_s_config_names_import_from_where_they_were() -> None:
    from dinov2.configs import dinov2_default_config, load_and_merge_config, load_config

    assert load_config("ssl_default_config") == dinov2_default_config
    assert load_and_merge_config("eval/vitl14_pretrain").crops.global_crops_size == 518


@pytest.mark.parametrize(
    "path",
    [
        "ssl_default_config.yaml",
        *(f"train/{name}.yaml" for name in ("vitl16_short", "vitl14", "vitg14")),
        *(f"eval/vit{size}14{reg}_pretrain.yaml" for size in "sblg" for reg in ("", "_reg4")),
    ],
)
def test_a_config_file_of_the_release_lies_where_its_commands_look(path: str) -> None:
    assert (REPOSITORY / "dinov2" / "configs" / path).is_file()


# Import paths that moved.


@pytest.mark.parametrize(("module", "name", "new"), SUCCESSORS)
def test_an_old_name_gives_its_successor_and_warns_once(
    module: str, name: str, new: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    old = importlib.import_module(module)
    assert not recwarn.list
    successor_module, _, successor_name = new.partition(":")
    with pytest.warns(
        DeprecationWarning, match=re.escape(f"{module}.{name} is now {successor_module}.{successor_name}")
    ):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(successor_module), successor_name)
    assert getattr(old, name) is found  # and any further warning would be an error


@pytest.mark.parametrize(("module", "name"), REPLACED)
def test_an_old_name_without_successor_says_what_to_use(module: str, name: str) -> None:
    with pytest.raises(ImportError, match=f"{module}.{name} is not in this package: ..."):
        exec(f"from {module} import {name}", {})


@pytest.mark.parametrize("module", GONE)
def test_a_module_that_is_gone_says_what_to_use(module: str) -> None:
    with pytest.raises(ImportError, match=r"is not in this package: ..."):
        importlib.import_module(module)


@pytest.mark.parametrize(
    "module",
    ["dinov2.eval.depth.models", "dinov2.eval.segmentation_m2f.models.segmentors", "dinov2.thirdparty.CLIP.clip"],
)
def test_what_lay_below_a_gone_module_is_gone_with_it(module: str) -> None:
    with pytest.raises(ImportError, match=r"is not in this package: ..."):
        importlib.import_module(module)


@pytest.mark.parametrize("module", [*MOVED, *GONE])
def test_the_table_holds_no_module_that_exists(module: str) -> None:
    path = REPOSITORY.joinpath(*module.split("."))
    assert not path.with_suffix(".py").exists(), "the module arrived, so its row can go"
    assert not (path / "__init__.py").exists(), "the package arrived, so its row can go"


def test_advice_names_only_what_exists() -> None:
    text = " ".join([*ADVICE, *GONE.values()])
    for dotted in sorted(set(re.findall(r"\bdinov2(?:\.\w+)+", text))):
        parent, _, name = dotted.rpartition(".")
        try:
            importlib.import_module(dotted)
        except ImportError:
            assert hasattr(importlib.import_module(parent), name), dotted
    for path in re.findall(r"\bdinov2/[\w/]+\.py", text):
        assert (REPOSITORY / path).is_file(), path


def test_old_modules_look_like_modules() -> None:
    import dinov2.utils.utils as old

    assert "CosineScheduler" in dir(old)
    assert not hasattr(old, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from dinov2.utils.utils import no_such_name", {})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dinov2\.utils\.no_such_module'"):
        importlib.import_module("dinov2.utils.no_such_module")


@pytest.mark.parametrize(
    "code",
    [
        "import dinov2.logging.helpers; dinov2.logging.helpers, dinov2.logging.setup_logging",
        "import dinov2.logging.helpers as helpers; helpers.__name__",
        "from dinov2.logging import helpers, setup_logging",
        "import dinov2.logging; import dinov2.logging.helpers",
    ],
)
def test_a_plain_module_has_an_old_module_below_it(code: str) -> None:
    result = run_python(code)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_plain_module_with_an_old_one_below_it_stays_a_plain_module() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dinov2\.logging\.nothing'"):
        importlib.import_module("dinov2.logging.nothing")
    assert importlib.reload(importlib.import_module("dinov2.logging")).__file__ is not None


def test_the_warning_points_at_the_line_that_imports() -> None:
    result = run_python("import sys\n\nfrom dinov2.utils.utils import CosineScheduler\n")
    assert result.returncode == 0
    assert "<string>:3: DeprecationWarning: dinov2.utils.utils.CosineScheduler is now dinov2.engine" in result.stderr


def test_the_hook_is_installed_once() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


def test_old_paths_are_removed_when_their_version_arrives() -> None:
    version = tuple(int(part) for part in dinov2.__version__.split(".")[:2])
    assert version < tuple(int(part) for part in REMOVED_IN.split("."))
