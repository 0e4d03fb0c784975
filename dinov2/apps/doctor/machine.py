"""Readiness of this machine for training and evaluation. Each finding comes with the command that fixes it.

The machine is first read into plain numbers (`Machine`); findings are a function of them. The only thing measured is
the speed of one matrix product in two precisions, which takes a fraction of a second.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dinov2.apps.doctor.findings import Finding, counted, fine, note, problem
from dinov2.apps.doctor.packages import pip_command
from dinov2.checkpoints.download import cache_folder
from dinov2.engine.memory import available_memory
from dinov2.engine.parallel import choose_device, choose_precision

__all__ = ["Machine", "examine_machine", "observe_machine"]

_GIB = 2**30
# One batch of 64 images in crops of 224 and 98 pixels is about 250 MB, and each worker holds two.
_LEAST_SHARED_MEMORY = 2 * _GIB
_LEAST_DISK = 5 * _GIB
# Side of the matrices that are multiplied to compare precisions.
_SIDE = {"cpu": 256, "cuda": 4096, "mps": 2048}
_REASONS = {
    ("cuda", "bfloat16"): "this GPU has tensor cores for it",
    ("cuda", "float32"): "this GPU is older than the first with bfloat16 (compute capability 8.0)",
    ("cpu", "bfloat16"): "this CPU has instructions for it (AVX512-BF16 or AMX)",
    ("cpu", "float32"): "this CPU has no instructions for bfloat16 (AVX512-BF16 or AMX)",
}
_LARGER_DISK = {
    "download cache": "export DINOV2_CACHE=/a/larger/disk",
    "temporary files": "export TMPDIR=/a/larger/disk",
}


@dataclass(frozen=True)
class Machine:
    """A machine in plain numbers; None where it does not say."""

    device: str = "cpu"
    """The device that `auto` means here: cpu, cuda or mps."""
    accelerators: tuple[str, ...] = ()
    """Names of the GPUs that torch can use."""
    gpu_hardware: bool = False
    """Whether there is a driver's trace of an NVIDIA GPU, usable or not."""
    torch_cuda: str | None = None
    """CUDA (or ROCm) version that torch was built for; None for a build for CPUs."""
    precision: str = "float32"
    """Precision that `auto` stands for here."""
    products_per_second: dict[str, float] = field(default_factory=dict)
    """Measured: floating-point operations a second of a matrix product, by number format."""
    cores: int = 1
    """Cores that this process may use."""
    threads: int = 1
    """Threads that torch computes with."""
    load: float | None = None
    """Mean number of processes that were ready to run over the last minute."""
    memory: int | None = None
    """Free bytes of main memory."""
    shared_memory: int | None = None
    """Free bytes of /dev/shm, through which loader workers hand over their batches."""
    disk: dict[str, int | None] = field(default_factory=dict)
    """Free bytes by place: `current folder`, `download cache`, `temporary files`."""
    open_files: int | None = None
    """Files that a process may hold open."""


def examine_machine(machine: Machine | None = None) -> Iterator[Finding]:
    """Devices, precision, threads, loader workers, memory, disk."""
    here = machine if machine is not None else observe_machine()
    yield _device(here)
    yield _precision(here)
    yield from _threads(here)
    yield _loader(here)
    if here.shared_memory is not None:
        says, free = f"/dev/shm has {_size(here.shared_memory)} free", here.shared_memory
        remedy = "start the container with --shm-size=8g (or --ipc=host), or train with train.num_workers=0"
        too_little = f"{says}, too little for the batches of several loader workers"
        ample = here.shared_memory >= _LEAST_SHARED_MEMORY
        yield (
            fine("shared memory", says, free=free) if ample else problem("shared memory", too_little, remedy, free=free)
        )
    if here.open_files is not None and here.open_files < 1024:
        says = f"a process may hold {here.open_files} files open, which many loader workers exceed"
        yield note("open files", says, "ulimit -n 4096", limit=here.open_files)
    if here.memory is not None and here.memory < 2 * _GIB:
        remedy = "close other programs, or train with train.cache_dataset=false train.num_workers=1"
        yield problem("memory", f"only {_size(here.memory)} of main memory are free", remedy, free=here.memory)
    elif here.memory is not None:
        yield fine("memory", f"{_size(here.memory)} of main memory are free", free=here.memory)
    yield from (_disk(place, free) for place, free in here.disk.items() if free is not None)


def observe_machine() -> Machine:
    """This machine, now."""
    device = choose_device("auto")
    names = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Machine(
        device=device.type,
        accelerators={"cuda": names, "mps": ("Apple GPU",)}.get(device.type, ()),
        gpu_hardware=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists(),
        torch_cuda=torch.version.cuda or torch.version.hip,
        precision=_name(choose_precision("auto", device) or torch.float32),
        products_per_second={_name(dtype): _speed(device, dtype) for dtype in (torch.float32, torch.bfloat16)},
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        memory=available_memory(),
        shared_memory=_free(Path("/dev/shm")),
        disk={
            "current folder": _free(Path.cwd()),
            "download cache": _free(cache_folder()),
            "temporary files": _free(Path(tempfile.gettempdir())),
        },
        open_files=_open_files(),
    )


