"""What is installed is what was meant: one list of dependencies, and a wheel that runs away from its checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirement_lines(name: str) -> set[str]:
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return {str(Requirement(line)) for line in lines if line.strip() and not line.startswith("#")}


def listed(*lists: list[str]) -> set[str]:
    return {str(Requirement(line)) for lines in lists for line in lines}


# Distributions whose import name is another, or that another package imports for us.
IMPORTED_AS = {"pillow": "PIL", "faiss-cpu": "faiss", "scikit-learn": "sklearn", "cuml-cu12": "cuml"}
IMPORTED_BY_OTHERS = {
    "accelerate": "transformers, for device_map",
    "onnxscript": "torch.onnx, to export",
    "tensorboard": "torch.utils.tensorboard",
}


def test_every_declared_package_is_imported_somewhere() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "dinov2").rglob("*.py"))
    extras = [line for name, lines in EXTRAS.items() if name not in ("dev", "all") for line in lines]
    names = {Requirement(line).name for line in [*PROJECT["dependencies"], *extras]} - IMPORTED_BY_OTHERS.keys()
    modules = {name: IMPORTED_AS.get(name, name) for name in names}
    assert [n for n, m in modules.items() if not re.search(rf"^\s*(import|from) {m}\b", code, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("requirements.txt", [PROJECT["dependencies"]]),
        ("requirements-extras.txt", [EXTRAS["report"]]),
        ("requirements-dev.txt", [EXTRAS["dev"]]),
    ],
)
def test_requirements_repeat_what_pyproject_says(name: str, lists: list[list[str]]) -> None:
    assert requirement_lines(name) == listed(*lists)


@pytest.mark.parametrize(
    ("name", "environment", "files"),
    [
        ("conda.yaml", "dinov2", ["requirements.txt"]),
        ("conda-extras.yaml", "dinov2-extras", ["requirements.txt", "requirements-extras.txt"]),
    ],
)
def test_conda_environments_take_the_same_lists(name: str, environment: str, files: list[str]) -> None:
    content = yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))
    assert content["name"] == environment
    assert f"python{PROJECT['requires-python']}" in content["dependencies"]
    assert {"pip": [f"-r {file}" for file in files]} in content["dependencies"]


def test_all_names_every_extra_of_a_user() -> None:
    (everything,) = EXTRAS["all"]
    requirement = Requirement(everything)
    assert requirement.name == PROJECT["name"]
    assert requirement.extras == set(EXTRAS) - {"all", "dev", "cuml"}


def test_nothing_pins_torch() -> None:
    for line in (line for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines):
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert operators <= {">="}, f"{line}: lower bounds only"


def test_the_licence_is_the_apache_one() -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the freshly built wheel was installed, without its dependencies."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "dinov2", source / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # The environment's own setuptools builds, so that this works without a network.
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("dinov2_anywhere-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


def run_installed(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_the_wheel_says_its_version(installed: Path, tmp_path: Path) -> None:
    where = run_installed(installed, tmp_path, "-c", "import dinov2; print(dinov2.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed)
    (metadata,) = installed.glob("dinov2_anywhere-*.dist-info")
    version = metadata.name.removesuffix(".dist-info").partition("-")[2]
    assert version in run_installed(installed, tmp_path, "-m", "dinov2", "--version").stdout


@pytest.mark.slow
@pytest.mark.parametrize("suffix, least", [(".yaml", 12), (".jinja", 6), (".css", 5), (".js", 2)])
def test_the_wheel_holds_every_data_file_of_the_checkout(installed: Path, suffix: str, least: int) -> None:
    def files(root: Path) -> list[str]:
        return sorted(path.relative_to(root).as_posix() for path in (root / "dinov2").rglob(f"*{suffix}"))

    assert files(installed) == files(REPOSITORY)
    assert len(files(installed)) >= least
    assert (installed / "dinov2" / "py.typed").exists()
    assert not (installed / "tests").exists()


@pytest.mark.slow
def test_the_wheel_loads_a_config_and_toy_images(installed: Path, tmp_path: Path) -> None:
    code = (
        "from dinov2.configs import load_config\n"
        "from dinov2.data import make_dataset\n"
        "cfg = load_config('train/vitl16_short', ['train.batch_size_per_gpu=2'])\n"
        "image, target = make_dataset('toy:split=VAL')[0]\n"
        "print(cfg.student.arch, image.mode, target)\n"
    )
    arch, mode, target = run_installed(installed, tmp_path, "-c", code).stdout.split()
    assert (arch, mode) == ("vit_large", "RGB")
    assert 0 <= int(target) < 10


@pytest.mark.slow
def test_the_wheel_knows_the_classes_of_imagenet(installed: Path, tmp_path: Path) -> None:
    code = "from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES as c; print(len(c), c[1].name)"
    assert run_installed(installed, tmp_path, "-c", code).stdout.split() == ["1000", "goldfish"]


@pytest.mark.slow
def test_the_wheel_writes_a_report(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"trained": 50.0}')
    code = "from dinov2.report import write_report; print(write_report('.', out='page.html').stat().st_size)"
    assert int(run_installed(installed, tmp_path, "-c", code).stdout) > 5_000
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_console_script_starts_the_command_line(installed: Path, tmp_path: Path) -> None:
    (entry_points,) = installed.glob("dinov2_anywhere-*.dist-info/entry_points.txt")
    assert "dinov2 = dinov2.cli:main" in entry_points.read_text(encoding="utf-8")
    code = "from dinov2.cli import main; raise SystemExit(main(['--help']))"
    assert "quickstart" in run_installed(installed, tmp_path, "-c", code).stdout
