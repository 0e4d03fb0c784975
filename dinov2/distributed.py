"""Rank, world size and collectives of this process, and the start from torchrun or SLURM.

With one process there is no process group at all: every collective is the identity, so all other modules run and are
tested on a laptop. The environment decides once, in `enable`: the six torchrun variables win, SLURM counts only when
it started this very process as one of several tasks (an interactive shell inside an allocation is one process), and
nothing means one process. Only `engine/parallel.py` and `engine/checkpoint.py` speak to `torch.distributed` besides.
"""

import atexit
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.errors import ConfigError, DinoError

__all__ = [
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast_object",
    "disable",
    "enable",
    "expand_node_list",
    "get_global_rank",
    "get_global_size",
    "get_local_rank",
    "get_local_size",
    "is_enabled",
    "is_main_process",
]

_T = TypeVar("_T")

_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_RANK_VARIABLES = _VARIABLES[2:]  # a user may fix address and port of a SLURM job, but not who is who


@dataclass(frozen=True)
class _Place:
    """Rank and sizes of this process, as the six variables have them."""

    master_addr: str
    master_port: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def variables(self) -> dict[str, str]:
        values = (self.master_addr, self.master_port, self.rank, self.world_size, self.local_rank)
        return dict(zip(_VARIABLES, map(str, (*values, self.local_world_size)), strict=True))


# The process group knows ranks but not which of them share a machine, so `enable` notes its place here.
_place: _Place | None = None


def is_enabled() -> bool:
    """True once a process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_global_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_enabled() else 1


def get_global_rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if is_enabled() else 0


def get_local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return _place.local_rank if is_enabled() and _place is not None else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return _place.local_world_size if is_enabled() and _place is not None else 1


def is_main_process() -> bool:
    """True in the one process that writes files and talks to the user."""
    return get_global_rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if get_global_size() > 1:
        dist.barrier()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all processes; `x` itself when there is one. Leaves its argument alone; carries no gradient."""
    return _all_reduce(x, maximum=False)


def all_reduce_max(x: Tensor) -> Tensor:
    """Element-wise maximum of `x` over all processes; `x` itself when there is one. Leaves its argument alone."""
    return _all_reduce(x, maximum=True)


def all_gather_rows(x: Tensor) -> Tensor:  # [S_rank, ...] -> [sum of S_rank, ...]
    """The rows of all processes in rank order; each may bring another number of rows, none included."""
    if get_global_size() == 1:
        return x
    n_rows = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
    all_n_rows = [torch.empty_like(n_rows) for _ in range(get_global_size())]
    dist.all_gather(all_n_rows, n_rows)
    lengths = [int(n) for n in all_n_rows]
    # Collectives want equal shapes, so all pad to the longest and cut afterwards.
    padded = x.new_zeros((max(lengths), *x.shape[1:]))
    padded[: x.shape[0]] = x.detach()
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:length] for rows, length in zip(gathered, lengths, strict=True)])


def broadcast_object(obj: _T) -> _T:
    """The object that the main process passed in; all processes must call."""
    if get_global_size() == 1:
        return obj
    box: list[_T] = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def enable(*, set_cuda_current_device: bool = True, overwrite: bool = False, allow_nccl_timeout: bool = False) -> None:
    """Join the other processes, if there are any.

    The group uses gloo for tensors on the CPU and NCCL for those on CUDA. `set_cuda_current_device` makes the GPU with
    the local rank's number the current one. Under SLURM the six variables are exported for child processes; a variable
    that holds another value already is refused unless `overwrite`. `allow_nccl_timeout` makes NCCL abort a collective
    that hangs. Raises `ConfigError` when the environment contradicts itself, `DinoError` when called twice.
    """
    global _place
    if is_enabled():
        raise DinoError("the process group exists already; call enable() once per process, or disable() before")
    place = _detect(os.environ)
    if place is None:
        return
    if not dist.is_available():
        raise DinoError(
            f"this PyTorch is built without torch.distributed, but the environment asks for {place.world_size} "
            "processes; start one process, or install a build that has it"
        )
    variables = place.variables()
    if allow_nccl_timeout:
        variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    _export(variables, overwrite=overwrite)
    use_cuda = torch.cuda.is_available()
    if use_cuda and set_cuda_current_device:
        torch.cuda.set_device(place.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", init_method="env://")
    except (RuntimeError, ValueError) as error:
        raise DinoError(
            f"process {place.rank} of {place.world_size} could not join the others at {place.master_addr}:"
            f"{place.master_port} ({error}); if the port is taken, set MASTER_PORT to a free one"
        ) from error
    _place = place
    atexit.register(disable)
    barrier()


def disable() -> None:
    """Leave and destroy the process group; nothing happens where there is none.

    A program that ended well calls `barrier` first: sharded tensors keep gloo's threads alive beyond the group, and one
    that still holds a tensor of the last collective when Python shuts down aborts the process. There is none in here,
    because a process that gave up must not wait for the others.
    """
    global _place
    if is_enabled():
        dist.destroy_process_group()
    _place = None
    atexit.unregister(disable)


def expand_node_list(node_list: str) -> list[str]:
    """Host names of SLURM's compact form: `a[01-03,7],b4` -> `a01 a02 a03 a7 b4`.

    Names may hold several bracket groups (`rack[1-2]node[1-2]`); zero padding is kept.
    """
    nodes: list[str] = []
    # Commas inside brackets belong to the group, those outside separate names.
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list):
        names = [""]
        for plain, group in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", pattern.strip()):
            endings = [plain] if plain else _expand_group(group, node_list)
            names = [name + ending for name in names for ending in endings]
        nodes.extend(names)
    if "".join(nodes) == "" or node_list.count("[") != node_list.count("]"):
        raise ConfigError(f"the SLURM node list {node_list!r} cannot be read; expected something like 'a[01-03,7],b4'")
    return nodes


