"""Classification of images by the vote of their nearest training images.

Labels may be any numbers: classes are those of the training set (`dinov2.eval.scoring`), and test sets that have rules
of their own, such as ImageNet-A, are scored by them (`dinov2.encode.stream.Scoring`).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.encode.stream import Features
from dinov2.errors import ConfigError
from dinov2.eval.knn.search import SearchBackend, nearest_neighbours
from dinov2.eval.outcome import Evaluation
from dinov2.eval.result import Result
from dinov2.eval.scoring import (
    ClassPredictions,
    Provenance,
    Ranks,
    few_shot_rows,
    figures_from_ranks,
    image_ranks,
    match_classes,
    rows_from_tries,
)

__all__ = ["KnnSettings", "evaluate_knn", "evaluate_knn_outcome", "soft_vote"]

_SEARCHES: dict[str, SearchBackend] = {"exact": "torch", "faiss": "faiss", "faiss-ivf": "faiss-ivf"}
"""Ways to search, and the backend of `nearest_neighbours` that each is."""

_CHECKED_QUERIES = 100


@dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """The vote. Raises `ConfigError` for values that make no sense."""

    nb_knn: Sequence[int] = (10, 20, 100, 200)
    """Numbers of neighbours; those above the number of training images are limited to it, with a note."""
    temperature: float = 0.07
    n_per_class_list: Sequence[int] = (-1,)
    """-1 for all training images, n for tries with n images of each class drawn with the seeds 0 .. n_tries - 1. A
    few-shot evaluation votes with every k of `nb_knn` up to n, and with k = n."""
    n_tries: int = 1
    search: str = "exact"
    """`exact`, or `faiss` (all training images, on the CPU) and `faiss-ivf` (some clusters of them, so that neighbours
    are missed; the share that is found is measured on some queries and noted)."""

    def __post_init__(self) -> None:
        counts = {"a number of neighbours": min(self.nb_knn, default=0), "the number of tries": self.n_tries}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; write 1 or more")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"the temperature is {self.temperature}; write a number above 0, such as 0.07")
        if 0 in self.n_per_class_list:
            raise ConfigError("0 images per class were asked for; write a positive number, or -1 for all images")
        if self.search not in _SEARCHES:
            raise ConfigError(f"no search is called {self.search!r}; choose {', '.join(_SEARCHES)}")

    def require_search(self) -> None:
        """Raise `MissingDependency` for a search that is not installed."""
        if self.search != "exact":
            nearest_neighbours(torch.ones(1, 1), torch.ones(1, 1), k=1, backend="faiss")


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
    provenance: Provenance | None = None,
) -> list[Result]:
    """Top-1 and top-5 accuracy, in percent, of classifying `val` by its nearest neighbours in `train`.

    Args:
        nb_knn, temperature, n_per_class_list, n_tries, search: those of `KnnSettings`.
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
    settings = KnnSettings(
        nb_knn=nb_knn, temperature=temperature, n_per_class_list=n_per_class_list, n_tries=n_tries, search=search
    )
    task = match_classes(train, val)
    rows: list[Result] = []
    for n_per_class in n_per_class_list:
        started = time.perf_counter()
        seeds = [None] if n_per_class < 0 else list(range(n_tries))
        tries = [_classify(task, settings, n_per_class, seed, device) for seed in seeds]
        rows += _rows(task, settings, tries, n_per_class, time.perf_counter() - started, provenance)
    return rows


def evaluate_knn_outcome(
    train: Features,
    val: Features,
    *,
    k: int = 20,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str | None = None,
    provenance: Provenance | None = None,
) -> Evaluation:
    """`evaluate_knn` with all training images, with the mean over classes, and the answers for `k` neighbours.

    Rows for `k`, which is limited to the number of training images, come first.
    """
    settings = KnnSettings(nb_knn=(k, *nb_knn), temperature=temperature)
    task = match_classes(train, val)
    started = time.perf_counter()
    found = _classify(task, settings, -1, None, device, outcome_k=k)
    rows = _rows(task, settings, [found], -1, time.perf_counter() - started, provenance, per_class=True)
    k = min(k, len(task.train_features))
    return Evaluation(sorted(rows, key=lambda row: row.k != k), {f"k={k}": task.answers.outcome(found.probabilities)})


def soft_vote(
    similarities: Tensor,  # [Q, K], descending
    neighbour_labels: Tensor,  # int64 [Q, K], in 0 .. n_classes - 1
    *,
    n_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Tensor]:  # k -> [Q, C]
    """Class scores of the k nearest neighbours for each k of `ks`, all from one sorted list.

    A neighbour weighs softmax(similarity / temperature) over all K neighbours, so scores of the largest k sum to 1 and
    those of a smaller k to less; their order is that of a vote among the k nearest alone.
    Paper: Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination".
    """
    weights = (similarities / temperature).softmax(dim=1)
    scores = weights.new_zeros(len(weights), n_classes)
    votes, counted = {}, 0
    for k in sorted(set(ks)):
        scores = scores.scatter_add(1, neighbour_labels[:, counted:k], weights[:, counted:k])
        votes[k], counted = scores, k
    return votes


class _Try(NamedTuple):
    ranks: dict[int, Ranks]  # by k
    notes: list[str]
    probabilities: Tensor  # float32 [Q, A] for the k of the outcome, or [0, A]


