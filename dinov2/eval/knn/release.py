"""The public release's k-NN: its module, the flags of its command, and its results file."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.eval.knn.evaluate import soft_vote
from dinov2.eval.knn.search import merge_neighbours, nearest_neighbours
from dinov2.eval.result import Result, write_results
from dinov2.eval.setup import evaluation_parser

__all__ = ["KnnModule", "get_args_parser", "write_knn_results"]

_RESULTS_FILE = "results_eval_knn.json"


class KnnModule(nn.Module):
    """Class scores for each k, from training features that all processes share out.

    Every process passes all training features and keeps its contiguous part; queries travel to all processes and the
    best neighbours of each part are merged, so the result is that of one process. Features are taken as they are:
    normalise both sides for the cosine.
    """

    def __init__(
        self,
        train_features: Tensor,  # [S, D]
        train_labels: Tensor,  # int64 [S]
        nb_knn: Sequence[int],
        T: float,
        device: torch.device | str,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
        n_rows = len(train_features)
        self.train_features = train_features[n_rows * rank // world_size : n_rows * (rank + 1) // world_size].to(device)
        self.train_labels = train_labels.cpu()
        self.nb_knn, self.T, self.num_classes = tuple(nb_knn), T, num_classes
        self.max_k = min(max(nb_knn), n_rows)
        self.device = torch.device(device)

    def forward(self, features_rank: Tensor) -> dict[int, Tensor]:  # [B, D] -> k -> [B, C]
        """Class scores of this process's queries; all processes must call, each with its own (none is fine)."""
        similarities, labels = self.compute_neighbors(features_rank)
        return soft_vote(similarities, labels, n_classes=self.num_classes, ks=self.nb_knn, temperature=self.T)

    def compute_neighbors(self, features_rank: Tensor) -> tuple[Tensor, Tensor]:  # [B, D] -> [B, K], int64 [B, K]
        """Similarities, descending, and labels of the K nearest training rows, K being the largest of `nb_knn`."""
        similarities, indices = _neighbours_among_shared_rows(
            features_rank, self.train_features, k=self.max_k, device=self.device
        )
        return similarities.to(self.device), self.train_labels[indices].to(self.device)


def write_knn_results(output_dir: Path | str, rows: Sequence[Result], *, baselines: Sequence[Result] = ()) -> Path:
    """Write `results_eval_knn.json` (the main process alone does) and return its path.

    The figures stand there under the release's keys too, `"('full', 10) Top 1": 83.5`. Rows of baselines go under a key
    of their own, so that the release's keys always mean the evaluated model.
    """
    path = Path(output_dir) / _RESULTS_FILE
    if distributed.is_main_process():
        keys = {}
        for row in rows:
            n_per_class = row.settings["n_per_class"]
            name = "full" if n_per_class == "all" else f"{n_per_class} per class"
            keys[f"{(name, row.k)!r} {row.metric.replace('top-', 'Top ')}"] = row.value
        write_results(path, rows, extra={**keys, "baselines": [asdict(row) for row in baselines]})
    return path


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The flags of the release's k-NN command, with its defaults."""
    parser = evaluation_parser(description, parents, add_help, train="to vote with", val="to classify")
    parser.add_argument("--nb_knn", nargs="+", type=int, default=[10, 20, 100, 200], help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="softmax temperature of the vote")
    parser.add_argument("--gather-on-cpu", action="store_true", help="accepted; features are always kept on the CPU")
    parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass")
    parser.add_argument(
        "--n-per-class-list", nargs="+", type=int, default=[-1], help="training images per class, -1 for all"
    )
    parser.add_argument("--n-tries", type=int, default=1, help="draws per few-shot number")
    return parser


def _neighbours_among_shared_rows(
    queries: Tensor,  # [Q_rank, D]
    rows: Tensor,  # [S_rank, D]
    *,
    k: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # float32 [Q_rank, k], int64 [Q_rank, k]
    """`nearest_neighbours` where every process has a part of the training rows and queries of its own (none is fine).

    Queries travel to all processes, and the best of each part back. Rows are numbered through in rank order.
    """
    rank = distributed.get_global_rank()
    n_rows, n_queries = distributed.all_gather_rows(torch.tensor([[len(rows), len(queries)]])).unbind(dim=1)
    first_row, first_query = int(n_rows[:rank].sum()), int(n_queries[:rank].sum())
    all_queries = distributed.all_gather_rows(queries.detach().float().cpu())
    # A small part holds fewer than k rows; what is missing can never be among the best.
    similarities = torch.full((len(all_queries), k), -torch.inf)
    indices = torch.full((len(all_queries), k), int(n_rows.sum()))
    local_k = k if distributed.get_global_size() == 1 else min(k, len(rows))
    if local_k > 0:
        nearest, numbers = nearest_neighbours(all_queries, rows, k=local_k, device=device)
        similarities[:, :local_k], indices[:, :local_k] = nearest, numbers + first_row
    candidates = (
        torch.cat(distributed.all_gather_rows(part).split(max(1, len(all_queries))), dim=1)  # [Q, W * k]
        for part in (similarities, indices)
    )
    similarities, indices = merge_neighbours(*candidates, k=k)
    share = slice(first_query, first_query + len(queries))
    return similarities[share], indices[share]