def _expand_group(group: str, node_list: str) -> list[str]:
    endings = []
    for part in group.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"the SLURM node list {node_list!r} has a group that cannot be read: [{group}]")
        first, last = match[1], match[2] or match[1]
        endings += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return endings


def _all_reduce(x: Tensor, *, maximum: bool) -> Tensor:
    if get_global_size() == 1:
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return total


def _detect(environment: Mapping[str, str]) -> _Place | None:
    present = [name for name in _VARIABLES if environment.get(name)]
    missing = [name for name in _VARIABLES if name not in present]
    if not missing:
        return _place_from_torchrun(environment)
    started_by_slurm = "SLURM_PROCID" in environment and _slurm_tasks(environment) > 1
    if started_by_slurm and not set(present) & set(_RANK_VARIABLES):
        return _place_from_slurm(environment)
    if present:
        raise ConfigError(
            f"partially set environment: {', '.join(present)} set, {', '.join(missing)} missing; start with torchrun, "
            "which sets all six, or unset them for one process"
        )
    return None


def _place_from_torchrun(environment: Mapping[str, str]) -> _Place:
    numbers = [_integer(environment, name) for name in _VARIABLES[1:]]
    return _checked(_Place(environment["MASTER_ADDR"], *numbers))


def _place_from_slurm(environment: Mapping[str, str]) -> _Place:
    # The variables of the step (one srun) are right where those of the whole job are not.
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    nodes = expand_node_list(node_list)
    n_nodes_name = "SLURM_STEP_NUM_NODES" if environment.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NUM_NODES"
    if n_nodes_name in environment and _integer(environment, n_nodes_name) != len(nodes):
        raise ConfigError(
            f"the SLURM node list {node_list!r} names {len(nodes)} nodes, but {n_nodes_name} is "
            f"{environment[n_nodes_name]}; start with torchrun instead"
        )
    world_size = _slurm_tasks(environment)
    # All tasks must agree on a port without talking; job and step together make a clash of two jobs on a node rare.
    draw = random.Random(f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}")
    port = _integer(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else draw.randint(20_000, 60_000)
    return _checked(
        _Place(
            master_addr=nodes[0],
            master_port=port,
            rank=_integer(environment, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_integer(environment, "SLURM_LOCALID"),
            local_world_size=max(1, world_size // len(nodes)),
        )
    )


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if environment.get(name):
            return _integer(environment, name)
    return 1


def _integer(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"the environment variable {name} must be a whole number, got {value!r}") from None


def _checked(place: _Place) -> _Place:
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.world_size):
        raise ConfigError(
            f"the environment says rank {place.rank} (local {place.local_rank}) of {place.world_size} processes; ranks "
            "run from 0 to one less than their number; start all processes with the same launcher"
        )
    return place


def _export(variables: Mapping[str, str], *, overwrite: bool) -> None:
    for name, value in variables.items():
        if not overwrite and os.environ.get(name, value) != value:
            raise ConfigError(
                f"the environment variable {name} is {os.environ[name]!r} but {value!r} is needed; unset it, "
                "or call enable(overwrite=True)"
            )
    os.environ.update(variables)