def _classify(
    task: ClassPredictions,
    settings: KnnSettings,
    n_per_class: int,
    seed: int | None,
    device: torch.device | str | None,
    *,
    outcome_k: int | None = None,
) -> _Try:
    """One vote with all training images, or with `n_per_class` of each class drawn by a seed."""
    notes: list[str] = []
    train_features, train_classes, asked = task.train_features, task.train_classes, set(settings.nb_knn)
    if seed is not None:
        rows = few_shot_rows(task.train_classes, n_per_class=n_per_class, seed=seed)
        train_features, train_classes = task.train_features[rows], task.train_classes[rows]
        asked = {k for k in {*asked, n_per_class} if k <= n_per_class}
        n_small = int((torch.bincount(train_classes) < n_per_class).sum())
        if n_small:
            notes.append(f"{n_small} classes have fewer than {n_per_class} training images")
    available = len(train_features)
    if max(asked) > available:
        too_large = ", ".join(str(k) for k in sorted(asked) if k > available)
        notes.append(f"k = {too_large} limited to the {available} training images")
    ks = sorted({min(k, available) for k in asked})

    # Each process classifies a share of the queries; all hold the training features already.
    rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
    n_queries = len(task.val_features)
    share = slice(n_queries * rank // world_size, n_queries * (rank + 1) // world_size)
    queries = task.val_features[share]
    similarities, indices = nearest_neighbours(
        queries, train_features, k=ks[-1], cosine=True, device=device, backend=_SEARCHES[settings.search]
    )
    if settings.search == "faiss-ivf":
        recall = _search_recall(queries, train_features, indices, device)
        notes.append(f"approximate search: it found {100 * recall:.1f} % of the {ks[-1]} nearest training images")
    outcome_k = None if outcome_k is None else min(outcome_k, available)
    ranks, probabilities = _vote(similarities, train_classes[indices], task, share, ks, settings.temperature, outcome_k)
    gathered = {k: Ranks(*(distributed.all_gather_rows(column) for column in ranks[k])) for k in ks}
    return _Try(gathered, notes, distributed.all_gather_rows(probabilities))


def _search_recall(queries: Tensor, train: Tensor, indices: Tensor, device: torch.device | str | None) -> float:
    """Share of the nearest training rows that are among the given ones [Q, K], measured on some queries."""
    n = min(len(queries), _CHECKED_QUERIES)
    if not n:
        return 1.0
    rows = torch.arange(n) * len(queries) // n
    _, nearest = nearest_neighbours(queries[rows], train, k=indices.shape[1], cosine=True, device=device)
    shares = [torch.isin(exact, given).double().mean() for exact, given in zip(nearest, indices[rows], strict=True)]
    return float(torch.stack(shares).mean())


def _vote(
    similarities: Tensor,  # [q, K]
    labels: Tensor,  # int64 [q, K]
    task: ClassPredictions,
    share: slice,
    ks: Sequence[int],
    temperature: float,
    outcome_k: int | None,
) -> tuple[dict[int, Ranks], Tensor]:
    """Ranks of the queries for each k, by blocks of them: scores of all classes for all would fill the memory."""
    answers, none = task.answers, torch.empty(0, dtype=torch.int64)
    targets = answers.targets[share]
    label_sets = None if answers.label_sets is None else answers.label_sets[share]
    ranks: dict[int, list[Ranks]] = {k: [Ranks(none, none)] for k in ks}
    probabilities = [torch.empty(0, len(answers))]
    block = max(1, 16_000_000 // task.n_classes)  # bounds the scores of one k to 64 MB
    for first in range(0, len(targets), block):
        part = slice(first, first + block)
        votes = soft_vote(similarities[part], labels[part], n_classes=task.n_classes, ks=ks, temperature=temperature)
        for k, scores in votes.items():
            sets = None if label_sets is None else label_sets[part]
            ranks[k].append(image_ranks(answers.columns(scores), targets[part], sets))
            if k == outcome_k:
                # Weights are a share of all K neighbours; among the nearest k and the answers they shall sum to 1.
                probabilities.append(answers.shares(scores))
    joined = {k: Ranks(*(torch.cat(column) for column in zip(*parts, strict=True))) for k, parts in ranks.items()}
    return joined, torch.cat(probabilities)


def _rows(
    task: ClassPredictions,
    settings: KnnSettings,
    tries: Sequence[_Try],
    n_per_class: int,
    seconds: float,
    provenance: Provenance | None,
    *,
    per_class: bool = False,
) -> list[Result]:
    described: dict[str, object] = {
        "n_per_class": n_per_class if n_per_class > 0 else "all",
        "temperature": settings.temperature,
        **task.class_counts(),
        "n_train": len(task.train_features),
    }
    if settings.search != "exact":
        described["search"] = settings.search
    notes = tuple(dict.fromkeys((*task.notes, *(note for one in tries for note in one.notes))))
    rows: list[Result] = []
    for k in tries[0].ranks:
        figures = [figures_from_ranks(one.ranks[k], task.answers, per_class=per_class) for one in tries]
        rows += rows_from_tries(
            figures,
            k=k,
            settings=described,
            drawn=n_per_class > 0,
            notes=notes,
            seconds=seconds,
            provenance=provenance or {},
        )
    return rows
