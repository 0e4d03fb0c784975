"""k-nearest-neighbour classification of frozen features: no training, no knob that matters much.

`evaluate_knn` goes from two sets of features to result rows; `KnnModule` has the call surface of the public release and
keeps only its share of the training features on each process. Both find exact neighbours (`dinov2.eval.neighbours`).
Labels may be any numbers: classes are those of the training set (`dinov2.eval.classes`), and test sets that have rules
of their own, such as ImageNet-A, are scored by them (`dinov2.eval.scoring`). The results file is one JSON document that
also holds the release's keys.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.encode.stream import Features
from dinov2.errors import ConfigError
from dinov2.eval.classes import Classification, few_shot_rows, match_classes
from dinov2.eval.neighbours import nearest_neighbours, neighbours_of_shared_rows, own_share, soft_vote
from dinov2.eval.result import Result, write_results
from dinov2.eval.scoring import Ranks, class_counts, figures_of_ranks, image_ranks, rows_of_tries
from dinov2.eval.setup import evaluation_parser

__all__ = [
    "SEARCHES",
    "KnnModule",
    "evaluate_knn",
    "get_args_parser",
    "knn_classify",
    "leave_one_out_knn",
    "release_keys",
    "write_knn_results",
]

SEARCHES = {"exact": "torch", "faiss": "faiss", "faiss-ivf": "faiss-ivf"}
"""Ways to search, and the backend of `nearest_neighbours` that each is."""

_RESULTS_FILE = "results_eval_knn.json"
_CHECKED_QUERIES = 100


def evaluate_knn(
    train: Features,
    val: Features,
    *,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
    search: str = "exact",
    device: torch.device | str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Top-1 and top-5 accuracy, in percent, of classifying `val` by its nearest neighbours in `train`.

    Args:
        nb_knn: numbers of neighbours; those above the number of training images are limited to it, with a note.
        n_per_class_list: -1 for all training images, n for tries with n images of each class drawn with the seeds
            0 .. n_tries - 1. A few-shot evaluation votes with every k of `nb_knn` up to n, and with k = n.
        search: `exact`, or `faiss` (all training images, on the CPU) and `faiss-ivf` (some clusters of them, so that
            neighbours are missed; the share that is found is measured on some queries and noted).
        device: where to search; None searches on the CPU.
        provenance: further fields of every `Result` row (dataset, split, model, transform, precision).

    Over several processes all call with all features; each classifies its share of `val` and all get the same rows.
    Similarity is the cosine, so features need not be normalised. With fewer than five classes top-5 is
    top-C; a class without a vote is never among the five.

    Raises:
        DataError: a set has no labels, the two share no class, or a feature is not finite.
        ConfigError: there is no such search, or a number of neighbours, images or tries makes no sense.
        MissingDependency: FAISS is not installed.
    """
    if search not in SEARCHES:
        raise ConfigError(f"no search is called {search!r}; choose {', '.join(SEARCHES)}")
    if n_tries < 1 or not temperature > 0:
        raise ConfigError(f"{n_tries} tries at temperature {temperature} were asked for; write 1 or more, and above 0")
    task = match_classes(train, val)
    rows = []
    for n_per_class in n_per_class_list:
        if n_per_class == 0:
            raise ConfigError("0 images per class were asked for; write a positive number, or -1 for all images")
        seeds = [None] if n_per_class < 0 else list(range(n_tries))
        started = time.perf_counter()
        tries = [_one_try(task, nb_knn, temperature, n_per_class, seed, device, search=search) for seed in seeds]
        seconds = time.perf_counter() - started
        rows += _rows(task, tries, n_per_class, temperature, seconds, provenance or {})
    if search == "exact":
        return rows
    return [replace(row, settings={**row.settings, "search": search}) for row in rows]


