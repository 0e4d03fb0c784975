"""Training rows shared out over two gloo processes: the neighbours of one process, bit for bit."""

from pathlib import Path

import pytest
import torch

from dinov2.eval.knn import KnnModule
from dinov2.eval.knn.search import nearest_neighbours


def features(n, seed):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


QUERIES, TRAIN = features(11, 0), features(7, 1)  # 3 rows and 4: fewer than the 6 that are asked for
LABELS = torch.arange(7)
OWN_QUERIES = (slice(0, 11), slice(11, 11))  # the second process has no query


def search(rank):
    return KnnModule(TRAIN, LABELS, [6], 0.07, "cpu", num_classes=7).compute_neighbors(QUERIES[OWN_QUERIES[rank]])


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save(search(rank), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharing_out_rows_changes_no_bit(tmp_path):
    torch.multiprocessing.start_processes(run, (str(tmp_path),), nprocs=2, start_method="spawn")
    expected = nearest_neighbours(QUERIES, TRAIN, k=6)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted[OWN_QUERIES[rank]])


def test_one_process_has_the_plain_search():
    for got, wanted in zip(search(0), nearest_neighbours(QUERIES, TRAIN, k=6), strict=True):
        assert torch.equal(got, wanted)
