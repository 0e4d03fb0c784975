"""Installed packages: present, new enough, and made for each other.

What is needed and what is optional is read from the `pyproject.toml` of a clone, or from this distribution's metadata,
so that no list here can differ from the one that pip reads.
"""

import importlib
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dinov2.apps.doctor.findings import Finding, fine, note, problem

__all__ = ["examine_packages", "pip_command", "requirements", "torchvision_pair"]

_DISTRIBUTION = "dinov2-anywhere"
# Tools for changing this package, and the union of the others.
_LEFT_OUT = {"dev", "all"}
# Extras that install only where there is an NVIDIA GPU.
_FOR_CUDA = {"cuml"}
_PURPOSES = {
    "hf": "transformers' classes and models by their Hugging Face names",
    "hub": "downloads from the Hugging Face hub",
    "parquet": "data sets and embeddings in Parquet files",
    "index": "k-NN on tens of millions of features",
    "logistic": "logistic regression by scikit-learn",
    "cuml": "logistic regression by cuML",
    "export": "ONNX files",
    "report": "HTML pages",
    "tiff": "TIFF images of more than three channels",
    "track": "curves in TensorBoard",
    "timm": "timm's models and weights",
}


def examine_packages() -> Iterator[Finding]:
    """Python, torch with its torchvision, the other requirements, the optional ones."""
    yield fine("python", f"Python {'.'.join(map(str, sys.version_info[:3]))}", version=sys.version.split()[0])
    yield torchvision_pair()
    groups = requirements()
    for requirement in groups.get("", []):
        fault = _fault(requirement)
        if fault:
            yield problem("packages", fault, f"{pip_command('install')} --upgrade '{_plain(requirement)}'")
    if present := [f"{one.name} {version(one.name)}" for one in groups.get("", []) if not _fault(one)]:
        yield fine("packages", f"all that is always needed is there: {', '.join(present)}")
    optional = []
    for extra, members in groups.items():
        if not extra or (extra in _FOR_CUDA and not torch.cuda.is_available()):
            continue
        lacking = [one for one in members if _fault(one)]
        optional += [f"{one.name} {version(one.name)}" for one in members if one not in lacking]
        if lacking:
            says = f"for {_PURPOSES.get(extra, extra)}: {' and '.join(map(_fault, lacking))}"
            command = f"{pip_command('install')} {' '.join(repr(_plain(one)) for one in lacking)}"
            yield note("optional packages", says, command)
    if optional:
        yield fine("optional packages", f"there: {', '.join(optional)}")
    if _installed("dinov2") is not None:
        says = "another distribution called dinov2 is installed and takes this package's import name"
        yield problem("packages", says, f"{pip_command('uninstall')} dinov2")


def requirements() -> dict[str, list[Requirement]]:
    """Requirements of users of this package, by extra; those under "" are always needed."""
    try:
        project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = {"": project["dependencies"], **project["optional-dependencies"]}
        groups = {extra: [Requirement(line) for line in members] for extra, members in lines.items()}
    except (OSError, KeyError, ValueError):  # not a clone
        groups = _from_metadata()
    return {extra: members for extra, members in groups.items() if extra not in _LEFT_OUT and members}


def _from_metadata() -> dict[str, list[Requirement]]:
    everything = [Requirement(line) for line in requires(_DISTRIBUTION) or []]
    extras = metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    groups: dict[str, list[Requirement]] = {"": [one for one in everything if one.marker is None]}
    for extra in extras:
        groups[extra] = [one for one in everything if one.marker is not None and one.marker.evaluate({"extra": extra})]
    return groups


def torchvision_pair(lines: Sequence[str] | None = None, installed: Mapping[str, str | None] | None = None) -> Finding:
    """Whether the installed torchvision was built for the installed torch, by its own metadata, and loads.

    `lines` and `installed` stand in for torchvision's requirements and the installed versions.
    """
    versions = installed or {name: _installed(name) for name in ("torch", "torchvision")}
    reinstall = f"{pip_command('install')} --upgrade --force-reinstall torch torchvision"
    if missing := [name for name in ("torch", "torchvision") if not versions[name]]:
        says = f"{' and '.join(missing)} cannot be found"
        return problem("torch", says, f"{pip_command('install')} {' '.join(missing)}")
    have = versions["torch"] or ""
    facts = {"torch": have, "torchvision": versions["torchvision"]}
    needed = [Requirement(line) for line in (requires("torchvision") if lines is None else lines) or []]
    # The build (`+cpu`, `+cu126`) may differ: both come from one release.
    made_for = ",".join(re.sub(r"\+[\w.]+", "", str(one.specifier)) for one in needed if one.name == "torch")
    if not SpecifierSet(made_for).contains(have, prereleases=True):
        says = f"torchvision {versions['torchvision']} was built for torch{made_for}, but torch {have} is installed"
        return problem("torch", says, reinstall, **facts, made_for=made_for)
    if installed is None and (trouble := _loading_trouble()):
        return problem("torch", f"torchvision does not load: {trouble}", reinstall, **facts)
    return fine("torch", f"torch {have} with its torchvision {versions['torchvision']}", **facts)


def pip_command(verb: str) -> str:
    """`python -m pip install`, by the name that reaches this very Python from a shell; by uv where there is no pip."""
    found = shutil.which("python")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    python = "python" if same else shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:
        return f"uv pip {verb} --python {python}"
    return f"{python} -m pip {verb}"


def _fault(requirement: Requirement) -> str:
    """Reason that a requirement is not met, in a few words; "" where it is."""
    have = _installed(requirement.name)
    if have is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(have, prereleases=True):
        return f"{requirement.name} {have} is not {requirement.specifier}"
    return ""


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _loading_trouble() -> str:
    try:
        importlib.import_module("torchvision")
        return ""
    except Exception as error:  # a mismatch shows as ImportError, OSError, AttributeError or RuntimeError
        return " ".join(str(error).split()) or type(error).__name__