def leave_one_out_knn(
    train: Features,
    *,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> list[Result]:
    """`evaluate_knn` where every training image is classified by all the others.

    This chooses k and the temperature without looking at a validation set.
    """
    task = match_classes(train, train)
    started = time.perf_counter()
    tries = [_one_try(task, nb_knn, temperature, -1, None, device, leave_one_out=True)]
    seconds = time.perf_counter() - started
    rows = _rows(task, tries, -1, temperature, seconds, provenance or {})
    return [replace(row, settings={**row.settings, "protocol": "leave one out"}) for row in rows]


def knn_classify(
    train_features: Tensor,  # [S, D]
    train_labels: Tensor,  # int64 [S], 0 .. C - 1
    queries: Tensor,  # [Q, D]
    *,
    nb_knn: Sequence[int] = (20,),
    temperature: float = 0.07,
    n_classes: int | None = None,
) -> dict[int, Tensor]:  # k -> [Q, C]
    """Class scores of every query by cosine similarity, for each k; C is the largest label + 1 unless given."""
    n_classes = int(train_labels.max()) + 1 if n_classes is None else n_classes
    k = min(max(nb_knn), len(train_features))
    similarities, indices = nearest_neighbours(queries, train_features, k=k, cosine=True)
    return soft_vote(similarities, train_labels.cpu()[indices], n_classes=n_classes, ks=nb_knn, temperature=temperature)


class KnnModule(nn.Module):
    """The release's k-NN classifier: class scores for each k, from training features that all processes share out.

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
        similarities, indices = neighbours_of_shared_rows(
            features_rank, self.train_features, k=self.max_k, device=self.device
        )
        return similarities.to(self.device), self.train_labels[indices].to(self.device)


def release_keys(rows: Sequence[Result]) -> dict[str, float]:
    """The figures under the keys of the release's results file: `"('full', 10) Top 1": 83.5`."""
    keys = {}
    for row in rows:
        n_per_class = row.settings["n_per_class"]
        name = "full" if n_per_class == "all" else f"{n_per_class} per class"
        keys[f"{(name, row.k)!r} {row.metric.replace('top-', 'Top ')}"] = row.value
    return keys


def write_knn_results(output_dir: Path | str, rows: Sequence[Result], *, baselines: Sequence[Result] = ()) -> Path:
    """Write `results_eval_knn.json` (the main process alone does) and return its path.

    Rows of baselines go under a key of their own, so that the release's keys always mean the evaluated model.
    """
    path = Path(output_dir) / _RESULTS_FILE
    if distributed.is_main_process():
        write_results(path, rows, extra={**release_keys(rows), "baselines": [asdict(row) for row in baselines]})
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


class _Try(NamedTuple):
    ranks: dict[int, Ranks]  # by k
    notes: tuple[str, ...]


def _one_try(
    task: Classification,
    nb_knn: Sequence[int],
    temperature: float,
    n_per_class: int,
    seed: int | None,
    device: torch.device | str | None,
    *,
    leave_one_out: bool = False,
    search: str = "exact",
) -> _Try:
    notes = []
    if seed is None:
        train_features, train_classes = task.train_features, task.train_classes
        asked = set(nb_knn)
    else:
        rows = few_shot_rows(task.train_classes, n_per_class=n_per_class, seed=seed)
        train_features, train_classes = task.train_features[rows], task.train_classes[rows]
        asked = {k for k in {*nb_knn, n_per_class} if k <= n_per_class}
        n_small = int((torch.bincount(train_classes) < n_per_class).sum())
        if n_small:
            notes.append(f"{n_small} classes have fewer than {n_per_class} training images")
    if not asked or min(asked) < 1:
        raise ConfigError(f"numbers of neighbours must be 1 or more, got {sorted(nb_knn)}")
    available = len(train_features) - leave_one_out
    if max(asked) > available:
        too_large = ", ".join(str(k) for k in sorted(asked) if k > available)
        notes.append(f"k = {too_large} limited to the {available} training images")
    ks = sorted({min(k, available) for k in asked})

    # Each process classifies a share of the queries; all hold the training features already.
    own = own_share(len(task.val_features))
    similarities, indices = nearest_neighbours(
        task.val_features[own],
        train_features,
        k=ks[-1],
        cosine=True,
        exclude=torch.arange(len(task.val_features))[own] if leave_one_out else None,
        device=device,
        backend=SEARCHES[search],
    )
    if search == "faiss-ivf":
        share = _found_share(task.val_features[own], train_features, indices, device)
        notes.append(f"approximate search: it found {100 * share:.1f} % of the {ks[-1]} nearest training images")
    ranks = _ranks(similarities, train_classes[indices], task, own, ks, temperature)
    return _Try(
        {k: Ranks(*(distributed.all_gather_rows(part) for part in ranks[k])) for k in ks},
        tuple(notes),
    )


def _found_share(queries: Tensor, train: Tensor, indices: Tensor, device: torch.device | str | None) -> float:
    """The share of the nearest training rows that are among the found ones [Q, K], measured on some queries."""
    n = min(len(queries), _CHECKED_QUERIES)
    rows = torch.arange(n) * len(queries) // max(n, 1)
    _, nearest = nearest_neighbours(queries[rows], train, k=indices.shape[1], cosine=True, device=device)
    found = [torch.isin(exact, own).double().mean() for exact, own in zip(nearest, indices[rows], strict=True)]
    return float(torch.stack(found).mean()) if found else 1.0


def _ranks(
    similarities: Tensor,  # [q, K]
    labels: Tensor,  # int64 [q, K]
    task: Classification,
    own: slice,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Ranks]:
    """Ranks of the queries `own` for each k, by blocks of them: scores of all classes for all would fill the memory."""
    answers, none = task.answers, torch.empty(0, dtype=torch.int64)
    targets = answers.targets[own]
    label_sets = None if answers.label_sets is None else answers.label_sets[own]
    found: dict[int, list[Ranks]] = {k: [Ranks(none, none)] for k in ks}
    block = max(1, 16_000_000 // task.n_classes)  # bounds the scores of one k to 64 MB
    for first in range(0, len(targets), block):
        part = slice(first, first + block)
        votes = soft_vote(similarities[part], labels[part], n_classes=task.n_classes, ks=ks, temperature=temperature)
        for k, scores in votes.items():
            sets = None if label_sets is None else label_sets[part]
            found[k].append(image_ranks(answers.columns(scores), targets[part], sets))
    return {k: Ranks(*(torch.cat(column) for column in zip(*parts, strict=True))) for k, parts in found.items()}


def _rows(
    task: Classification,
    tries: Sequence[_Try],
    n_per_class: int,
    temperature: float,
    seconds: float,
    provenance: Mapping[str, Any],
) -> list[Result]:
    settings: dict[str, Any] = {
        "n_per_class": n_per_class if n_per_class > 0 else "all",
        "temperature": temperature,
        **class_counts(task),
        "n_train": len(task.train_features),
    }
    fields: dict[str, Any] = {
        **provenance,
        "seconds": seconds,
        "notes": tuple(dict.fromkeys((*task.notes, *(note for one in tries for note in one.notes)))),
    }
    rows: list[Result] = []
    for k in tries[0].ranks:
        by_try = [figures_of_ranks(one.ranks[k], task.answers) for one in tries]
        rows += rows_of_tries(by_try, method="knn", settings=settings, drawn=n_per_class > 0, k=k, **fields)
    return rows
