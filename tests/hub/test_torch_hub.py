"""`torch.hub` itself loads, lists and explains the entries, from a folder and from a zip, with torch alone."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dinov2.models.releases import RELEASES

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRIES = {row.hub_name for row in RELEASES if row.kind in ("backbone", "classifier")}

# An environment with Python's own packages, torch, and what torch itself requires: not even numpy.
TORCH_ALONE = """
import sys, json
from importlib.machinery import PathFinder

INSTALLED = "torch functorch torchgen filelock typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec"
INSTALLED = set(f"{INSTALLED} setuptools pkg_resources triton nvidia cuda dinov2 hubconf".split())

class TorchAlone(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        package = fullname.partition(".")[0]
        if package in sys.stdlib_module_names or package in INSTALLED or package.startswith("_"):
            return PathFinder.find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = TorchAlone
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds of the package, away from this checkout."""
    folder = tmp_path_factory.mktemp("clone") / "dinov2-main"
    shutil.copytree(REPOSITORY / "dinov2", folder / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "hubconf.py", folder)
    return folder


@pytest.fixture(scope="module")
def archive(clone: Path) -> Path:
    """The clone as GitHub serves a branch: one folder, whose name is of no consequence, in a zip."""
    path = clone.parent / "branch.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.write(clone, "somebody-dinov2-0123abc/")
        for source in sorted(clone.rglob("*")):
            file.write(source, f"somebody-dinov2-0123abc/{source.relative_to(clone).as_posix()}")
    return path


def run_with_torch_alone(folder: Path, code: str, **environment: str) -> Any:
    """What `code` leaves in `result`, from a fresh process in `folder`."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        # -P: the checkout of these tests must not be found through the current folder.
        [sys.executable, "-P", "-c", f"{TORCH_ALONE}\nimport torch\n{code}\nprint('RESULT', json.dumps(result))"],
        cwd=folder,
        env={**variables, "TORCH_HOME": str(folder / "torch home"), **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    line = next(line for line in finished.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


LOOK = """
import dinov2
result = {
    "where": dinov2.__file__,
    "backbone": list(backbone(torch.zeros(1, 3, 28, 42)).shape),
    "classifier": list(classifier(torch.zeros(1, 3, 28, 42)).shape),
    "layers": classifier.layers,
    "loaded": sorted({name.partition(".")[0] for name in sys.modules} & {"numpy", "torchvision", "PIL", "safetensors"}),
}
"""


@pytest.mark.slow
def test_a_folder_loads_with_torch_alone(clone: Path, tmp_path: Path) -> None:
    load = f"torch.hub.load({str(clone)!r}, 'dinov2_vits14%s', source='local', pretrained=False%s)"
    code = f"backbone, classifier = {load % ('_reg', '')}, {load % ('_lc', ', layers=1')}\n{LOOK}"
    result = run_with_torch_alone(tmp_path, code)
    assert Path(result.pop("where")).is_relative_to(clone)
    assert result == {"backbone": [1, 384], "classifier": [1, 1000], "layers": 1, "loaded": []}


@pytest.mark.slow
def test_a_zip_as_github_serves_it_lists_explains_and_loads(archive: Path, tmp_path: Path) -> None:
    code = f"""
import shutil
def served(url, target, *rest, **options):
    assert url == "https://github.com/somebody/dinov2/zipball/main", url
    shutil.copy({str(archive)!r}, target)
torch.hub.download_url_to_file = served
options = dict(skip_validation=True, trust_repo=True)
names = torch.hub.list("somebody/dinov2:main", **options)
words = torch.hub.help("somebody/dinov2:main", "dinov2_vits14_lc", **options)
backbone = torch.hub.load("somebody/dinov2:main", "dinov2_vits14", pretrained=False, **options)
classifier = torch.hub.load("somebody/dinov2:main", "dinov2_vits14_reg_lc", pretrained=False, **options)
{LOOK}
result |= dict(names=names, words=words)
"""
    result = run_with_torch_alone(tmp_path, code)
    assert Path(result["where"]).is_relative_to(tmp_path / "torch home" / "hub" / "somebody_dinov2_main")
    assert set(result["names"]) == ENTRIES
    assert "1 or 4" in result["words"]
    assert (result["backbone"], result["classifier"], result["layers"]) == ([1, 384], [1, 1000], 4)


@pytest.mark.slow
def test_pretrained_weights_load_with_torch_alone(clone: Path, tmp_path: Path) -> None:
    code = f"""
import os
fresh = torch.hub.load({str(clone)!r}, "dinov2_vits14_lc", source="local", pretrained=False, layers=1)
cache = torch.hub.get_dir() + "/checkpoints/"  # where torch.hub itself would have put them
os.makedirs(cache)
torch.save(fresh.backbone.state_dict(), cache + "dinov2_vits14_pretrain.pth")
torch.save(fresh.linear_head.state_dict(), cache + "dinov2_vits14_linear_head.pth")
del os.environ["DINOV2_CACHE"]
loaded = torch.hub.load({str(clone)!r}, "dinov2_vits14_lc", source="local", layers=1)
result = all(torch.equal(value, fresh.state_dict()[key]) for key, value in loaded.state_dict().items())
"""
    assert run_with_torch_alone(tmp_path, code) is True


@pytest.mark.parametrize("package", ["numpy", "torchvision", "PIL", "safetensors", "omegaconf", "rich"])
def test_nothing_else_is_there_to_import_in_these_tests(package: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", f"{TORCH_ALONE}\nimport {package}"], capture_output=True, text=True
    )
    assert finished.returncode == 1 and f"No module named '{package}'" in finished.stderr


def test_hubconf_offers_the_entries_and_nothing_else() -> None:
    import hubconf

    listed = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert set(hubconf.__all__) == ENTRIES == listed
    assert hubconf.dependencies == ["torch"]
    assert all(getattr(hubconf, name).__doc__ for name in ENTRIES)
