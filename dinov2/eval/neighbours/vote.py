"""The vote of the nearest neighbours, for every k at once."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["soft_vote"]


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
