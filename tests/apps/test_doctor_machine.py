"""What the doctor says about a machine, from plain numbers and from this one."""

import os
import re
import shlex
import shutil
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch

from dinov2.apps.doctor import Diagnosis, Finding, examine, in_words
from dinov2.apps.doctor.machine import Machine, examine_machine, observe_machine
from dinov2.apps.doctor.packages import (
    _LEFT_OUT,
    _PURPOSES,
    _from_metadata,
    pip_command,
    requirements,
    torchvision_pair,
)
from tests.test_floors import imports_of, modules, tree_of

GIB = 2**30
FIT = Machine(
    cores=8,
    threads=8,
    load=0.5,
    memory=32 * GIB,
    shared_memory=8 * GIB,
    disk={"current folder": 100 * GIB, "download cache": None},
    open_files=4096,
    products_per_second={"float32": 5e10, "bfloat16": 1e10},
)


def found(machine, subject):
    (finding,) = (finding for finding in examine_machine(machine) if finding.subject == subject)
    return finding


def changed(**values):
    return Machine(**{**FIT.__dict__, **values})


def test_a_fit_machine_has_nothing_but_fine_findings():
    assert {finding.level for finding in examine_machine(FIT)} == {"fine"}


@pytest.mark.parametrize(
    "changes, subject, level, words",
    [
        ({"threads": 16}, "threads", "problem", "export OMP_NUM_THREADS=8"),
        ({"threads": 1}, "threads", "note", "export OMP_NUM_THREADS=8"),
        ({"load": 7.0}, "load", "note", "train.num_threads=1"),
        ({"load": 7.0, "threads": 1}, "load", "note", "top"),
        ({"device": "cuda", "accelerators": ("A",), "cores": 1, "threads": 1}, "loader", "note", "train.num_workers=0"),
        ({"shared_memory": 64 * 2**20}, "shared memory", "problem", "--shm-size=8g"),
        ({"memory": GIB // 2}, "memory", "problem", "train.cache_dataset=false"),
        ({"disk": {"current folder": 2 * GIB}}, "disk", "note", "train.keep_checkpoints=1"),
        ({"disk": {"download cache": GIB // 2}}, "disk", "problem", "DINOV2_CACHE"),
        ({"open_files": 256}, "open files", "note", "ulimit -n"),
        ({"gpu_hardware": True}, "device", "problem", "--force-reinstall torch torchvision"),
        ({"gpu_hardware": True, "torch_cuda": "13.0"}, "device", "problem", "nvidia-smi"),
        ({"products_per_second": {"float32": 1e10, "bfloat16": 4e10}}, "precision", "note", "train.precision=bf16"),
        (
            {"precision": "bfloat16", "products_per_second": {"float32": 4e10, "bfloat16": 1e10}},
            "precision",
            "note",
            "train.precision=fp32",
        ),
    ],
)
def test_each_finding_comes_with_what_fixes_it(changes, subject, level, words):
    finding = found(changed(**changes), subject)
    assert finding.level == level and words in finding.remedy


def test_the_precision_is_explained():
    assert "AVX512-BF16 or AMX" in found(FIT, "precision").says and "5.0 times as slow" in found(FIT, "precision").says
    gpu = changed(device="cuda", accelerators=("A", "B"), precision="bfloat16", products_per_second={})
    assert "tensor cores" in found(gpu, "precision").says
    assert "2 GPUs: A, B" in found(gpu, "device").says


def test_loader_workers_leave_a_core_to_the_training():
    assert "train.num_workers=7" in found(FIT, "loader").says
    assert "needs no worker" in found(changed(cores=2, threads=2), "loader").says
    two = changed(device="cuda", accelerators=("A", "B"))
    assert "train.num_workers=3" in found(two, "loader").says and "each of the 2 processes" in found(two, "loader").says


def test_a_busy_machine_is_neither_told_to_use_more_threads_nor_measured():
    busy = changed(load=7.0, threads=1, products_per_second={"float32": 1e9, "bfloat16": 4e9})
    assert found(busy, "threads").level == "fine"
    assert found(busy, "precision").level == "fine" and "this machine is busy" in found(busy, "precision").says


def test_this_machine_is_observed():
    machine = observe_machine()
    assert machine.threads == torch.get_num_threads() and machine.cores >= 1
    assert machine.products_per_second["float32"] > 0
    assert machine.disk["current folder"] > 0


# Packages.


def test_requirements_are_those_of_this_distribution():
    groups = {extra: {one.name for one in members} for extra, members in requirements().items()}
    assert "torch" in groups[""] and "transformers" in groups["hf"]
    assert not {"pytest", "dinov2-anywhere"} & set().union(*groups.values())


def test_an_installed_package_has_its_requirements_in_its_metadata():
    groups = {extra: {one.name for one in members} for extra, members in _from_metadata().items()}
    assert "torch" in groups[""] and "transformers" in groups["hf"] and "transformers" not in groups[""]


@pytest.mark.parametrize(
    "lines, torch_version, level",
    [
        (["numpy", "torch==2.11.0"], "2.11.0+cpu", "fine"),
        (["numpy", "torch==2.11.0"], "2.12.0", "problem"),
        (["torch (>=2.14.0)"], "2.15.0", "fine"),
        (["torch (>=2.14.0)"], "2.13.1", "problem"),
        (["numpy"], "2.13.1", "fine"),
    ],
)
def test_a_torchvision_of_another_torch_is_found(lines, torch_version, level):
    finding = torchvision_pair(lines, {"torch": torch_version, "torchvision": "0.26.0"})
    assert finding.level == level
    assert level == "fine" or "--force-reinstall torch torchvision" in finding.remedy


def test_a_missing_torchvision_is_found():
    finding = torchvision_pair([], {"torch": "2.11.0", "torchvision": ""})
    assert finding.level == "problem" and finding.remedy.endswith("install torchvision")


def test_the_pair_that_runs_these_tests_matches():
    assert torchvision_pair().level == "fine"
    assert any(re.match(r"torch\b", line) for line in requires("torchvision"))


def test_the_command_for_pip_reaches_the_python_that_asks(monkeypatch, tmp_path):
    for path in (f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", str(tmp_path)):
        monkeypatch.setenv("PATH", path)
        python, *words = shlex.split(pip_command("install"))
        assert Path(shutil.which(python)).parent == Path(sys.executable).parent
        assert words == ["-m", "pip", "install"]


def test_every_optional_package_is_told_with_what_it_is_for():
    assert set(requirements()) - {""} == set(_PURPOSES)


def test_no_package_is_recommended_that_no_code_imports():
    imported = {found.module.partition(".")[0] for path in modules() for found in imports_of(tree_of(path))}
    imported |= {"tensorboard", "accelerate", "onnxscript"}  # through torch and transformers
    names = {"scikit-learn": "sklearn", "faiss-cpu": "faiss", "cuml-cu12": "cuml"}
    optional = {names.get(one.name, one.name) for extra, members in requirements().items() if extra for one in members}
    assert optional - imported == set()
    assert not _LEFT_OUT & imported


# The whole.


def test_this_machine_in_words():
    diagnosis = examine()
    text = in_words(diagnosis)
    assert f"torch {version('torch')} with its torchvision {version('torchvision')}" in text
    assert diagnosis.verdict == ("fit" if diagnosis.healthy else "unfit")
    for finding in diagnosis.findings:
        assert finding.remedy or finding.level == "fine", finding


def test_problems_are_counted_and_numbers_that_are_not_finite_become_null():
    findings = [Finding("problem", "disk", "full", "tidy up", {"free": float("nan"), "places": ["a"]})]
    diagnosis = Diagnosis("machine", "unfit", findings)
    assert in_words(diagnosis).splitlines()[0] == "this machine has 1 problem"
    assert diagnosis.to_dict()["findings"][0]["facts"] == {"free": None, "places": ["a"]}
