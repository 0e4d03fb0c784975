"""Sums, gathers and the start of several processes; the real ones talk through gloo."""

import os
import socket

import pytest
import torch
import torch.multiprocessing

from dinov2 import distributed
from dinov2.errors import ConfigError, DinoError

SIX = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "n[09-10]",
    "SLURM_JOB_NUM_NODES": "2",
}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("SLURM_") or name in SIX:
            monkeypatch.delenv(name)


def test_one_process_is_rank_zero_of_one_and_main():
    assert not distributed.is_enabled()
    assert (distributed.get_global_size(), distributed.get_global_rank()) == (1, 0)
    assert (distributed.get_local_size(), distributed.get_local_rank()) == (1, 0)
    assert distributed.is_main_process()


@pytest.mark.parametrize("collective", ["all_reduce_sum", "all_reduce_max", "all_gather_rows", "broadcast_object"])
def test_collectives_of_one_process_return_their_argument_itself(collective):
    x = torch.ones(2, 3)
    assert getattr(distributed, collective)(x) is x


def test_nothing_in_the_environment_means_one_process_without_a_group():
    distributed.enable()
    assert not distributed.is_enabled()
    distributed.barrier()
    distributed.disable()


def test_a_partial_torchrun_environment_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ConfigError, match="MASTER_PORT, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE missing"):
        distributed.enable()


def test_a_rank_outside_the_world_is_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", SIX | {"RANK": "8"})
    with pytest.raises(ConfigError, match="rank 8"):
        distributed.enable()


def test_a_rank_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="RANK must be a whole number, got 'x'"):
        distributed._detect(SIX | {"RANK": "x"})


def test_torchrun_wins_inside_a_slurm_allocation():
    place = distributed._detect(SIX | SLURM)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 8, 1, 2)


def test_slurm_tasks_find_their_place_and_agree_on_a_port():
    place = distributed._detect(SLURM)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert place.master_addr == "n09"
    assert 20_000 <= place.master_port <= 60_000
    assert distributed._detect(SLURM | {"SLURM_PROCID": "6"}).master_port == place.master_port
    assert distributed._detect(SLURM | {"SLURM_STEP_ID": "1"}).master_port != place.master_port


def test_a_slurm_job_may_fix_its_port():
    assert distributed._detect(SLURM | {"MASTER_PORT": "31000"}).master_port == 31000


def test_the_step_of_a_slurm_job_beats_the_whole_job():
    step = {"SLURM_STEP_NODELIST": "n10", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "6"}
    place = distributed._detect(SLURM | step)
    assert (place.master_addr, place.world_size, place.local_world_size) == ("n10", 6, 6)


@pytest.mark.parametrize("environment", [{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, SLURM | {"SLURM_NTASKS": "1"}])
def test_a_shell_in_an_allocation_or_a_single_task_is_one_process(environment):
    assert distributed._detect(environment) is None


def test_a_node_list_that_contradicts_the_number_of_nodes_is_refused():
    with pytest.raises(ConfigError, match="names 2 nodes, but SLURM_JOB_NUM_NODES is 3"):
        distributed._detect(SLURM | {"SLURM_JOB_NUM_NODES": "3"})


def test_a_variable_with_another_value_is_kept_unless_overwrite(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    with pytest.raises(ConfigError, match="MASTER_ADDR is 'elsewhere' but 'n09'"):
        distributed._export({"MASTER_ADDR": "n09"}, overwrite=False)
    distributed._export({"MASTER_ADDR": "n09"}, overwrite=True)
    assert os.environ["MASTER_ADDR"] == "n09"


@pytest.mark.parametrize(
    ("node_list", "nodes"),
    [
        ("host1", ["host1"]),
        ("host1,host2", ["host1", "host2"]),
        ("a[01-03,7],b4", ["a01", "a02", "a03", "a7", "b4"]),
        ("a1,b[2-3]", ["a1", "b2", "b3"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
        ("gpu-a[1-2].cluster.org", ["gpu-a1.cluster.org", "gpu-a2.cluster.org"]),
    ],
)
def test_node_lists_expand_with_padding_groups_and_plain_names(node_list, nodes):
    assert distributed.expand_node_list(node_list) == nodes


@pytest.mark.parametrize("node_list", ["", "a[1-2", "a[x-y]", "a[]"])
def test_an_unreadable_node_list_is_refused(node_list):
    with pytest.raises(ConfigError, match="node list"):
        distributed.expand_node_list(node_list)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _talk(rank: int, port: int) -> None:
    """The body of one of two processes; a failing assertion fails the test that spawned it."""
    torch.set_num_threads(1)
    six = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(six | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"})
    distributed.enable()
    assert (distributed.get_global_size(), distributed.get_global_rank()) == (2, rank)
    assert (distributed.get_local_size(), distributed.get_local_rank()) == (2, rank)
    assert distributed.is_main_process() == (rank == 0)

    mine = torch.tensor([1.0 + rank, 10.0 - rank], requires_grad=True)
    total, largest = distributed.all_reduce_sum(mine), distributed.all_reduce_max(mine)
    assert total.tolist() == [3.0, 19.0]
    assert largest.tolist() == [2.0, 10.0]
    assert mine.tolist() == [1.0 + rank, 10.0 - rank], "a collective changed its argument"
    assert not total.requires_grad

    rows = torch.full((3 * rank + 1, 2), rank)  # 1 row here, 4 rows there
    assert distributed.all_gather_rows(rows)[:, 0].tolist() == [0, 1, 1, 1, 1]
    assert distributed.all_gather_rows(rows[:rank]).tolist() == [[1, 1]], "a process without rows"
    assert distributed.all_gather_rows(rows.bool())[:, 1].tolist() == [False, True, True, True, True]
    assert distributed.broadcast_object({"from": rank}) == {"from": 0}

    with pytest.raises(DinoError, match="exists already"):
        distributed.enable()
    distributed.barrier()
    distributed.disable()
    assert not distributed.is_enabled()
    assert distributed.get_local_size() == 1


def test_two_processes_sum_gather_and_broadcast():
    torch.multiprocessing.spawn(_talk, args=(_free_port(),), nprocs=2)