def _device(here: Machine) -> Finding:
    if here.accelerators:
        gpus = counted(len(here.accelerators), "GPU")
        says, remedy = f"torch computes on {gpus}: {', '.join(here.accelerators)}", ""
    elif here.gpu_hardware and here.torch_cuda is None:
        says = "there is an NVIDIA GPU, but this torch was built for CPUs only"
        remedy = f"{pip_command('install')} --upgrade --force-reinstall torch torchvision"
    elif here.gpu_hardware:
        says = (
            f"there is an NVIDIA GPU, but torch (built for CUDA {here.torch_cuda}) cannot use it: its driver is too "
            "old, or the GPU is hidden from this process"
        )
        remedy = "nvidia-smi; echo $CUDA_VISIBLE_DEVICES"
    else:
        says, remedy = "no GPU that torch could use; everything runs on the CPU", ""
    return Finding("problem" if remedy else "fine", "device", says, remedy, {"device": here.device})


def _precision(here: Machine) -> Finding:
    full, half = (here.products_per_second.get(name, 0.0) for name in ("float32", "bfloat16"))
    if _is_busy(here) and here.device == "cpu":  # other work would decide which product waits
        full = half = 0.0
        measured = "the two were not compared, because this machine is busy"
    elif full and half:
        times, kind = max(half / full, full / half), "fast" if half >= full else "slow"
        measured = f"measured here, a matrix product in bfloat16 is {times:.1f} times as {kind} as in float32"
    else:
        measured = "bfloat16 does not run here"
    reason = _REASONS.get((here.device, here.precision), "it is the safe choice on this device")
    says = f"precision auto means {here.precision}, because {reason}; {measured}"
    facts = {"auto": here.precision, "flops": here.products_per_second}
    # Far from the rule's expectation, and not by the noise of a busy machine.
    if here.precision == "float32" and half > 1.5 * full > 0:
        return note("precision", f"{says}: bfloat16 is faster after all", "train.precision=bf16", **facts)
    if here.precision == "bfloat16" and full > 1.5 * half > 0:
        return note("precision", f"{says}: float32 is faster after all", "train.precision=fp32", **facts)
    return fine("precision", says, **facts)


def _threads(here: Machine) -> Iterator[Finding]:
    """Threads against cores, and other load."""
    says = f"torch computes with {counted(here.threads, 'thread')} on {counted(here.cores, 'usable core')}"
    remedy, facts = f"export OMP_NUM_THREADS={here.cores}", {"threads": here.threads, "cores": here.cores}
    if here.threads > here.cores:
        yield problem("threads", f"{says}: they wait for each other", remedy, **facts)
    elif here.device == "cpu" and here.threads < here.cores and not _is_busy(here):
        yield note("threads", f"{says}: the others idle, unless several processes share the machine", remedy, **facts)
    else:
        yield fine("threads", says, **facts)
    if _is_busy(here):
        says = (
            f"other work keeps this machine busy ({here.load:.1f} processes wanted {counted(here.cores, 'core')} over "
            "the last minute): times measured now say little"
        )
        if here.device == "cpu" and here.threads > 1:
            says += ", and several threads that wait for each other make small steps slow"
            yield note("load", says, "train.num_threads=1", load=here.load)
        else:
            yield note("load", says, "top", load=here.load)


def _is_busy(here: Machine) -> bool:
    return here.load is not None and here.load > 0.5 * here.cores


def _loader(here: Machine) -> Finding:
    processes = max(1, len(here.accelerators))  # one a GPU
    workers, cores = here.cores // processes - 1, counted(here.cores, "core")
    if workers < 2 and here.device == "cpu":
        says = (
            f"with {cores} for model and loader, decode once and keep the images: "
            "train.augmentation_backend=tensor train.cache_dataset=true needs no worker"
        )
        return fine("loader", says, workers=0)
    if workers < 1:
        says = (
            f"{cores} for {counted(processes, 'training process', 'es')} and their loaders are few: images are better "
            "decoded once and kept"
        )
        remedy = "train.augmentation_backend=tensor train.cache_dataset=true train.num_workers=0"
        return note("loader", says, remedy, workers=0)
    each = f" of each of the {processes} processes" if processes > 1 else ""
    says = f"{counted(workers, 'loader worker')} leave a core to the training{each}: train.num_workers={workers}"
    return fine("loader", says, workers=workers)


def _disk(place: str, free: int) -> Finding:
    says = f"{place}: {_size(free)} free"
    if free < _LEAST_DISK // 5:
        remedy = _LARGER_DISK.get(place, "dinov2 train --output-dir /a/larger/disk")
        return problem("disk", f"{says}, less than a checkpoint of a large model", remedy, place=place, free=free)
    if free < _LEAST_DISK:
        says += "; a run of a large model keeps several checkpoints of 5 GB"
        return note("disk", says, "train.keep_checkpoints=1", place=place, free=free)
    return fine("disk", says, place=place, free=free)


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one matrix product; 0 where it is not possible."""
    side = _SIDE[device.type]
    try:
        a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        best = min(_seconds(device, a, b) for _ in range(4))  # the first one also loads code
    except (RuntimeError, TypeError):  # a number format that the device does not have
        return 0.0
    return 2 * side**3 / best


def _seconds(device: torch.device, a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.perf_counter()
    float((a @ b)[0, 0])  # reading a number waits for the device
    return max(time.perf_counter() - began, 1e-9)


def _usable_cores() -> int:
    """Cores that the scheduler and a container's quota leave to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _free(folder: Path) -> int | None:
    """Free bytes where the folder is or would be; None where there is no such place."""
    existing = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if existing is None or (folder.name == "shm" and existing != folder):
        return None
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:.1f} GiB" if n_bytes >= _GIB else f"{n_bytes / 2**20:.0f} MiB"
