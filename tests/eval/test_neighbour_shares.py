"""A search shared out over two gloo processes finds what one process finds, bit for bit."""

from pathlib import Path

import pytest
import torch

from dinov2.eval.neighbours import nearest_neighbours, neighbours_of_own_queries, neighbours_of_shared_rows


def features(n, seed):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


QUERIES, TRAIN = features(11, 0), features(70, 1)
SHARES = (slice(0, 4), slice(4, 70))  # the first holds fewer rows than are asked for
OWN_QUERIES = (slice(0, 11), slice(11, 11))  # the second has no query


def search(rank):
    return {
        "own queries": neighbours_of_own_queries(QUERIES, TRAIN, k=6, cosine=True, exclude=torch.arange(11)),
        "shared rows": neighbours_of_shared_rows(QUERIES[OWN_QUERIES[rank]], TRAIN[SHARES[rank]], k=6),
    }


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save(search(rank), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharing_out_queries_or_rows_changes_no_bit(tmp_path):
    torch.multiprocessing.start_processes(run, (str(tmp_path),), nprocs=2, start_method="spawn")
    expected_own = nearest_neighbours(QUERIES, TRAIN, k=6, cosine=True, exclude=torch.arange(11))
    expected_rows = nearest_neighbours(QUERIES, TRAIN, k=6)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for got, wanted in zip(found["own queries"], expected_own, strict=True):
            assert torch.equal(got, wanted)
        for got, wanted in zip(found["shared rows"], expected_rows, strict=True):
            assert torch.equal(got, wanted[OWN_QUERIES[rank]])


def test_one_process_has_the_plain_search():
    for got, wanted in zip(
        neighbours_of_shared_rows(QUERIES, TRAIN, k=6), nearest_neighbours(QUERIES, TRAIN, k=6), strict=True
    ):
        assert torch.equal(got, wanted)
    for got, wanted in zip(
        neighbours_of_own_queries(QUERIES, TRAIN, k=6), nearest_neighbours(QUERIES, TRAIN, k=6), strict=True
    ):
        assert torch.equal(got, wanted)
